"""The time that the auxiliary classifier adds to a trainer's inference, compared with the image encoder.

    python -m benchmarks.auxiliary_head --threads 1              # 1,000 classes, ViT-B/32, batch 32; a minute or two
    python -m benchmarks.auxiliary_head --threads 1 --backbone mini

A model of CoOp's shape with fixed text features on an open_clip ViT-B-32-quickgelu with random weights, or on the
embedded small CLIP; the prototypes are random, too. Its `model_inference` is timed with and without `AuxiliaryMixin`,
in turns. The difference of two long times is mostly noise on a busy machine, so both are also timed with an image
encoder that gives what it gave before: their difference is the overhead.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from air_plugin.auxiliary.build import Auxiliary
from air_plugin.auxiliary.classifier import AuxiliaryClassifier
from air_plugin.auxiliary.stages import Prototypes
from air_plugin.clip.backbone import Backbone
from air_plugin.clip.loading import load_backbone
from air_plugin.mixin import AuxiliaryMixin
from benchmarks.prompt_step import ARCHITECTURE, positive, random_backbone

KEPT = 30  # prototypes of each class; the classifier is one matrix for any number
WEIGHT = 2.0  # lambda
TOLERANCE = 1e-3  # of the fused output, compared with a separate computation


class Remembered(nn.Module):
    """An image encoder that returns the features it was made with for any images."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = features

    def forward(self, image: Tensor) -> Tensor:
        return self.features


class Model(nn.Module):
    """A model like CoOp's, with precomputed text features."""

    def __init__(self, encoder: nn.Module, text: Tensor, scale: float) -> None:
        super().__init__()
        self.image_encoder, self.dtype, self.text, self.scale = encoder, torch.float32, text, scale

    def forward(self, image: Tensor) -> Tensor:
        return self.scale * normalize(self.image_encoder(image.type(self.dtype)), dim=1) @ self.text.T


class Plain:
    """Inference of a Dassl trainer."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def model_inference(self, input: Tensor) -> Tensor:
        return self.model(input)


class Mixed(AuxiliaryMixin, Plain):
    """The same with the auxiliary classifier."""

    def __init__(self, model: Model, auxiliary: Auxiliary) -> None:
        super().__init__(model)
        self.auxiliary = self._current = auxiliary
        self.air: Any = SimpleNamespace(weight=WEIGHT)
        self.classnames = [str(number) for number in range(len(model.text))]


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    backbone = load_backbone("mini") if options.backbone == "mini" else random_backbone()
    rng = torch.Generator().manual_seed(1)
    images = torch.randn(options.batch, 3, backbone.image_size, backbone.image_size, generator=rng)
    encoder = backbone.model.visual
    auxiliary, text = random_classifiers(backbone, options.classes, encoder(images), rng=rng)

    model = Model(encoder, text, backbone.logit_scale)
    remembering = Model(Remembered(encoder(images)), text, backbone.logit_scale)
    plain, mixed = Plain(model), Mixed(model, auxiliary)
    difference = (mixed.model_inference(images) - expected(mixed, images)).abs().max()

    whole = in_turns(
        options.repeats,
        {
            "encoder": lambda: encoder(images),
            "without": lambda: plain.model_inference(images),
            "with": lambda: mixed.model_inference(images),
        },
    )
    heads = {"without": Plain(remembering), "with": Mixed(remembering, auxiliary)}
    alone = in_turns(
        40 * options.repeats,
        {
            "without": lambda: heads["without"].model_inference(images),
            "with": lambda: heads["with"].model_inference(images),
        },
    )

    overhead = alone["with"] - alone["without"]
    print(
        f"{backbone.name}, batch {options.batch}, {options.classes} classes, {text.shape[1]} features, "
        f"{options.threads} threads; median of {options.repeats}"
    )
    print(f"image encoder                      {whole['encoder']:9.2f} ms")
    print(f"model_inference without the mixin  {whole['without']:9.2f} ms")
    print(f"model_inference with the mixin     {whole['with']:9.2f} ms   {difference:.1e} from the definition at most")
    print(
        f"overhead, without encoder's noise  {overhead:9.2f} ms   {100 * overhead / whole['encoder']:.2f} % of the "
        "image encoder's time"
    )
    if difference > TOLERANCE:
        print(f"error: the fused output differs from its definition by more than {TOLERANCE:g}", file=sys.stderr)
        return 1
    return 0


def random_classifiers(
    backbone: Backbone, classes: int, features: Tensor, *, rng: torch.Generator
) -> tuple[Auxiliary, Tensor]:
    """Random prototypes and (C, D) random text features, as wide as the (B, D) image features."""
    width = features.shape[1]
    prototypes = normalize(torch.randn(classes, KEPT, width, generator=rng), dim=2)
    classifier = AuxiliaryClassifier.from_prototypes(prototypes, scale=2 * backbone.logit_scale)
    classifier = replace(classifier, fusion_weight=WEIGHT)
    text = normalize(torch.randn(classes, width, generator=rng), dim=1)
    images = [[Path()] * KEPT] * classes
    return Auxiliary(classifier, Prototypes(prototypes, images, torch.empty(0), prototypes)), text


def expected(trainer: Mixed, images: Tensor) -> Tensor:
    """(B, C) log of the normalised p + lambda p^, from all prototypes instead of their mean."""
    features = normalize(trainer.model.image_encoder(images), dim=1).double()
    cosines = torch.einsum("bd,ckd->bck", features, trainer.auxiliary.prototypes.features.double()).mean(dim=2)
    scale = trainer.auxiliary.classifier.scale
    assert scale is not None
    total = trainer.model(images).double().softmax(dim=1) + WEIGHT * (scale * cosines).softmax(dim=1)
    return (total / total.sum(dim=1, keepdim=True)).log()


def in_turns(repeats: int, works: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median milliseconds of each; they run in turns, and the first turn is a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(1 + repeats):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What the auxiliary classifier adds to a trainer's inference.")
    parser.add_argument("--backbone", choices=[ARCHITECTURE, "mini"], default=ARCHITECTURE)
    parser.add_argument("--classes", type=positive, default=1000)
    parser.add_argument("--batch", type=positive, default=32)
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
