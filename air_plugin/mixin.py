"""The auxiliary classifier as a mixin over any Dassl trainer: `class Mine(AuxiliaryMixin, TheirTrainer)`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from air_plugin.auxiliary.build import Auxiliary, build_auxiliary
from air_plugin.auxiliary.classifier import AuxiliaryClassifier
from air_plugin.clip.backbone import Backbone
from air_plugin.clip.features import extract_features
from air_plugin.clip.loading import load_backbone
from air_plugin.config import AirSettings
from air_plugin.functional.fusion import fuse
from air_plugin.utils.checks import require_template
from air_plugin.utils.class_names import fill
from air_plugin.utils.errors import UserError
from air_plugin.utils.images import READERS, load_rgb
from air_plugin.utils.provenance import Stages
from air_plugin.utils.seeding import randomness_kept
from air_plugin.utils.store import Store

LAMBDAS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
SAME = 0.9995  # cosine of two features of one image, above which one tower made both, be it in fp32, fp16 or bf16
SAMPLES = 8  # kept images that are looked at to tell whether the tower has changed

_Host: Any = object  # a Dassl trainer; the library imports none


class ImageModel(Protocol):
    """What the models of CoOp's family have, and all that `image_features` needs of one by default."""

    image_encoder: nn.Module  # (B, 3, H, W) pixels to (B, D) features
    dtype: torch.dtype  # of the pixels


