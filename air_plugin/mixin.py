"""The auxiliary classifier as a mixin over any Dassl trainer: `class Mine(AuxiliaryMixin, TheirTrainer)`."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from air_plugin.auxiliary import Auxiliary, auxiliary_of_real_images, build_auxiliary
from air_plugin.backbone import load_backbone
from air_plugin.config import AirSettings, require_template
from air_plugin.errors import UserError
from air_plugin.features import extract_features
from air_plugin.images import load_rgb
from air_plugin.prompts import fill
from air_plugin.provenance import Stages
from air_plugin.pseudo_labels import fuse
from air_plugin.store import Store

LAMBDAS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
SAME = 0.999  # cosine of two features of one image, above which one tower made both; fp16 stays above it

_Host: Any = object  # a Dassl trainer; the library imports none


class ImageModel(Protocol):
    """What the models of CoOp's family have, and all that `image_features` needs of one by default."""

    image_encoder: nn.Module  # (B, 3, H, W) pixels to (B, D) features
    dtype: torch.dtype  # of the pixels


class AuxiliaryMixin(_Host):
    """Fuses the auxiliary classifier into prediction, and into pseudo-labels where the trainer has them (AiR, PLG).

    Stands before a Dassl trainer that has `cfg` (with `add_air_config`'s keys), `dm`, `model` and `model_inference`,
    and changes nothing of its training: the generator is adapted and the images are drawn once the model is built, and
    no random number of the trainer's is used up. A model without `image_encoder` and `dtype`, or whose encoder takes
    more than pixels, needs `image_features` overridden.

    A trainer may have several heads over cached features, as ours have (`head_probs`). Then the fused one stands beside
    the others, and the cached features are used.
    """

    auxiliary: Auxiliary
    air: AirSettings
    headline: str = "fused"
    by_lambda: list[tuple[float, float]] | None = None
    _heard_is_right: bool | None = None  # whether what leaves model.image_encoder is image_features; None: not known

    def check_cfg(self, cfg: Any) -> None:
        super().check_cfg(cfg)
        self.air = AirSettings.from_cfg(cfg)
        require_template("DATASET.TEMPLATE", cfg.DATASET.TEMPLATE)

    def build_model(self) -> None:
        super().build_model()
        with _randomness_as_it_was():
            self.build_auxiliary()

    def build_auxiliary(self) -> None:
        """Make the auxiliary classifier, or take it from the store."""
        if not hasattr(self, "stages"):
            self.stages = Stages()
            self.store = Store(self.cfg.AIR.CACHE or Path(self.cfg.OUTPUT_DIR) / "cache")
            self.classnames = list(self.dm.dataset.classnames)
        backbone = getattr(self, "backbone", None) or load_backbone(
            self.cfg.MODEL.BACKBONE.NAME, precision=self.cfg.TRAINER.PROMPT.PREC, device=self.device
        )
        if not hasattr(self, "zero_shot_probs"):
            self.look_at_unlabelled(backbone)
        if self.air.source == "real":
            with self.stages.stage("prototypes"):
                self.auxiliary = auxiliary_of_real_images(
                    self.paths, self.unlabelled.plain, self.zero_shot_probs,
                    settings=self.air, logit_scale=backbone.logit_scale,
                )  # fmt: skip
            return
        self.auxiliary = build_auxiliary(
            backbone, self.classnames, self.paths,
            probs=self.zero_shot_probs, settings=self.air, store=self.store, stages=self.stages,
        )  # fmt: skip

    def look_at_unlabelled(self, backbone: Any) -> None:
        """The unlabelled images, their features and zero-shot probabilities; training images lose their labels."""
        if hasattr(super(), "look_at_unlabelled"):
            return super().look_at_unlabelled()
        data = self.dm.dataset
        self.paths = sorted(item.impath for item in data.train_u or data.train_x)  # an order that no label decides
        self.unlabelled, _ = extract_features(backbone, self.paths, store=self.store)
        texts = [fill(self.cfg.DATASET.TEMPLATE, name) for name in self.classnames]
        self.zero_shot_probs = backbone.text_probs(self.unlabelled.plain, backbone.encode_texts(texts))

    # Any trainer

    def image_features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) images, as the trainer's test transform makes them, to (B, D) features of its image tower.

        Their length does not matter. Override it where `model` is no ImageModel.
        """
        model: ImageModel = getattr(self.model, "module", self.model)  # of DataParallel
        try:
            return model.image_encoder(images.type(model.dtype))
        except (AttributeError, TypeError) as error:
            raise UserError(
                f"{type(self).__name__} cannot find image features: {type(model).__name__} gives none for "
                f"model.image_encoder(images.type(model.dtype)) ({error}); override image_features(images), see "
                "docs/drop-in.md"
            ) from error

    def model_inference(self, input: Tensor) -> Tensor:
        """(B, 3, H, W) images to (B, C) log p*, which stand where the trainer's logits stood."""
        if hasattr(super(), "head_probs"):
            return super().model_inference(input)  # its heads, below, are fused
        with self._listening() as heard:
            logits = super().model_inference(input)
        if not isinstance(logits, Tensor) or logits.shape != (len(input), len(self.classnames)):
            raise UserError(f"{type(self).__name__}: model_inference must give ({len(input)}, {len(self.classnames)}) "
                            "logits, images by classes")
        return self.auxiliary.classifier.fuse(logits, self._features(input, heard), weight=self.air.weight)

    @torch.no_grad()
    def test(self, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(super(), "head_probs"):
            self.set_model_mode("eval")
            self.refresh()
        return super().test(*args, **kwargs)

    def refresh(self) -> None:
        """See the kept images with the trainer's image tower as it is now, where that is not what they were seen with.

        Training may change the tower (MaPLe), and a trainer may prepare images in another way than the backbone.
        """
        self._heard_is_right = None
        kept = self.auxiliary.kept.tolist()
        paths = [self.auxiliary.images[c][k] for c, row in enumerate(kept) for k in row]
        known = self.auxiliary.prototypes.flatten(0, 1)
        some = range(0, len(paths), max(1, len(paths) // 8))
        seen = self._encode([paths[i] for i in some])
        if seen.shape[1] == known.shape[1] and bool(((seen * known[some].to(seen)).sum(dim=1) > SAME).all()):
            return
        prototypes = self._encode(paths).unflatten(0, self.auxiliary.kept.shape)
        classifier = type(self.auxiliary.classifier).from_prototypes(
            prototypes, scale=self.auxiliary.classifier.scale
        )
        self.auxiliary = replace(self.auxiliary, classifier=classifier, prototypes=prototypes)

    def _encode(self, paths: Sequence[Path]) -> Tensor:
        """(n, D) unit features of image files, seen as the trainer sees test images."""
        loader = self.dm.test_loader
        parts = []
        for start in range(0, len(paths), loader.batch_size):
            images = [loader.dataset.transform(load_rgb(path)) for path in paths[start : start + loader.batch_size]]
            parts.append(_unit(self.image_features(torch.stack(images).to(self.device))))
        return torch.cat(parts)

    @contextmanager
    def _listening(self) -> Iterator[list[Tensor]]:
        """What leaves the model's image encoder meanwhile, so that no image is encoded twice."""
        heard: list[Tensor] = []
        encoder = getattr(getattr(self.model, "module", self.model), "image_encoder", None)
        if not isinstance(encoder, nn.Module):
            yield heard
            return
        hook = encoder.register_forward_hook(lambda module, inputs, output: heard.append(output))
        try:
            yield heard
        finally:
            hook.remove()

    def _features(self, images: Tensor, heard: list[Tensor]) -> Tensor:
        """(B, D) unit features: what was heard where that is the same, which is looked at once after every refresh."""
        single = heard[0] if len(heard) == 1 else None
        if self._heard_is_right is False or not isinstance(single, Tensor) or single.shape[:-1] != (len(images),):
            return _unit(self.image_features(images))
        features = _unit(single)
        if self._heard_is_right is None:
            own = _unit(self.image_features(images))
            self._heard_is_right = own.shape == features.shape and bool(((own * features).sum(dim=1) > SAME).all())
            return own
        return features

    # Trainers with pseudo-labels, and with heads over cached features

    def pseudo_probs(self) -> Tensor:
        """(N, C) p* of the unlabelled images."""
        return self.fused(super().pseudo_probs(), self.unlabelled.plain)

    def fused(self, text_probs: Tensor, features: Tensor) -> Tensor:
        """p* from (N, C) text probabilities and the (N, D) features behind them."""
        return fuse(text_probs, self.auxiliary.classifier.probs(features), weight=self.air.weight)

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
            for weight in sorted({*LAMBDAS, self.air.weight})
        ]

    def figures(self) -> dict[str, Any]:
        return {**super().figures(), "by_lambda": self.by_lambda}


def augment(trainer: type) -> type:
    """A Dassl trainer's class with the auxiliary classifier, called `<its name>+AiR`.

    Raises:
        UserError: it has one already.
    """
    if issubclass(trainer, AuxiliaryMixin):
        raise UserError(f"trainer {trainer.__name__} has the auxiliary classifier already; leave +AiR out")
    return type(f"{trainer.__name__}+AiR", (AuxiliaryMixin, trainer), {"__doc__": trainer.__doc__})


def _unit(features: Tensor) -> Tensor:
    return nn.functional.normalize(features.float(), dim=1)


@contextmanager
def _randomness_as_it_was() -> Iterator[None]:
    """Put the global random states back, so that a trainer draws what it would have drawn without us."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
