"""What every prompt trainer shares: backbone, feature tables, prompts, optimiser, evaluation of its heads."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import torch
from dassl.engine import TrainerX
from dassl.optim import build_lr_scheduler, build_optimizer
from dassl.utils import load_checkpoint
from torch import Tensor, nn

from air_plugin.clip.features import FeatureBatches
from air_plugin.clip.loading import load_backbone
from air_plugin.clip.prompts import SavedPrompts
from air_plugin.clip.zero_shot import UnlabelledImages, look_at_unlabelled, template_features, unlabelled_paths
from air_plugin.config import require_ranges, validate
from air_plugin.functional.metrics import head_metrics
from air_plugin.utils.checks import require
from air_plugin.utils.class_names import listed
from air_plugin.utils.digests import content_digest
from air_plugin.utils.errors import UserError
from air_plugin.utils.files import digest, to_json
from air_plugin.utils.progress import report
from air_plugin.utils.provenance import Stages
from air_plugin.utils.store import Store
from trainers.evaluation import predictions_of, print_groups, seen_classes
from trainers.fused_heads import FusedHeads
from trainers.prompt_step import prompt_step
from trainers.prompted_models import make_model
from trainers.resuming import has_checkpoint, require_same, write_identity
from trainers.tables import Tables
from trainers.transduction import refined_heads, require_anchors, require_test_labels

log = logging.getLogger(f"air_plugin.{__name__}")  # `show_logs` shows what is below air_plugin


class PromptTrainer(TrainerX):
    """Trains prompts on a feature table. A method overrides `training_set` and `losses`; see trainers/coop.py.

    static_losses: stands in each class that defines `losses`: these read nothing that differs between two steps of a
        round but their arguments. Then a step is one CUDA graph on a GPU (AIR.CUDA_GRAPHS).
    two_views: whether `losses` reads img2, a second view.
    """

    static_losses, two_views = True, False
    auxiliary_mixin = FusedHeads  # what `augment` adds
    primary: str = "text"
    model: Any
    has_other_names = False  # whether the weights that were loaded are of other classes

    def check_cfg(self, cfg: Any) -> None:
        validate(cfg, "DATASET", "TRAINER.PROMPT")
        require_anchors(cfg, has_images=isinstance(self, FusedHeads))
        require_ranges(cfg)
        require(cfg.OPTIM.MAX_EPOCH >= 1, "OPTIM.MAX_EPOCH", cfg.OPTIM.MAX_EPOCH, "at least 1")

    def build_model(self) -> None:
        require_test_labels(self.cfg, (item.label for item in self.dm.dataset.test))
        self.seed = max(self.cfg.SEED, 0)
        self.stages = Stages()
        self.store = Store(self.cfg.AIR.CACHE or Path(self.cfg.OUTPUT_DIR) / "cache")
        self.results: dict[str, dict[str, Any]] = {}
        self.last_losses: dict[str, float] = {}
        self.predictions: dict[str, Any] = {}
        self.classnames: list[str] = list(self.dm.dataset.classnames)
        with self.stages.stage("backbone"):
            self.backbone = load_backbone(
                self.cfg.MODEL.BACKBONE.NAME,
                precision=self.cfg.TRAINER.PROMPT.PREC,
                autocast=self.cfg.TRAINER.PROMPT.AUTOCAST,
                device=self.device,
            )
        self.tables = Tables(self.backbone, self.cfg, self.store, self.stages)
        self.template_features = template_features(self.backbone, self.classnames, self.cfg.DATASET.TEMPLATE)
        self.build_training()

    def build_training(self) -> None:
        """Prompts first: an error in their settings shows before hours of generation."""
        self.build_prompts()
        self.prepare()

    def prepare(self) -> None:
        """Set the table that the prompts are trained on: the unlabelled images."""
        self.table: Any = self.unlabelled.table
        if self.is_visual:
            self.table = self.training_table(self.unlabelled.paths, name="images of train", views=self.views)

    @functools.cached_property
    def unlabelled(self) -> UnlabelledImages:
        """The unlabelled images, their features by the frozen tower and their zero-shot probabilities."""
        options = self.tables.extraction("features of train", views=1 if self.is_visual else self.views)
        with self.stages.stage(options["title"]) as stage:
            paths = unlabelled_paths(self.dm.dataset)
            images, stage.cached = look_at_unlabelled(self.backbone, paths, self.template_features, **options)
        return images

    @property
    def is_visual(self) -> bool:
        """Whether the image tower has prompts: it runs in training and in tests."""
        return self.cfg.TRAINER.PROMPT.MODALITY != "text"

    @property
    def views(self) -> int:
        """Of an image in the table that the prompts are trained on."""
        return self.cfg.TRAINER.PROMPT.IMAGE_VIEWS if self.is_visual else self.cfg.TRAINER.PROMPT.VIEWS

    def training_table(self, paths: list[str], *, name: str, views: int) -> Any:
        """The table of images that the prompts are trained on: what `self.model` takes, as a stage of its own.

        Args:
            paths: N image files.
            name: of the stage, for instance "features of train".
            views: of an image, the plain one included; those beyond the first follow INPUT.TRANSFORMS.

        Returns:
            A FeatureTable where prompts are of words, else an ImageTable.
        """
        if self.is_visual:
            return self.tables.images(paths, name=name.replace("features", "images"), views=views)
        return self.tables.features(paths, name=name, views=views)

    def build_prompts(self) -> None:
        """Make the prompts and their optimiser, and with them `model`."""
        self.model, learner = make_model(
            self.backbone, self.classnames, self.template_features, cfg=self.cfg, seed=self.seed
        )
        self.initial = {name: value.clone() for name, value in learner.state_dict().items()}
        self.register_model("prompt_learner", learner, *self.new_optimiser())

    def new_optimiser(self) -> tuple[Any, Any]:
        """The prompts' optimiser and schedule, at the first step."""
        self.optim = build_optimizer(self.model.prompt_learner, self.cfg.OPTIM)
        try:
            self.sched = build_lr_scheduler(self.optim, self.cfg.OPTIM)
        except TypeError as error:  # Dassl 0.6.3 passes `verbose`, which torch no longer takes
            raise UserError(
                "this Dassl's warm-up does not work with this torch; set OPTIM.WARMUP_EPOCH -1, or use an older torch"
            ) from error
        return self.optim, self.sched

    def before_train(self) -> None:
        super().before_train()
        if self.get_model_names():
            self.train_on(*self.training_set())

    def train_on(self, index: Tensor, targets: dict[str, Tensor]) -> None:
        """Train the following epochs on (S,) images of the feature table, each with its row of every target."""
        if not len(index):
            raise UserError("no image was selected for training; loosen the selection (TRAINER.CPL.ALPHA, BETA)")
        self.train_loader_x = FeatureBatches(
            self.table,
            index,
            targets,
            batch_size=self.cfg.DATALOADER.TRAIN_X.BATCH_SIZE,
            seed=self.seed,
            epoch=lambda: self.epoch,
            members=self.cfg.TRAINER.PROMPT.ENSEMBLE,
        )
        self.step = prompt_step(self)

    def training_set(self) -> tuple[Tensor, dict[str, Tensor]]:
        """(S,) indices into the feature table, and by name the S rows of targets that `losses` gets in its batches."""
        raise NotImplementedError

    def losses(self, batch: dict[str, Tensor], text: Tensor) -> dict[str, Tensor]:
        """Named losses of a batch, their weights in; `text` are the prompts' features, for `self.model.logits`."""
        raise NotImplementedError

    def inputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What `losses` gets as its batch: a place to add tensors that differ from step to step.

        Images that no loss reads are left out, for the image tower would encode them.
        """
        return {name: value for name, value in batch.items() if name != "img2" or not self.is_visual or self.two_views}

    def forward_backward(self, batch: dict[str, Tensor]) -> dict[str, float]:
        losses = self.step(self.inputs(batch))
        self.model_update()
        if self.batch_idx + 1 == self.num_batches:
            self.update_lr()
        values = torch.stack(list(losses.values())).cpu()  # the only place of a step where the host waits for a GPU
        self.detect_anomaly(values)
        self.last_losses = dict(zip(losses, values.tolist(), strict=True))
        return self.last_losses

    def after_epoch(self) -> None:
        super().after_epoch()
        loss = sum(self.last_losses.values()) if self.last_losses else None
        report("prompt training", self.epoch + 1, self.max_epoch, loss=loss)

    def train(self) -> None:
        with self.stages.stage("prompt training"):
            super().train()

    def identity(self) -> dict[str, Any]:
        """What checkpoints depend on beside the settings; JSON values by name."""
        return {
            "trainer": self.cfg.TRAINER.NAME,
            "seed": self.seed,
            "classes": digest(to_json(self.classnames).encode()),
            "images": content_digest(self.training_paths(), cache=self.store.digests),
        }

    def training_paths(self) -> list[str]:
        """The images of the feature table, in its order."""
        return self.unlabelled.paths

    def resume_model_if_exist(self, directory: str) -> int:
        """Go on from the checkpoints in the output folder, else from those in `directory` (RESUME).

        Raises:
            UserError: they are damaged or of another run, or RESUME has none.
        """
        names, self.resumed = self.get_model_names(), Path(self.output_dir)
        if not names:
            return 0  # upstream fails where nothing is trained
        if not has_checkpoint(self.resumed, names):
            self.resumed = Path(directory)
            if self.cfg.RESUME and not has_checkpoint(self.resumed, names):
                raise UserError(f"RESUME (--resume) is {directory}, which holds no checkpoint of {' and '.join(names)}")
        identity = self.identity()
        if has_checkpoint(self.resumed, names):
            require_same(self.resumed, identity)
        write_identity(Path(self.output_dir), identity)
        try:
            return super().resume_model_if_exist(str(self.resumed))
        except (RuntimeError, FileNotFoundError) as error:
            raise UserError(f"{error}; remove the checkpoints in {directory} to train from the start") from error

    def load_model(self, directory: str, epoch: int | None = None) -> None:
        """Load the weights of an epoch (1-based); else the best ones, or the last where there are no best ones.

        A context that all classes share serves other class names than those it was trained with.

        Raises:
            UserError: there is no such file, or it does not fit the settings, the backbone or, with CSC, the classes.
        """
        for name in self.get_model_names():
            folder = Path(directory) / name
            best, last = folder / "model-best.pth.tar", folder / "checkpoint"
            if epoch is not None:
                path = folder / f"model.pth.tar-{epoch}"
            else:
                path = best if best.exists() or not last.exists() else folder / last.read_text().strip()
            if not path.is_file():
                raise UserError(f"no checkpoint {path}; --model-dir is the folder that holds {name}/")
            self._load(self._models[name], path)

    def _load(self, model: nn.Module, path: Path) -> None:
        learners = [part for part in model.modules() if isinstance(part, SavedPrompts)]
        for learner in learners:
            learner.other_names_allowed = True
        try:
            model.load_state_dict(load_checkpoint(str(path))["state_dict"])
        except RuntimeError as error:
            raise UserError(f"{path} does not fit TRAINER.PROMPT: {' '.join(str(error).split())[:300]}") from error
        names = learners[0].trained_names
        self.has_other_names = list(names) != self.classnames
        if self.has_other_names:
            log.info(
                "the context was trained with %d other classes (%s); it serves these %d (%s)",
                *(len(names), listed(names), len(self.classnames), listed(self.classnames)),
            )

    @torch.no_grad()
    def text_features(self) -> Tensor:
        """(E, C, D) unit features of the text head; E is 1 where there is no ensemble of prompts."""
        return self.model.text_features()

    def head_probs(self, features: Tensor, frozen: Tensor | None = None) -> dict[str, Tensor]:
        """(N, D) unit features of images to the (N, C) probabilities of every head.

        features: by the tower with its prompts. frozen: (N, D), without them, where `features_of` gives these, too.
        """
        return {"text": self.model(features).softmax(dim=1)}

    def features_of(self, paths: list[str], *, split: str) -> tuple[Tensor, Tensor | None]:
        """(N, D) features of a split's images for `head_probs`; a place to add those of the frozen tower."""
        table = self.training_table(paths, name=f"features of {split}", views=1)
        return self.model.encode(table.plain) if self.is_visual else table.plain, None

    @torch.no_grad()
    def model_inference(self, input: Tensor) -> Tensor:
        """(B, 3, H, W) pixels or (B, D) features to the primary classifier's (B, C) scores."""
        if input.ndim != 4:
            return self.head_probs(input)[self.primary]
        frozen = self.backbone.encode_images(input)
        features = self.model.encode_pixels(input) if self.is_visual else frozen
        return self.head_probs(features, frozen)[self.primary]

    def bundle_heads(self) -> dict[str, Any]:
        """The heads for `save_bundle`."""
        tokens = self.model.prompt_learner.visual_tokens().detach() if self.is_visual else None
        return {"text": self.text_features(), "auxiliary": None, "tokens": tokens}

    @torch.no_grad()
    def test(self, split: str | None = None) -> float | None:
        """Evaluate every head, the primary classifier last; returns its accuracy (trzsl: H) in percent or None."""
        self.set_model_mode("eval")
        split = split or self.cfg.TEST.SPLIT
        data = self.dm.dataset.val if split == "val" and self.dm.dataset.val else self.dm.dataset.test
        paths = [item.impath for item in data]
        features, frozen = self.features_of(paths, split=split)
        labelled = all(item.label >= 0 for item in data)
        labels = torch.tensor([item.label for item in data], device=self.device) if labelled else None
        seen = seen_classes(self.dm.dataset)
        plain = self.head_probs(features, frozen)
        heads = refined_heads(self, features, plain, labels)
        for name in sorted(heads, key=lambda head: head == self.primary):
            self.results[name] = head_metrics(heads[name], labels, self.classnames, seen=seen)
            if labels is None:
                print(f"No labels: the accuracy of the {name} head is unknown")
                continue
            print(f"Evaluate the {name} head on the *{split}* set")
            self.evaluator.reset()
            self.evaluator.process(heads[name], labels)
            printed = self.evaluator.evaluate() | print_groups(self.results[name])
            if name == self.primary:
                for key, value in printed.items():
                    self.write_scalar(f"{split}/{key}", value, self.epoch)
        self.predictions = predictions_of(
            heads, paths, labels, split=split, root=self.cfg.DATASET.ROOT, classnames=self.classnames, seen=seen
        )
        if labels is not None:
            self.diagnose(plain, features if frozen is None else frozen, labels)
        harmonic, accuracy = (self.results[self.primary].get(name) for name in ("harmonic", "accuracy"))
        return accuracy if harmonic is None else harmonic

    def diagnose(self, heads: dict[str, Tensor], features: Tensor, labels: Tensor) -> None:
        """A place for metrics; they choose nothing.

        Args:
            heads: (N, C) probabilities by name.
            features: (N, D), those that the auxiliary classifier reads.
            labels: (N,).
        """

    def metrics(self) -> dict[str, Any]:
        """More that belongs into result.json."""
        return {"pseudo_labels": {"selected": 0, "coverage": 0.0, "accuracy": None}, "rounds": []}

    def hidden_labels(self) -> Tensor | None:
        """(N,) true classes of the unlabelled images, for metrics after training only; None where they are unknown."""
        true = getattr(self.dm.dataset, "hidden_labels", None)
        paths = self.unlabelled.paths
        return torch.tensor([true[path] for path in paths]) if true and all(path in true for path in paths) else None