class AuxiliaryMixin(_Host):
    """Fuses the auxiliary classifier into prediction, and into pseudo-labels where the trainer has them (AiR, PLG).

    Stands before a Dassl trainer that has `cfg` (with `add_air_config`'s keys), `dm`, `model` and `model_inference`,
    and changes nothing of its training: the generator is adapted and images are generated once the model is built, and
    no random number of the trainer's is used up. A model without `image_encoder` and `dtype`, or whose encoder takes
    more than pixels, needs `image_features` overridden.

    A trainer may have several heads over cached features, as ours have (`head_probs`). Then the fused one stands beside
    the others, AIR.PRIMARY chooses among them, and the cached features are used.

    A trainer with `pseudo_probs() -> (N, C)` says with `paths` whose these are: N image files in the order of the rows.
    """

    auxiliary: Auxiliary
    air: AirSettings
    primary: str = "fused"
    by_lambda: list[tuple[float, float]] | None = None
    _seen: Auxiliary | None = None  # the auxiliary classifier as the trainer's own tower sees its images
    _heard_is_right: bool | None = None  # whether what leaves model.image_encoder is image_features; None: not known

    def check_cfg(self, cfg: Any) -> None:
        super().check_cfg(cfg)
        if "AIR" not in cfg:
            raise UserError(
                "the config has no section AIR; call air_plugin.config.add_air_config(cfg) where the "
                "trainers' keys are added (CoOp: extend_cfg in train.py)"
            )
        self.air = AirSettings.from_cfg(cfg)
        require_template("DATASET.TEMPLATE", cfg.DATASET.TEMPLATE)
        if self._has_heads:
            self.primary = self.air.primary

    @property
    def _has_heads(self) -> bool:
        return hasattr(super(), "head_probs")

    def build_model(self) -> None:
        super().build_model()
        with randomness_kept():
            if not self._has_heads:
                self._encode([self.dm.dataset.train_x[0].impath])  # what is wrong shows before hours of generation
            self.build_auxiliary()

    def build_auxiliary(self) -> None:
        """Make the auxiliary classifier, or take it from the store."""
        if not isinstance(getattr(self, "store", None), Store):
            self.stages = Stages()
            self.store = Store(self.cfg.AIR.CACHE or Path(self.cfg.OUTPUT_DIR) / "cache")
        if not hasattr(self, "classnames"):
            self.classnames = list(self.dm.dataset.classnames)
        backbone = getattr(self, "backbone", None)
        if not isinstance(backbone, Backbone):
            prompt = self.cfg.TRAINER.PROMPT
            backbone = load_backbone(self.cfg.MODEL.BACKBONE.NAME, precision=prompt.PREC, device=self.device)
        if not hasattr(super(), "look_at_unlabelled"):
            self._look_at_unlabelled(backbone)
        elif not hasattr(self, "zero_shot_probs"):
            self.look_at_unlabelled()
        self.auxiliary = build_auxiliary(
            backbone,
            self.classnames,
            self.paths,
            features=self.unlabelled.plain,
            probs=self.zero_shot_probs,
            settings=self.air,
            store=self.store,
            stages=self.stages,
        )

    def _look_at_unlabelled(self, backbone: Backbone) -> None:
        """The unlabelled images, their features and zero-shot probabilities; training images lose their labels."""
        if not hasattr(super(), "pseudo_probs"):
            data = self.dm.dataset
            self.paths = sorted(item.impath for item in data.train_u or data.train_x)  # an order that no label decides
        elif not hasattr(self, "paths"):
            raise UserError(
                f"{self._name} has pseudo_probs, but does not say whose; set self.paths in build_model: "
                "the image files, in the order of its rows"
            )
        loading = self.cfg.DATALOADER
        self.unlabelled, _ = extract_features(
            backbone, self.paths, store=self.store, batch_size=loading.TEST.BATCH_SIZE, workers=loading.NUM_WORKERS
        )
        texts = [fill(self.cfg.DATASET.TEMPLATE, name) for name in self.classnames]
        self.zero_shot_probs = backbone.text_probs(self.unlabelled.plain, backbone.encode_texts(texts))

    @property
    def _name(self) -> str:
        return type(self).__name__

    # Any trainer

    def image_features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) images, as the trainer's test transform makes them, to (B, D) features of its image tower.

        Their length does not matter. Override it where `model` is no ImageModel.
        """
        model: ImageModel = getattr(self, "model", None)  # type: ignore[assignment]
        model = getattr(model, "module", model)  # of DataParallel
        try:
            return model.image_encoder(images.type(model.dtype))
        except (AttributeError, TypeError) as error:
            raise UserError(
                f"{self._name} finds no image features: model.image_encoder(images.type(model.dtype)) of "
                f"{type(model).__name__} fails ({error}); override image_features(images), see docs/drop-in.md"
            ) from error

    def model_inference(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B, 3, H, W) images to (B, C) log p*, which stand where the trainer's logits stood."""
        if self._has_heads:
            return super().model_inference(input, *args, **kwargs)  # its heads, below, are fused
        with self._listening() as heard:
            logits = super().model_inference(input, *args, **kwargs)
        wanted = (len(input), len(self.classnames))
        if not isinstance(logits, Tensor) or logits.shape != wanted:
            given = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise UserError(
                f"{self._name}: model_inference gives {given}, not {wanted} logits, images by classes; let "
                "the trainer's own give these alone"
            )
        seen = self._seen or self.refresh()
        return seen.classifier.fuse(logits, self._features(input, heard))

    @torch.no_grad()
    def test(self, *args: Any, **kwargs: Any) -> Any:
        if not self._has_heads:
            self.refresh()
        return super().test(*args, **kwargs)

    @torch.no_grad()
    def refresh(self) -> Auxiliary:
        """See the kept images with the trainer's image tower as it is now, where that is not what they were seen with.

        Training may change the tower (MaPLe), and a trainer may prepare images in another way than the backbone.
        Pseudo-labels have features of the backbone and stay with `auxiliary`.
        """
        self._heard_is_right = None
        seen = self._seen or self.auxiliary
        paths = [seen.images[c][k] for c, row in enumerate(seen.kept.tolist()) for k in row]
        some = list(range(0, len(paths), max(1, len(paths) // SAMPLES)))
        if not _same(self._encode([paths[i] for i in some]), seen.prototypes.flatten(0, 1)[some]):
            if self.air.auxiliary != "cosine" or self.air.weight is None:
                raise UserError(
                    f"{self._name}: its image tower is not the frozen backbone, for which AIR.AUXILIARY "
                    "gaussian and AIR.LAMBDA auto are made; set cosine and a number"
                )
            prototypes = self._encode(paths).unflatten(0, seen.kept.shape)
            former = seen.classifier
            head = AuxiliaryClassifier.from_prototypes(prototypes, scale=former.scale)
            card = {**former.card, "backbone_fingerprint": None}  # its features are the trainer's alone
            head = replace(head, fusion_weight=former.fusion_weight, card=card)
            seen = replace(seen, classifier=head, prototypes=prototypes)
        self._seen = seen
        return seen

    @torch.no_grad()
    def _encode(self, paths: Sequence[str | Path]) -> Tensor:
        """(n, D) unit features of image files, seen as the trainer sees test images."""
        transform, size = self._test_transform(), self.cfg.DATALOADER.TEST.BATCH_SIZE
        parts = []
        with ThreadPoolExecutor(READERS) as pool, _evaluating(getattr(self, "model", None)):
            for start in range(0, len(paths), size):
                images = list(pool.map(lambda path: transform(load_rgb(path)), paths[start : start + size]))
                parts.append(self._own_features(torch.stack(images).to(self.device)))
        return torch.cat(parts)

    def _test_transform(self) -> Callable[[Any], Tensor]:
        transform = getattr(self.dm.test_loader.dataset, "transform", None)
        if not callable(transform):
            raise UserError(
                f"{self._name}: dm.test_loader.dataset.transform is {type(transform).__name__}, not one "
                "transform of test images, with which the generated ones are seen, too"
            )
        return transform

    def _own_features(self, images: Tensor) -> Tensor:
        """(B, D) unit features, encoded for us."""
        features = self.image_features(images)
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(images):
            given = tuple(features.shape) if isinstance(features, Tensor) else f"a {type(features).__name__}"
            raise UserError(
                f"{self._name}: image_features gives {given} for {len(images)} images, not one row "
                "each; override it, see docs/drop-in.md"
            )
        return _unit(features)

    @contextmanager
    def _listening(self) -> Iterator[list[Any]]:
        """What leaves the model's image encoder meanwhile, so that no image is encoded twice."""
        heard: list[Any] = []
        model = getattr(self, "model", None)
        encoder = getattr(getattr(model, "module", model), "image_encoder", None)
        if not isinstance(encoder, nn.Module):
            yield heard
            return
        hook = encoder.register_forward_hook(lambda module, inputs, output: heard.append(output))
        try:
            yield heard
        finally:
            hook.remove()

    def _features(self, images: Tensor, heard: list[Any]) -> Tensor:
        """(B, D) unit features: what was heard where that is the same, which is looked at once after every refresh."""
        single = heard[0] if len(heard) == 1 and self._heard_is_right is not False else None
        if not isinstance(single, Tensor) or single.ndim != 2 or len(single) != len(images):
            return self._own_features(images)
        features = _unit(single)
        if self._heard_is_right is None:
            self._heard_is_right = _same(self._own_features(images), features)
        return features if self._heard_is_right else self._own_features(images)

    # Trainers with pseudo-labels, and with heads over cached features

    def pseudo_probs(self) -> Tensor:
        """(N, C) p* of the unlabelled images."""
        probs = super().pseudo_probs()
        if not hasattr(self, "auxiliary"):
            raise UserError(
                f"{self._name}: pseudo_probs is wanted before the auxiliary classifier is made, which is "
                "when build_model has ended; ask for it in before_train"
            )
        if probs.shape != (len(self.paths), len(self.classnames)):
            raise UserError(
                f"{self._name}: pseudo_probs gives {tuple(probs.shape)}, not {len(self.paths)} images "
                f"(self.paths) by {len(self.classnames)} classes"
            )
        return self.fused(probs, self.unlabelled.plain)

    def fused(self, text_probs: Tensor, features: Tensor) -> Tensor:
        """p* from (N, C) text probabilities and the (N, D) features behind them."""
        classifier = self.auxiliary.classifier
        return fuse(text_probs, classifier.probs(features), weight=classifier.fusion_weight)

    def head_probs(self, features: Tensor) -> dict[str, Tensor]:
        heads = super().head_probs(features)
        return {**heads, "fused": self.fused(heads["text"], features)}

    def diagnose(self, heads: dict[str, Tensor], features: Tensor, labels: Tensor) -> None:
        """Accuracy of the fused head for other lambdas; looked at afterwards, nothing is chosen by it."""
        super().diagnose(heads, features, labels)
        if self.cfg.TRAINER.TRANSCLIP.ENABLED:
            return  # its fused head is another one
        auxiliary = self.auxiliary.classifier.probs(features)
        self.by_lambda = [
            (weight, 100.0 * float((fuse(heads["text"], auxiliary, weight=weight).argmax(1) == labels).float().mean()))
            for weight in sorted({*LAMBDAS, self.auxiliary.classifier.fusion_weight})
        ]

    def metrics(self) -> dict[str, Any]:
        return {**super().metrics(), "by_lambda": self.by_lambda, "auxiliary": self._rounds()}

    def _rounds(self) -> list[dict[str, Any]]:
        """Of each round of drawing: figures, and the share of right labels, in percent, looked at afterwards."""
        known = self.hidden_labels()
        return [
            {
                "changed": done.changed,
                **done.figures,
                "accuracy": 100.0 * float((done.labels.cpu() == known).double().mean()) if known is not None else None,
            }
            for done in self.auxiliary.rounds
        ]


def augment(trainer: type) -> type:
    """A Dassl trainer's class with the auxiliary classifier, called `<its name>+AiR`.

    Raises:
        UserError: it has one already.
    """
    if issubclass(trainer, AuxiliaryMixin):
        raise UserError(f"trainer {trainer.__name__} has the auxiliary classifier already; leave +AiR out")
    body = {"__doc__": trainer.__doc__, "__module__": trainer.__module__}
    return type(f"{trainer.__name__}+AiR", (AuxiliaryMixin, trainer), body)


def _unit(features: Tensor) -> Tensor:
    return nn.functional.normalize(features.float(), dim=1)


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether one tower made both (n, D) unit features of the same images."""
    return one.shape == other.shape and bool(((one * other.to(one)).sum(dim=1) > SAME).all())


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """A model in evaluation mode for a while; then each of its parts has its own mode back."""
    modes = [(part, part.training) for part in model.modules()] if isinstance(model, nn.Module) else []
    if modes:
        model.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
