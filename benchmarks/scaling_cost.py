"""The part `cost` of benchmarks.scaling: images, GPU hours and bytes on disk of data sets, computed from rates."""

from __future__ import annotations

import argparse
from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """A data set: classes, unlabelled images, and views of each in the feature table."""

    name: str
    classes: int
    unlabelled: int
    views: int = 8


# Numbers of images: docs/datasets.md, the training part of the split family zhou.
CASES = (
    Case("EuroSAT", 10, 13_500),
    Case("RESISC45", 45, 15_750),
    Case("ImageNet", 1_000, 1_281_167),
    Case("10 M unlabelled images, 1,000 classes", 1_000, 10_000_000, views=1),
)


@dataclass(frozen=True)
class Cost:
    """Of one adapter, its images and all features.

    generated: images.
    hours: of one GPU, by stage: LoRA, generation, features.
    bytes: on disk: adapter, images, features.
    """

    generated: int
    hours: tuple[float, float, float]
    bytes: tuple[float, float, float]


def cost(case: Case, options: argparse.Namespace) -> Cost:
    """What a data set takes. Views of the unlabelled images and the generated images are encoded once each."""
    generated = case.classes * options.per_class
    encoded = case.unlabelled * case.views + generated
    seconds = (options.lora_seconds, generated / options.image_rate, encoded / options.view_rate)
    adapter, images = 4e6 * options.lora_parameters, generated * options.image_bytes
    hours = (seconds[0] / 3600, seconds[1] / 3600, seconds[2] / 3600)
    return Cost(generated, hours, (adapter, images, 4.0 * encoded * options.dimensions))


def print_costs(options: argparse.Namespace) -> int:
    """A table in Markdown, after the rates that it is computed from."""
    print(
        f"cost: computed from {options.lora_seconds:g} s an adapter, {options.image_rate:g} images/s, "
        f"{options.view_rate:g} views/s; M = {options.per_class}; features of {options.dimensions} numbers"
    )
    head = ("data set", "unlabelled", "views", "generated", "GPU hours: LoRA + generation + features = all", "on disk")
    rows = [head, ("---",) * len(head)]
    for case in CASES:
        found = cost(case, options)
        parts = " + ".join(f"{hours:.2f}" for hours in found.hours)
        disk = " + ".join(map(gigabytes, found.bytes))
        numbers = (f"{case.unlabelled:,}", str(case.views), f"{found.generated:,}")
        sums = (f"{parts} = {sum(found.hours):.2f}", f"{disk} = {gigabytes(sum(found.bytes))}")
        rows.append((case.name, *numbers, *sums))
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))
    return 0


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The rates; by default those of one H100 in docs/performance.md."""
    group = parser.add_argument_group("cost (defaults: measured on one H100, docs/performance.md; SD 1.5 at 256 px)")
    numbers = {
        "lora-seconds": (165.0, "of an adapter: 1,000 steps of 165 ms"),
        "image-rate": (19.7, "generated images a second, batch 16"),
        "view-rate": (1200.0, "encoded views a second, ViT-B/32: 1,500 images x 8 views in 10 s, 16 cores read"),
        "lora-parameters": (3.2, "millions, rank 16, in 4 bytes each"),
        "image-bytes": (256.0 * 256 * 3, "of a PNG file; default: as many as without compression, so at most"),
    }
    for name, (value, text) in numbers.items():
        group.add_argument(f"--{name}", type=float, default=value, help=f"{text}; default {value:g}")
    group.add_argument("--per-class", type=int, default=120, help="M; default 120")
