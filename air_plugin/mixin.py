"""The auxiliary classifier as a mixin over any Dassl trainer: `class Mine(AuxiliaryMixin, TheirTrainer)`."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from air_plugin.auxiliary.build import Auxiliary, build_auxiliary, followed
from air_plugin.auxiliary.host import ImageModel, Tally, Tower, require_logits, same_tower, unit, uses
from air_plugin.clip.backbone import Backbone
from air_plugin.clip.loading import load_backbone
from air_plugin.clip.zero_shot import (
    UnlabelledImages,
    look_at_unlabelled,
    measured_images,
    template_features,
    unlabelled_paths,
)
from air_plugin.config import AirSettings, require_ranges, template_of
from air_plugin.functional.fusion import fuse
from air_plugin.settings import DropInSettings, RunSettings
from air_plugin.utils.errors import UserError
from air_plugin.utils.logs import show_logs
from air_plugin.utils.provenance import Stages
from air_plugin.utils.seeding import randomness_kept
from air_plugin.utils.store import NotStored, Store

log = logging.getLogger(__name__)

SAMPLES = 8  # kept images that are compared to find out whether the tower has changed

_Host: Any = object  # a Dassl trainer; the library imports none


class AuxiliaryMixin(_Host):
    """Fuses the auxiliary classifier into prediction, p* = p + lambda p^, and into pseudo-labels (AiR, PLG).

    Goes before a Dassl trainer that has `cfg` (with `add_air_config`'s keys), `dm`, `model` and `model_inference`. It
    changes nothing of the training: the generator is adapted and images are generated before the first epoch, and the
    trainer's random numbers stay the same. Weights that are loaded without training (--eval-only) are evaluated with
    artifacts that are in the store already. A model without `image_encoder` and `dtype`, or whose encoder takes more
    than pixels, needs `image_features` overridden.

    A trainer with `pseudo_probs() -> (N, C)` sets `paths` in `build_model`: the N image files in the order of the rows.

    Example:
        >>> @TRAINER_REGISTRY.register()
        ... class CoOpAiR(AuxiliaryMixin, CoOp):
        ...     "CoOp with the auxiliary classifier."
    """

    air: AirSettings
    unlabelled: UnlabelledImages
    classnames: list[str]
    _checked = _evaluates = _begun = False
    _tally: Tally | None = None  # of the test that runs
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
        """Build the host's model, and try on one image what is needed later: errors show before hours of work."""
        super().build_model()
        if not logging.getLogger("air_plugin").hasHandlers():
            show_logs()  # the host's train.py does not show ours
        with randomness_kept(), torch.no_grad():
            self.check_host()
        self._checked = True

    @functools.cached_property
    def auxiliary(self) -> Auxiliary:
        """The auxiliary classifier; made when it is first needed, which is before the first epoch or in a test."""
        with randomness_kept(), torch.inference_mode(False), torch.enable_grad():
            self.build_auxiliary()
        return vars(self)["auxiliary"]

    def build_auxiliary(self) -> None:
        """Make the auxiliary classifier, or take it from the store; sets `auxiliary`.

        Raises:
            UserError: a checkpoint is evaluated, and the store has no artifacts of these classes and images.
        """
        cfg = self.cfg
        store = Store(cfg.AIR.CACHE or Path(cfg.OUTPUT_DIR) / "cache", read_only=self._evaluates)
        backbone = self._load_backbone()
        try:
            self.unlabelled, _ = look_at_unlabelled(
                backbone,
                self._unlabelled_paths(),
                template_features(backbone, self.classnames, template_of(cfg)),
                store=store,
                batch_size=cfg.DATALOADER.TEST.BATCH_SIZE,
                workers=cfg.DATALOADER.NUM_WORKERS,
            )
            self.auxiliary = build_auxiliary(
                backbone, self.classnames, self.unlabelled, settings=self.air, store=store, stages=Stages()
            )
        except NotStored as error:
            raise self._not_stored(error) from error

    def _not_stored(self, error: NotStored) -> UserError:
        return UserError(
            f"{self._name}: a checkpoint is evaluated, for which nothing is trained or generated, but {error}; name "
            "the store of the training run with AIR.CACHE, or fill it: the same command without --model-dir"
        )

    def _load_backbone(self) -> Backbone:
        name = self.cfg.AIR.BACKBONE or self.cfg.MODEL.BACKBONE.NAME
        precision = self.cfg.AIR.BACKBONE_PRECISION  # without autocast: the host's tower must give the same features
        return load_backbone(name, precision=precision, autocast=False, device=self.device)

    def _unlabelled_paths(self) -> list[str]:
        """The unlabelled images: those of the host's pseudo-labels, or of the data set."""
        if not hasattr(super(), "pseudo_probs"):
            return unlabelled_paths(self.dm.dataset)
        measured = measured_images(self.dm.dataset, self.paths)
        if measured:
            raise UserError(
                f"{self._name}: {len(measured):,} of the {len(self.paths):,} images of self.paths are in test or val; "
                "nothing may be adapted to these"
            )
        log.info("unlabelled: %s images of self.paths", f"{len(self.paths):,}")
        return self.paths

    # The host, tried on one image

    def check_host(self) -> None:
        """Refuse a host that the auxiliary classifier cannot be used with; no state of the host changes."""
        dataset = self.dm.dataset
        self.classnames = list(dataset.classnames)
        if hasattr(super(), "pseudo_probs") and not hasattr(self, "paths"):
            raise UserError(
                f"{self._name} has pseudo_probs, but no self.paths; set it in build_model: "
                "the image files, in the order of the rows"
            )
        path = dataset.train_x[0].impath
        self._tower.encode([path])
        try:
            logits = self._tower.scores(super().model_inference, path)
        except Exception as error:  # it may need what the host makes later, in before_train
            log.warning("%s: model_inference cannot be tried before training: %s", self._name, error)
        else:
            require_logits(self._name, logits, (1, len(self.classnames)))
        if not self._any_tower:
            backbone, size = self._load_backbone(), self.air.size if self.air.prototypes == "synthetic" else None
            if self._tower.is_trained(path) or not self._tower.is_backbones(backbone, path, size=size):
                raise self._other_tower()
        hosts = type(self).__mro__
        if not uses(hosts[hosts.index(AuxiliaryMixin) + 1 :], "test", "model_inference"):
            log.warning(
                "%s: its test() does not name model_inference; where it does not call it, nothing is fused, and the "
                "test ends in an error; see docs/drop-in.md",
                self._name,
            )

    @property
    def _any_tower(self) -> bool:
        """Whether the auxiliary classifier can be used in the features of another tower than the frozen backbone."""
        return self.air.auxiliary == "cosine" and self.air.weight is not None

    def _other_tower(self) -> UserError:
        return UserError(
            f"{self._name}: its image tower is not the frozen backbone, or is trained; AIR.AUXILIARY gaussian and "
            "AIR.LAMBDA auto are made for it; set cosine and a number"
        )

    # When it is made

    def before_train(self) -> None:
        self._evaluates, self._begun = False, True
        super().before_train()  # a checkpoint to resume from that does not fit is refused first
        _ = self.auxiliary

    def load_model(self, directory: str, *args: Any, **kwargs: Any) -> Any:
        """Load weights. Outside of training this begins an evaluation, for which the store must have everything."""
        loaded = super().load_model(directory, *args, **kwargs)
        self._evaluates = bool(directory and self.get_model_names()) and not self._begun
        return loaded

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
        current = self._current or self.refresh()
        with self._tower.recording() as outputs:
            logits = super().model_inference(input, *args, **kwargs)
        require_logits(self._name, logits, (len(input), len(self.classnames)))
        fused = current.classifier.fuse(logits, self._features(input, outputs))
        if self._tally is not None:
            self._tally.predict(logits, fused)
        return fused

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
        if not self._checked:
            raise UserError(
                f"{self._name}: pseudo_probs is called within build_model, before the trainer is checked; call it in "
                "before_train"
            )
        _ = self.auxiliary  # with it come the unlabelled images
        count = len(self.unlabelled.paths)
        if probs.shape != (count, len(self.classnames)):
            raise UserError(
                f"{self._name}: pseudo_probs returns {tuple(probs.shape)}, not {count} images "
                f"(self.paths) by {len(self.classnames)} classes"
            )
        return self.fused(probs, self.unlabelled.features)

    @torch.no_grad()
    def test(self, *args: Any, **kwargs: Any) -> Any:
        """The host's test, with fused predictions; logs lambda and the accuracy of both, from the same pass.

        Raises:
            UserError: the host's test did not call model_inference, so that nothing was fused.
        """
        current = self.refresh()
        tally, outer = Tally(), self._tally
        self._tally = tally
        try:
            with tally.watching(getattr(self, "evaluator", None)):
                result = super().test(*args, **kwargs)
        finally:
            self._tally = outer
        if not tally.calls:
            raise UserError(
                f"{self._name}: test() did not call model_inference, so nothing was fused, and its result is the "
                "trainer's own; let test() take its predictions from model_inference, see docs/drop-in.md"
            )
        if outer is not None:
            outer.calls += tally.calls  # a test within a test
        log.info("%s: lambda %g: %s", self._name, current.classifier.fusion_weight, tally)
        return result

    # The trainer's image tower

    @property
    def _tower(self) -> Tower:
        return Tower(self)

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
        if not same_tower(self._tower.encode([paths[i] for i in some]), prototypes.features.flatten(0, 1)[some]):
            if not self._any_tower:
                raise self._other_tower()
            features = self._tower.encode(paths).unflatten(0, prototypes.kept.shape)
            current = followed(current, features)
        self._current = current
        return current

    def _features(self, images: Tensor, outputs: list[Any]) -> Tensor:
        """(B, D) unit features: the recorded output where it equals them, which is compared once after a refresh."""
        single = outputs[0] if len(outputs) == 1 and self._reusable is not False else None
        if not isinstance(single, Tensor) or single.ndim != 2 or len(single) != len(images):
            return self._tower.unit_features(images)
        features = unit(single)
        if self._reusable is None:
            self._reusable = same_tower(self._tower.unit_features(images), features)
        return features if self._reusable else self._tower.unit_features(images)


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
