"""Time and memory of TransCLIP, StatA and ZLaP on as many test images as ImageNet has.

    python -m benchmarks.rivals                                  # 50,000 images, 512 dimensions, 1,000 classes
    python -m benchmarks.rivals --images 5000 --classes 100

The images are made up, as those of `benchmarks.em`; each method has a process of its own, and so a peak of its own.
The head that all of them start from, a product of (N, D) and (D, C), is the unit of time.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from air_plugin.functional.stata import stata
from air_plugin.functional.transclip import transclip
from air_plugin.functional.zlap import propagate
from benchmarks.em import made_up
from benchmarks.selection import peak_memory

METHODS: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "TransCLIP": lambda features, probs, anchors: transclip(features, probs),
    "StatA": stata,
    "ZLaP": lambda features, probs, anchors: propagate(features, anchors, torch.arange(len(anchors))),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"images": 50_000, "dimensions": 512, "classes": 1000, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    options = parser.parse_args(arguments)
    sizes = ("images", "dimensions", "classes", "threads")
    print(", ".join(f"{getattr(options, name)} {name}" for name in sizes))
    context = multiprocessing.get_context("spawn")
    for name in METHODS:
        with context.Pool(1) as pool:
            seconds, head, before, peak = pool.apply(measure, (name, options))
        print(f"{name}: {seconds:.0f} s, {seconds / head:.0f} times the head; peak {peak:.2f} GiB, {before:.2f} before")
    return 0


def measure(name: str, options: argparse.Namespace) -> tuple[float, float, float, float]:
    """Seconds of a method and of the head, and the peak of memory before and after it, in GiB."""
    torch.set_num_threads(options.threads)
    features, probs, anchors = made_up(options.images, options.dimensions, options.classes)
    before = peak_memory()
    start = time.perf_counter()
    features @ anchors.T
    middle = time.perf_counter()
    METHODS[name](features, probs, anchors)
    return time.perf_counter() - middle, middle - start, before, peak_memory()


if __name__ == "__main__":
    sys.exit(main())
