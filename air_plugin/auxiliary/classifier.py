"""The auxiliary classifier: one linear head over image features, and its file (AiR, ACG)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from air_plugin.functional.fusion import fuse
from air_plugin.utils.errors import UserError
from air_plugin.utils.files import to_json
from air_plugin.utils.tensors import save_tensors, tensor_digest, unit_rows

if TYPE_CHECKING:
    from air_plugin.clip.backbone import Backbone
    from air_plugin.config import AirSettings

HEADER = "air_classifier"  # the key of the JSON in a file's metadata
VERSION = 1  # of the file's form


@dataclass(frozen=True)
class AuxiliaryClassifier:
    """A linear head over unit image features, with its origin.

    weight: (C, D). For the paper's cosine form the mean, not re-normalised, of the K kept features: its product with f
        is the mean cosine to the K prototypes, exactly.
    bias: (C,), zero in the cosine form.
    scale: inverse temperature of the softmax that makes p^; None is the raw form, p^ = the score itself.
    fusion_weight: lambda of p* = p + lambda p^ (AiR, PLG), at least 0.
    card: its origin, JSON values only; see `make_card`.
    """

    weight: Tensor
    bias: Tensor
    scale: float | None
    fusion_weight: float = 1.0
    card: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_prototypes(cls, prototypes: Tensor, *, scale: float | None) -> AuxiliaryClassifier:
        """The cosine form, from (C, K, D) unit features (AiR, ACG)."""
        weight = unit_rows(prototypes, "prototypes").mean(dim=1)
        return cls(weight, weight.new_zeros(len(weight)), scale)

    def to(self, device: torch.device | str) -> AuxiliaryClassifier:
        """The same, on a device."""
        return replace(self, weight=self.weight.to(device), bias=self.bias.to(device))

    def scores(self, features: Tensor) -> Tensor:
        """(N, D) unit features to (N, C) scores a = f w + b; in the cosine form they lie in [-1, 1].

        Features of another length are normalised, with a warning; see `unit_rows`.
        """
        features = unit_rows(features, "images")
        return features @ self.weight.to(features).T + self.bias.to(features)

    def probs(self, features: Tensor) -> Tensor:
        """(N, D) unit features to (N, C) p^: rows sum to 1, or raw scores, cut at 0, where scale is None."""
        scores = self.scores(features)
        return scores.clamp(min=0) if self.scale is None else (self.scale * scores).softmax(dim=1)

    def fuse(self, text_logits: Tensor, features: Tensor, *, weight: float | None = None) -> Tensor:
        """Any classifier's logits to those of its fusion with this head: log p*, p* = p + lambda p^ (AiR, PLG).

        Args:
            text_logits: (N, C), of a classifier over the same classes in the same order; of any floating type.
            features: (N, D), unit rows: of the same images, by the frozen image tower that made this head.
            weight: lambda >= 0; None is `fusion_weight`.

        Returns:
            (N, C) in float32, finite: its softmax is p*, so it can stand wherever the logits stood.
        """
        weight = self.fusion_weight if weight is None else weight
        fused = fuse(text_logits.float().softmax(dim=1), self.probs(features.float()), weight=weight)
        return fused.clamp(min=torch.finfo(fused.dtype).tiny).log()

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all; the card stands in its header."""
        tensors = {"weight": self.weight, "bias": self.bias}
        header = {
            "version": VERSION,
            "scale": self.scale,
            "fusion_weight": self.fusion_weight,
            "card": dict(self.card),
            "digest": tensor_digest(tensors),
        }
        save_tensors(Path(path), tensors, metadata={HEADER: to_json(header)})

    @classmethod
    def load(
        cls, path: str | Path, *, classnames: Sequence[str] | None = None, backbone: Backbone | str | None = None
    ) -> AuxiliaryClassifier:
        """Read what `save` wrote; its tensors lie on the CPU.

        Args:
            path: the file.
            classnames: the classes that it must have, in this order.
            backbone: whose features it must be for, or that one's fingerprint.

        Raises:
            UserError: the file is missing, damaged or another one, or is for other classes or another backbone.
        """
        tensors, header = _read(Path(path))
        scale, weight, card = header["scale"], header["fusion_weight"], header["card"]
        if classnames is not None:
            _require_classes(path, card.get("classes"), list(classnames))
        if backbone is not None:
            _require_backbone(path, card, backbone)
        return cls(tensors["weight"], tensors["bias"], scale, weight, card)


