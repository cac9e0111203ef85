"""Time and memory of EM on many unlabelled images.

    python -m benchmarks.em                                      # 1,000,000 images, 512 dimensions, 1,000 classes
    python -m benchmarks.em --images 100000 --iterations 3

The inputs, float32, take 4 * images * (dimensions + classes) bytes; the peak shows what EM adds to them. The images are
made up: classes apart, with text probabilities that half know them. On a small part the answer must agree with that of
another chunk size.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from air_plugin.functional.em import refine
from air_plugin.functional.gaussian import fit_gaussians
from benchmarks.selection import peak_memory


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    imported = peak_memory()
    features, probs, centres = made_up(options.images, options.dimensions, options.classes)
    labels = torch.arange(options.classes).repeat_interleave(options.generated)
    noise = torch.randn(len(labels), options.dimensions, generator=torch.Generator().manual_seed(1))
    prior = fit_gaussians(unit(centres[labels] + noise / options.dimensions**0.5), labels, classes=options.classes)
    filled = peak_memory()
    start = time.perf_counter()
    found = refine(features, probs, prior=prior, iterations=options.iterations, tolerance=0, chunk=options.chunk)
    seconds = time.perf_counter() - start
    inputs = (features.nbytes + probs.nbytes) / 2**30
    print(
        f"{options.images} images, {options.dimensions} dimensions, {options.classes} classes, "
        f"{options.threads} threads, chunks of {options.chunk}"
    )
    print(f"time {seconds:.1f} s for {found.iterations} iterations, {seconds / found.iterations:.1f} s each")
    print(
        f"peak memory of the process {peak_memory():.2f} GiB: {imported:.2f} after the imports, "
        f"{filled:.2f} before EM; the inputs {inputs:.2f}"
    )

    part = slice(0, min(5000, options.images))
    one, two = (
        refine(features[part], probs[part], prior=prior, iterations=3, tolerance=0, chunk=size)
        for size in (333, options.chunk)
    )
    if not torch.allclose(one.model.mean, two.model.mean):
        print("error: another chunk size gives another answer", file=sys.stderr)
        return 1
    return 0


def unit(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features, dim=1)


def made_up(images: int, dimensions: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """(N, D) unit features, (N, C) probabilities, (C, D) centres; made in parts, which keeps the peak of memory low."""
    rng = torch.Generator().manual_seed(0)
    centres = unit(torch.randn(classes, dimensions, generator=rng))
    features, probs = torch.empty(images, dimensions), torch.empty(images, classes)
    for start in range(0, images, 10_000):
        size = min(10_000, images - start)
        labels = torch.randint(classes, (size,), generator=rng)
        noise = torch.randn(size, dimensions, generator=rng) / dimensions**0.5
        features[start : start + size] = unit(centres[labels] + noise)
        logits = torch.randn(size, classes, generator=rng)
        logits[torch.arange(size), labels] += 5
        probs[start : start + size] = logits.softmax(dim=1)
    return features, probs, centres


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {
        "images": 1_000_000,
        "dimensions": 512,
        "classes": 1000,
        "generated": 4,
        "iterations": 3,
        "chunk": 4096,
        "threads": 1,
    }
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
