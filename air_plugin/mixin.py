"""The auxiliary classifier as a mixin over any Dassl trainer: `class Mine(AuxiliaryMixin, TheirTrainer)`."""

from __future__ import annotations

import logging
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
from air_plugin.clip.loading import load_backbone
from air_plugin.clip.zero_shot import UnlabelledImages, look_at_unlabelled, template_features, unlabelled_paths
from air_plugin.config import AirSettings, require_ranges, template_of
from air_plugin.functional.fusion import fuse
from air_plugin.settings import DropInSettings, RunSettings
from air_plugin.utils.errors import UserError
from air_plugin.utils.images import READERS, load_rgb
from air_plugin.utils.logs import show_logs
from air_plugin.utils.provenance import Stages
from air_plugin.utils.seeding import randomness_kept
from air_plugin.utils.store import Store

SAME = 0.9995  # cosine of two features of one image, above which one tower made both, be it in fp32, fp16 or bf16
SAMPLES = 8  # kept images that are compared to find out whether the tower has changed

_Host: Any = object  # a Dassl trainer; the library imports none


class ImageModel(Protocol):
    """What the models of CoOp's family have, and all that `image_features` needs of one by default."""

    image_encoder: nn.Module  # (B, 3, H, W) pixels to (B, D) features
    dtype: torch.dtype  # of the pixels


