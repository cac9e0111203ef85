"""Time and memory of CPL's candidate sets, compared with a straightforward loop over images.

    python -m benchmarks.selection                                      # 100,000 images, 1,000 classes, float32
    python -m benchmarks.selection --images 20000 --classes 45 --beta 0.9

One run measures `candidate_sets` on all images; then, on the first `--subset` of them, the same function and the loop
in turns, whose answers must agree. The ratio is of the medians on that subset.
"""

from __future__ import annotations

import argparse
import heapq
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from air_plugin.functional.pseudo_labels import SMALLEST, Candidates, candidate_sets


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    settings = {"alpha": options.alpha, "beta": options.beta, "per_class": options.per_class}
    imported = peak_memory()
    probs = random_probs(options.images, options.classes)
    filled = peak_memory()
    candidates, seconds = timed(lambda: candidate_sets(probs, **settings))
    peak = peak_memory()
    print(f"{options.images} images, {options.classes} classes, float32, {options.threads} threads, {settings}")
    print(f"selected {len(candidates.index)} images, {candidates.mask.sum(dim=1).double().mean():.2f} candidates each")
    print(f"time {seconds:.2f} s")
    print(f"peak memory of the process {peak:.2f} GiB: {imported:.2f} after the imports, {filled:.2f} with the input")

    subset = probs[: options.subset]
    times: dict[str, list[float]] = {"ours": [], "loop": []}
    for _ in range(options.repeat):
        ours, seconds = timed(lambda: candidate_sets(subset, **settings))
        times["ours"].append(seconds)
        slow, seconds = timed(lambda: straightforward(subset, **settings))
        times["loop"].append(seconds)
        if not (
            torch.equal(ours.index, slow.index)
            and torch.equal(ours.mask, slow.mask)
            and torch.equal(ours.pool, slow.pool)
        ):
            print("error: the loop's answer differs", file=sys.stderr)
            return 1
    ours_ms, loop_ms = (1e3 * statistics.median(values) for values in times.values())
    print(
        f"on {len(subset)} images, median of {options.repeat}, the answers agree: "
        f"candidate_sets {ours_ms:.1f} ms, loop {loop_ms:.1f} ms, ratio {loop_ms / ours_ms:.1f}"
    )
    return 0


def straightforward(probs: Tensor, *, alpha: float, beta: float, per_class: int) -> Candidates:
    """The same answer, one image and one application after the other (CPL, section 4)."""
    confidence = probs.max(dim=1).values
    tau = torch.quantile(confidence, alpha) if alpha else confidence.mean()
    columns = torch.stack([torch.quantile(column, beta) for column in probs.unbind(dim=1)])
    masks: list[Tensor] = []
    lists: list[list[tuple[float, int]]] = []  # of each image: minus the probability, and the class, in falling order
    for row in probs:
        ordered, order = row.sort(descending=True, stable=True)
        needed = 1 + int((ordered.cumsum(dim=0)[:-1] <= tau).sum())
        mask = torch.zeros_like(row, dtype=torch.bool)
        mask[order[:needed]] = True
        masks.append(mask & (row >= columns) & (row > SMALLEST))
        classes = order[masks[-1][order]]
        lists.append(list(zip((-row[classes]).tolist(), classes.tolist(), strict=True))[::-1])
    pools: list[list[tuple[float, int]]] = [[] for _ in columns]  # the worst image of a class comes first
    applying = list(range(len(probs)))
    while applying:
        image = applying.pop()
        if not lists[image]:
            continue
        value, label = lists[image].pop()
        heapq.heappush(pools[label], (-value, -image))
        if len(pools[label]) > per_class:
            applying.append(-heapq.heappop(pools[label])[1])
    kept = sorted((-image, label) for label, pool in enumerate(pools) for _, image in pool)
    index = torch.tensor([image for image, _ in kept])
    return Candidates(index, torch.stack(masks)[index], torch.tensor([label for _, label in kept]))


def random_probs(images: int, classes: int) -> Tensor:
    """(N, C) random rows that sum to 1, made in blocks so that no more memory is needed than for the result."""
    rng = torch.Generator().manual_seed(0)
    probs = torch.empty(images, classes)
    for part in probs.split(4096):
        part.copy_((3 * torch.randn(part.shape, generator=rng)).softmax(dim=1))
    return probs


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def peak_memory() -> float:
    """The peak of memory of this process so far, in GiB."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kibibytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time and memory of candidate_sets, beside a loop over images.")
    parser.add_argument("--images", type=positive, default=100_000)
    parser.add_argument("--classes", type=positive, default=1000)
    parser.add_argument("--alpha", type=quantile, default=0.6)
    parser.add_argument("--beta", type=quantile, default=0.99)
    parser.add_argument("--per-class", type=positive, default=16)
    parser.add_argument("--subset", type=positive, default=4000, help="images that the loop is run on")
    parser.add_argument("--repeat", type=positive, default=5, help="turns on the subset")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    return parser.parse_args(arguments)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def quantile(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in 0..1")
    return value


if __name__ == "__main__":
    sys.exit(main())
