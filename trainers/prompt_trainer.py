"""What every prompt trainer shares: backbone, feature tables, prompts, optimiser, evaluation of its heads."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from dassl.config import get_cfg_default
from dassl.data.transforms import build_transform
from dassl.engine import TrainerX
from dassl.optim import build_lr_scheduler, build_optimizer
from dassl.utils import load_checkpoint
from torch import Tensor, nn

from air_plugin.clip.features import FeatureBatches, FeatureTable, extract_features
from air_plugin.clip.loading import load_backbone
from air_plugin.clip.prompts import PromptedCLIP, PromptEnsemble, PromptLearner
from air_plugin.clip.zero_shot import UnlabelledImages, look_at_unlabelled, template_features, unlabelled_paths
from air_plugin.config import require_ranges, validate
from air_plugin.functional.metrics import head_metrics
from air_plugin.inference.bundle import preprocessing_of
from air_plugin.utils.checks import require
from air_plugin.utils.class_names import listed
from air_plugin.utils.digests import content_digest
from air_plugin.utils.errors import UserError
from air_plugin.utils.files import digest, to_json
from air_plugin.utils.progress import report
from air_plugin.utils.provenance import Stages
from air_plugin.utils.seeding import member_seed, stable_seed
from air_plugin.utils.store import Store
from trainers.evaluation import predictions_of, print_groups, seen_classes
from trainers.fused_heads import FusedHeads
from trainers.prompt_step import prompt_step
from trainers.resuming import has_checkpoint, require_same, write_identity
from trainers.transduction import refined_heads, require_anchors

log = logging.getLogger(f"air_plugin.{__name__}")  # `show_logs` shows what is below air_plugin


class PromptTrainer(TrainerX):
    """Trains prompts on a feature table. A method overrides `training_set` and `losses`; see trainers/coop.py.

    static_losses: stands in each class that defines `losses`: these read nothing that differs between two steps of a
        round but their arguments. Then a step is one CUDA graph on a GPU (AIR.CUDA_GRAPHS).
    """

    static_losses = True
    auxiliary_mixin = FusedHeads  # what `augment` adds
    primary: str = "text"
    has_other_names = False  # whether the weights that were loaded are of other classes

    def check_cfg(self, cfg: Any) -> None:
        validate(cfg, "DATASET", "TRAINER.PROMPT")
        require_anchors(cfg, has_images=isinstance(self, FusedHeads))
        require_ranges(cfg)
        require(cfg.OPTIM.MAX_EPOCH >= 1, "OPTIM.MAX_EPOCH", cfg.OPTIM.MAX_EPOCH, "at least 1")

    def build_model(self) -> None:
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
        self.template_features = template_features(self.backbone, self.classnames, self.cfg.DATASET.TEMPLATE)
        self.build_training()

    def build_training(self) -> None:
        """Prompts first: an error in their settings shows before hours of generation."""
        self.build_prompts()
        self.prepare()

    def prepare(self) -> None:
        """Set the feature table that the prompts are trained on: the unlabelled images."""
        self.table = self.unlabelled.table

    @functools.cached_property
    def unlabelled(self) -> UnlabelledImages:
        """The unlabelled images, their features in V views and their zero-shot probabilities."""
        options = self._extraction("features of train", views=self.cfg.TRAINER.PROMPT.VIEWS)
        with self.stages.stage(options["title"]) as stage:
            paths = unlabelled_paths(self.dm.dataset)
            images, stage.cached = look_at_unlabelled(self.backbone, paths, self.template_features, **options)
        return images

    def features(self, paths: list[str], *, name: str, views: int = 1) -> FeatureTable:
        """A feature table, as a stage of its own; views beyond the first follow INPUT.TRANSFORMS."""
        with self.stages.stage(name) as stage:
            table, stage.cached = extract_features(self.backbone, paths, **self._extraction(name, views=views))
        return table

    def training_table(self, paths: list[str], *, name: str, views: int) -> FeatureTable:
        """The table of images that the prompts are trained on: what `self.model.logits` takes, with its views.

        Args:
            paths: N image files.
            name: of the stage, for instance "features of train".
            views: of an image, the plain one included; those beyond the first follow INPUT.TRANSFORMS.
        """
        return self.features(paths, name=name, views=views)

    def _extraction(self, title: str, *, views: int) -> dict[str, Any]:
        """Arguments of `extract_features`."""
        return {
            "store": self.store,
            "views": views,
            "augment": self._augmentation() if views > 1 else None,
            "batch_size": self.cfg.DATALOADER.TEST.BATCH_SIZE,
            "workers": self.cfg.DATALOADER.NUM_WORKERS,
            "title": title,
        }

    def _augmentation(self) -> Callable[[Any], Tensor]:
        """INPUT.TRANSFORMS, with the size, mean and standard deviation of the backbone.

        Raises:
            UserError: the config names others, for which the backbone is not made.
        """
        prepared, size = preprocessing_of(self.backbone), self.backbone.image_size
        cfg, default = self.cfg.clone(), get_cfg_default()
        cfg.defrost()
        for key, value in (("SIZE", (size, size)), ("PIXEL_MEAN", prepared["mean"]), ("PIXEL_STD", prepared["std"])):
            if value is None:  # pixels are not normalised
                continue
            if list(cfg.INPUT[key]) not in (list(default.INPUT[key]), list(value)):
                raise UserError(f"INPUT.{key} is {cfg.INPUT[key]}; {self.backbone.name} takes {value}: leave it out")
            cfg.INPUT[key] = value
        return build_transform(cfg, is_train=True)

    def build_prompts(self) -> None:
        """Make the prompts and their optimiser."""
        prompt = self.cfg.TRAINER.PROMPT
        members = [
            PromptLearner(
                self.backbone,
                self.classnames,
                n_ctx=prompt.N_CTX,
                ctx_init=prompt.CTX_INIT,
                class_specific=prompt.CSC,
                position=prompt.CLASS_TOKEN_POSITION,
                generator=torch.Generator().manual_seed(stable_seed("context", self.seed, *member_seed(member))),
            )
            for member in range(prompt.ENSEMBLE)
        ]
        learner = PromptEnsemble(members) if len(members) > 1 else members[0]
        self.model = PromptedCLIP(self.backbone, learner)
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
        """What `losses` gets as its batch: a place to add tensors that differ from step to step."""
        return batch

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
        learners = [part for part in model.modules() if isinstance(part, PromptLearner)]
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

    def head_probs(self, features: Tensor) -> dict[str, Tensor]:
        """(N, D) unit features to the (N, C) probabilities of every head."""
        return {"text": self.model(features).softmax(dim=1)}

    def model_inference(self, input: Tensor) -> Tensor:
        """(B, 3, H, W) pixels or (B, D) features to the primary classifier's (B, C) scores."""
        return self.head_probs(self.backbone.encode_images(input) if input.ndim == 4 else input)[self.primary]

    @torch.no_grad()
    def test(self, split: str | None = None) -> float | None:
        """Evaluate every head, the primary classifier last; returns its accuracy (trzsl: H) in percent or None."""
        self.set_model_mode("eval")
        split = split or self.cfg.TEST.SPLIT
        data = self.dm.dataset.val if split == "val" and self.dm.dataset.val else self.dm.dataset.test
        paths = [item.impath for item in data]
        table = self.features(paths, name=f"features of {split}")
        labelled = all(item.label >= 0 for item in data)
        labels = torch.tensor([item.label for item in data], device=self.device) if labelled else None
        seen = seen_classes(self.dm.dataset)
        plain = self.head_probs(table.plain)
        heads = refined_heads(self, table.plain, plain)
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
            self.diagnose(plain, table.plain, labels)
        harmonic, accuracy = (self.results[self.primary].get(name) for name in ("harmonic", "accuracy"))
        return accuracy if harmonic is None else harmonic

    def diagnose(self, heads: dict[str, Tensor], features: Tensor, labels: Tensor) -> None:
        """A place for metrics of the (N, C) heads, (N, D) test features and (N,) labels; they choose nothing."""

    def metrics(self) -> dict[str, Any]:
        """More that belongs into result.json."""
        return {"pseudo_labels": {"selected": 0, "coverage": 0.0, "accuracy": None}, "rounds": []}

    def hidden_labels(self) -> Tensor | None:
        """(N,) true classes of the unlabelled images, for metrics after training only; None where they are unknown."""
        true = getattr(self.dm.dataset, "hidden_labels", None)
        return torch.tensor([true[path] for path in self.unlabelled.paths]) if true else None