class AuxiliaryMixin(_Host):
    """Fuses the auxiliary classifier into prediction, p* = p + lambda p^, and into pseudo-labels (AiR, PLG).

    Goes before a Dassl trainer that has `cfg` (with `add_air_config`'s keys), `dm`, `model` and `model_inference`. It
    changes nothing of the training: the generator is adapted and images are generated once the model is built, and the
    trainer's random numbers stay the same. A model without `image_encoder` and `dtype`, or whose encoder takes more
    than pixels, needs `image_features` overridden.

    A trainer with `pseudo_probs() -> (N, C)` sets `paths` in `build_model`: the N image files in the order of the rows.

    Example:
        >>> @TRAINER_REGISTRY.register()
        ... class CoOpAiR(AuxiliaryMixin, CoOp):
        ...     "CoOp with the auxiliary classifier."
    """

    air: AirSettings
    auxiliary: Auxiliary
    unlabelled: UnlabelledImages
    classnames: list[str]
    _current: Auxiliary | None = None  # the auxiliary classifier in the features of the trainer's own tower
    _reusable: bool | None = None  # whether the output of model.image_encoder equals image_features; None: not compared

    def check_cfg(self, cfg: Any) -> None:
        super().check_cfg(cfg)
        if "AIR" not in cfg:
            raise UserError(
                "the config has no section AIR; call add_air_config(cfg) of air_plugin where the trainers' keys are "
                "added (CoOp: extend_cfg in train.py)"
            )
        require_ranges(cfg, "AIR", "DATALOADER", "SEED")
        self.air = AirSettings.from_cfg(cfg)
        RunSettings.from_cfg(cfg)
        DropInSettings.from_cfg(cfg)
        template_of(cfg)

    def build_model(self) -> None:
        super().build_model()
        with randomness_kept():
            self.build_auxiliary()

    def build_auxiliary(self) -> None:
        """Make the auxiliary classifier, or take it from the store."""
        if not logging.getLogger("air_plugin").hasHandlers():
            show_logs()  # the host's train.py does not show ours
        self._encode([self.dm.dataset.train_x[0].impath])  # an error shows before hours of generation
        cfg, dataset = self.cfg, self.dm.dataset
        if not hasattr(super(), "pseudo_probs"):
            paths = unlabelled_paths(dataset)
        elif hasattr(self, "paths"):
            paths = self.paths
        else:
            raise UserError(
                f"{self._name} has pseudo_probs, but no self.paths; set it in build_model: "
                "the image files, in the order of the rows"
            )
        store = Store(cfg.AIR.CACHE or Path(cfg.OUTPUT_DIR) / "cache")
        self.classnames = list(dataset.classnames)
        name = cfg.AIR.BACKBONE or cfg.MODEL.BACKBONE.NAME
        backbone = load_backbone(name, precision=cfg.AIR.BACKBONE_PRECISION, device=self.device)
        self.unlabelled, _ = look_at_unlabelled(
            backbone,
            paths,
            template_features(backbone, self.classnames, template_of(cfg)),
            store=store,
            batch_size=cfg.DATALOADER.TEST.BATCH_SIZE,
            workers=cfg.DATALOADER.NUM_WORKERS,
        )
        self.auxiliary = build_auxiliary(
            backbone, self.classnames, self.unlabelled, settings=self.air, store=store, stages=Stages()
        )

    @property
    def _name(self) -> str:
        return type(self).__name__

    # Prediction

    def image_features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) images, as the trainer's test transform makes them, to (B, D) features of its image tower.

        Their length does not matter. Override it where `model` is not an ImageModel.
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
        """(B, 3, H, W) images to (B, C) log p*, in place of the trainer's logits."""
        with self._recording() as outputs:
            logits = super().model_inference(input, *args, **kwargs)
        expected = (len(input), len(self.classnames))
        if not isinstance(logits, Tensor) or logits.shape != expected:
            given = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise UserError(
                f"{self._name}: model_inference returns {given}, not {expected} logits, images by classes; let "
                "the trainer's own return these alone"
            )
        current = self._current or self.refresh()
        return current.classifier.fuse(logits, self._features(input, outputs))

    def fused(self, text_probs: Tensor, features: Tensor) -> Tensor:
        """p* = p + lambda p^, normalised (AiR, PLG; functional/fusion.py).

        Args:
            text_probs: (N, C) p, rows sum to 1.
            features: (N, D) unit features of the backbone, of the same images.
        """
        classifier = self.auxiliary.classifier
        return fuse(text_probs, classifier.probs(features), weight=classifier.fusion_weight)

    def pseudo_probs(self) -> Tensor:
        """(N, C) p* of the unlabelled images."""
        probs = super().pseudo_probs()
        if not hasattr(self, "auxiliary"):
            raise UserError(
                f"{self._name}: pseudo_probs is called before the auxiliary classifier is made, which is "
                "when build_model has ended; call it in before_train"
            )
        count = len(self.unlabelled.paths)
        if probs.shape != (count, len(self.classnames)):
            raise UserError(
                f"{self._name}: pseudo_probs returns {tuple(probs.shape)}, not {count} images "
                f"(self.paths) by {len(self.classnames)} classes"
            )
        return self.fused(probs, self.unlabelled.features)

    # The trainer's image tower

    @torch.no_grad()
    def test(self, *args: Any, **kwargs: Any) -> Any:
        self.refresh()
        return super().test(*args, **kwargs)

    @torch.no_grad()
    def refresh(self) -> Auxiliary:
        """Encode the kept images anew where the trainer's image tower gives other features than it did.

        Training may change the tower (MaPLe), and a trainer may prepare images in another way than the backbone.
        Pseudo-labels have features of the backbone and stay with `auxiliary`.
        """
        self._reusable = None
        current = self._current or self.auxiliary
        prototypes = current.prototypes
        paths = prototypes.kept_images
        some = list(range(0, len(paths), max(1, len(paths) // SAMPLES)))
        if not _same(self._encode([paths[i] for i in some]), prototypes.features.flatten(0, 1)[some]):
            if self.air.auxiliary != "cosine" or self.air.weight is None:
                raise UserError(
                    f"{self._name}: its image tower is not the frozen backbone, for which AIR.AUXILIARY "
                    "gaussian and AIR.LAMBDA auto are made; set cosine and a number"
                )
            features = self._encode(paths).unflatten(0, prototypes.kept.shape)
            former = current.classifier
            head = AuxiliaryClassifier.from_prototypes(features, scale=former.scale)
            card = {**former.card, "backbone_fingerprint": None}  # no other tower makes such features
            head = replace(head, fusion_weight=former.fusion_weight, card=card)
            current = replace(current, classifier=head, prototypes=replace(prototypes, features=features))
        self._current = current
        return current

    @torch.no_grad()
    def _encode(self, paths: Sequence[str | Path]) -> Tensor:
        """(n, D) unit features of image files, prepared as the trainer's test images are."""
        transform, size = self._test_transform(), self.cfg.DATALOADER.TEST.BATCH_SIZE
        parts = []
        with ThreadPoolExecutor(READERS) as pool, _evaluating(getattr(self, "model", None)):
            for start in range(0, len(paths), size):
                images = list(pool.map(lambda path: transform(load_rgb(path)), paths[start : start + size]))
                parts.append(self._unit_features(torch.stack(images).to(self.device)))
        return torch.cat(parts)

    def _test_transform(self) -> Callable[[Any], Tensor]:
        transform = getattr(self.dm.test_loader.dataset, "transform", None)
        if not callable(transform):
            raise UserError(
                f"{self._name}: dm.test_loader.dataset.transform is {type(transform).__name__}, not one "
                "transform of test images, which the generated images need, too"
            )
        return transform

    def _unit_features(self, images: Tensor) -> Tensor:
        """(B, D) unit `image_features`."""
        features = self.image_features(images)
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(images):
            given = tuple(features.shape) if isinstance(features, Tensor) else f"a {type(features).__name__}"
            raise UserError(
                f"{self._name}: image_features returns {given} for {len(images)} images, not one row "
                "each; override it, see docs/drop-in.md"
            )
        return _unit(features)

    @contextmanager
    def _recording(self) -> Iterator[list[Any]]:
        """Record the outputs of the model's image encoder meanwhile, so that no image is encoded twice."""
        outputs: list[Any] = []
        model = getattr(self, "model", None)
        encoder = getattr(getattr(model, "module", model), "image_encoder", None)
        if not isinstance(encoder, nn.Module):
            yield outputs
            return
        hook = encoder.register_forward_hook(lambda module, inputs, output: outputs.append(output))
        try:
            yield outputs
        finally:
            hook.remove()

    def _features(self, images: Tensor, outputs: list[Any]) -> Tensor:
        """(B, D) unit features: the recorded output where it equals them, which is compared once after a refresh."""
        single = outputs[0] if len(outputs) == 1 and self._reusable is not False else None
        if not isinstance(single, Tensor) or single.ndim != 2 or len(single) != len(images):
            return self._unit_features(images)
        features = _unit(single)
        if self._reusable is None:
            self._reusable = _same(self._unit_features(images), features)
        return features if self._reusable else self._unit_features(images)


def augment(trainer: type, *, name: str = "") -> type:
    """A Dassl trainer's class with the auxiliary classifier.

    Its mixin is `AuxiliaryMixin`, or the class that the trainer's attribute `auxiliary_mixin` names.

    Args:
        trainer: a Dassl trainer's class.
        name: of the new class; empty: `<trainer's name>+AiR`. The trainer's own name serves where its code reads
            TRAINER.NAME; the new class then takes its place in the registry (`force`).

    Raises:
        UserError: the trainer has the auxiliary classifier already.

    Example:
        >>> TRAINER_REGISTRY.register(augment(CoOp))  # --trainer CoOp+AiR
        >>> TRAINER_REGISTRY.register(augment(PromptKD, name="PromptKD"), force=True)  # --trainer PromptKD
    """
    if issubclass(trainer, AuxiliaryMixin):
        raise UserError(f"trainer {trainer.__name__} has the auxiliary classifier already; leave +AiR out")
    mixin = getattr(trainer, "auxiliary_mixin", AuxiliaryMixin)
    body = {"__doc__": trainer.__doc__, "__module__": trainer.__module__}
    return type(name or f"{trainer.__name__}+AiR", (mixin, trainer), body)


def _unit(features: Tensor) -> Tensor:
    return nn.functional.normalize(features.float(), dim=1)


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether one tower made both (n, D) unit features of the same images."""
    return one.shape == other.shape and bool(((one * other.to(one)).sum(dim=1) > SAME).all())


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """A model in evaluation mode for a while; afterwards each of its parts is in its former mode."""
    modes = [(part, part.training) for part in model.modules()] if isinstance(model, nn.Module) else []
    if modes:
        model.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