def make_card(
    backbone: Backbone,
    classnames: Sequence[str],
    *,
    settings: AirSettings,
    generator: str | None = None,
    adapter: str | None = None,
) -> dict[str, Any]:
    """The origin of a classifier, for its file.

    Args:
        backbone: whose features it reads.
        classnames: C names.
        settings: that it was made with.
        generator: fingerprint of the generator of the images; None for real images.
        adapter: key of the LoRA in the store; None without one.
    """
    return {
        "classes": list(classnames),
        "backbone": backbone.name,
        "backbone_fingerprint": backbone.fingerprint,
        "prototypes": settings.prototypes,
        "prior": settings.prior,
        "generator": settings.generator if generator else None,
        "generator_fingerprint": generator,
        "lora": adapter,
        "seed": settings.seed,
        "template": settings.prompt,
        "form": settings.form,
        "auxiliary": settings.auxiliary,
        "refine": settings.refine,
        "rounds": settings.rounds,
        "images_per_class": settings.images_per_class,
        "kept_per_class": settings.kept_per_class,
    }


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A classifier file's tensors and header, both checked to be whole."""
    if not path.is_file():
        raise UserError(f"classifier file {path} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(HEADER)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"classifier file {path} is damaged, or not a safetensors file: {error}") from error
    if text is None:
        raise UserError(f"{path} is not a classifier of air_plugin; `air prototypes` makes one")
    try:
        header = json.loads(text)
        version, digest = header["version"], header["digest"]
        whole = isinstance(header["card"], dict) and {"scale", "fusion_weight"} <= header.keys()
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"classifier file {path} is damaged: its header cannot be read; make it again") from error
    if version != VERSION:
        raise UserError(f"classifier file {path} is of form {version}; this air_plugin reads form {VERSION}")
    if not whole or tensors.keys() != {"weight", "bias"} or digest != tensor_digest(tensors):
        raise UserError(f"classifier file {path} is damaged: its content is not what was saved; make it again")
    return tensors, header


def _require_classes(path: str | Path, found: list[str] | None, expected: list[str]) -> None:
    if found is None:
        raise UserError(f"classifier file {path} does not name its classes, so they cannot be compared")
    if found == expected:
        return
    if sorted(found) == sorted(expected):
        what = "the same classes in another order"
    else:
        what = f"{len(found)} other classes than these {len(expected)}"
    place = next((i for i, (one, two) in enumerate(zip(found, expected, strict=False)) if one != two), None)
    if place is None:
        place = min(len(found), len(expected))
    one, two = (f"'{names[place]}'" if place < len(names) else "nothing" for names in (found, expected))
    raise UserError(f"classifier file {path} is for {what}: class {place + 1} is {one} there and {two} here")


def _require_backbone(path: str | Path, card: Mapping[str, Any], expected: Backbone | str) -> None:
    found = card.get("backbone_fingerprint")
    if found is None:
        raise UserError(f"classifier file {path} does not name its backbone, so it cannot be compared")
    name = "" if isinstance(expected, str) else f"{expected.name} "
    fingerprint = expected if isinstance(expected, str) else expected.fingerprint
    if found != fingerprint:
        raise UserError(
            f"classifier file {path} is for the backbone {card.get('backbone')} ({found[:12]}), not for "
            f"{name}({fingerprint[:12]}); their features cannot be compared"
        )
