"""How the work grows with the number of workers.

    python -m benchmarks.scaling                                 # all parts
    python -m benchmarks.scaling --part generation               # images/s
    python -m benchmarks.scaling --part runs                     # runs/hour; needs --data, by default ./data
    python -m benchmarks.scaling --part em                       # 1,000,000 images, 512 dimensions, 1,000 classes
    python -m benchmarks.scaling --part em --images 100000 --iterations 3
    python -m benchmarks.scaling --part cost                     # of whole data sets, computed from rates

generation, runs: one worker beside `--workers` workers of ENGINE (local or ray), and the efficiency: the ratio of
their rates, divided by the number of workers. A rate is counted from the first unit of each worker; the start of the
workers (and of the script), and the whole time stand beside it. Rates mean something on a machine
that does nothing else: a line says so where it has other work. Processor time does not depend on that so much.

em: EM over shards of a feature table on disk, by `--workers` workers of ENGINE (local or ray) with one thread each,
beside one process that adds up all images as one shard. The results must agree to 1e-6. The table, 4 * images *
dimensions bytes, is written to `--folder` and removed. What `--computed` images take is computed: time grows with them,
a worker's memory does not.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from air_plugin.clip.images_on_disk import ImagesOnDisk
from air_plugin.engine import Team
from air_plugin.functional.em import Refined, refine_shards
from air_plugin.functional.gaussian import Gaussians, fit_gaussians
from air_plugin.functional.shards import SHARD, cut, in_this_process
from air_plugin.utils.tables import write_table
from benchmarks.em import unit
from benchmarks.scaling_cost import add_options, print_costs
from benchmarks.scaling_work import gather, generation, runs, warn_if_busy
from benchmarks.selection import peak_memory, positive

PART = 10_000  # images that are made up at a time
TOLERANCE = 1e-6


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(1)
    if options.part != "cost":
        warn_if_busy()
    parts = PARTS.values() if options.part == "all" else [PARTS[options.part]]
    return max(part(options) for part in parts)


def em(options: argparse.Namespace) -> int:
    """EM by several workers, and by one process as one shard."""
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, ExitStack() as stack:
        path = Path(folder) / "features.safetensors"
        images, prior = made_up(path, options.images, options.dimensions, options.classes)
        print(
            f"{options.images:,} images, {options.dimensions} dimensions, {options.classes:,} classes; "
            f"{path.stat().st_size / 2**30:.2f} GiB on disk; shards of {SHARD:,}; {options.iterations} iterations",
            flush=True,
        )
        results, seconds, peak = {}, [], 0.0
        team = stack.enter_context(Team(workers=options.workers, folders=[path.parent]))
        start = time.perf_counter()
        list(team.map(partial(gather, path.parent, options.workers), no_work, range(options.workers)))
        print(f"start of {options.workers} workers: {time.perf_counter() - start:.1f} s, which is in no time below")
        for name, map_shards, shard in (
            ("one process, one shard", in_this_process, options.images),
            (f"{options.workers} workers", team.map, SHARD),
        ):
            peaks: dict[int, float] = {}
            start = time.perf_counter()
            results[name] = refine_shards(
                images,
                prior=prior,
                iterations=options.iterations,
                tolerance=0,
                shard=shard,
                map_shards=measured(map_shards, peaks),
            )
            seconds.append(time.perf_counter() - start)
            peak = max(peaks.values())
            print(f"{name}: {seconds[-1]:.1f} s, peak memory of a worker {peak:.2f} GiB", flush=True)
        print(f"peak memory of the main process {peak_of_this_process():.2f} GiB")
        print(f"efficiency of {options.workers} workers {seconds[0] / seconds[1] / options.workers:.2f}")
        print(computed(options, seconds[1], peak))
        return agree(results)


def computed(options: argparse.Namespace, seconds: float, peak: float) -> str:
    """What `--computed` images take, from what was measured: only disk, time and waiting sums grow with them."""
    images, shards = options.computed, len(cut(options.computed))
    disk = 4 * images * options.dimensions / 2**30
    waiting = 8 * shards * options.classes * (options.dimensions + 1) / 2**30
    each = seconds / options.iterations * images / options.images / 60
    return (
        f"computed for {images:,} images: {disk:.1f} GiB on disk, {peak:.2f} GiB in each worker, in the main process "
        f"at most {waiting:.2f} GiB of sums that wait, of {shards} shards; {each:.1f} minutes an iteration"
    )


def agree(results: dict[str, Refined]) -> int:
    """0 where both results are the same, except for rounding."""
    one, several = results.values()
    error = max(difference(*pair) for pair in zip(tensors(one), tensors(several), strict=True))
    print(f"relative difference of the results: {error:.1e}")
    if error > TOLERANCE:
        print("error: the results differ", file=sys.stderr)
        return 1
    return 0


def tensors(result: Refined) -> list[Tensor]:
    strength = torch.tensor([result.prior_strength], dtype=torch.float64)
    return [result.model.mean, result.model.covariance, result.model.counts, result.soft_counts, strength]


def difference(one: Tensor, other: Tensor) -> float:
    """The largest difference, as a share of the largest number."""
    return float((one - other).abs().max() / one.abs().max())


def measured(map_shards: Callable[..., Iterable[tuple[int, Any]]], peaks: dict[int, float]) -> Any:
    """The same `ShardMap`; it enters the peak of memory of every process, in GiB, by its id."""

    def mapping(setup: Any, work: Any, units: Any, /) -> Iterator[tuple[int, Any]]:
        for index, (result, process, peak) in map_shards(setup, partial(_with_peak, work), units):
            peaks[process] = peak
            yield index, result

    return mapping


def no_work(state: None, unit: int) -> None:
    """A unit of workers that are only started."""


def _with_peak(work: Callable[[Any, range], Any], state: Any, unit: range) -> tuple[Any, int, float]:
    return work(state, unit), os.getpid(), peak_of_this_process()


def peak_of_this_process() -> float:
    """The peak of memory of this process, in GiB. On Linux `peak_memory` begins with that of the parent process."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return peak_memory()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 2**20


def made_up(path: Path, images: int, dimensions: int, classes: int) -> tuple[ImagesOnDisk, Gaussians]:
    """Unit features on disk, classes apart, with texts that half fit; and a prior of 4 generated images a class."""
    rng = torch.Generator().manual_seed(0)

    def near(points: Tensor, noise: float) -> Tensor:
        return unit(points + noise * torch.randn(points.shape, generator=rng) / dimensions**0.5)

    centres = unit(torch.randn(classes, dimensions, generator=rng))
    texts = near(centres, 4.0)
    labels = torch.arange(classes).repeat_interleave(4)
    prior = fit_gaussians(near(centres[labels], 1.0), labels, classes=classes)
    sizes = (min(PART, images - start) for start in range(0, images, PART))
    parts = (near(centres[torch.randint(classes, (size,), generator=rng)], 1.0) for size in sizes)
    write_table(path, "features", parts, shape=(images, dimensions), dtype=torch.float32)
    return ImagesOnDisk.open(path, texts, logit_scale=50.0), prior


PARTS: dict[str, Callable[[argparse.Namespace], int]] = {
    "generation": generation,
    "runs": runs,
    "em": em,
    "cost": print_costs,
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=[*PARTS, "all"], default="all", help="default all")
    parser.add_argument("--workers", type=positive, default=2, help="default 2")
    group = parser.add_argument_group("generation")
    group.add_argument("--generator", default="mini", help="default mini")
    for name, value in {"generated": 40, "batch": 4, "steps": 4}.items():
        group.add_argument(f"--{name}", type=positive, default=value, help=f"default {value}")
    group = parser.add_argument_group("runs")
    group.add_argument("--data", type=Path, default=Path("data"), help="of the digits; default ./data")
    group.add_argument("--runs", type=positive, default=8, help="default 8")
    group = parser.add_argument_group("em")
    defaults = {"images": 1_000_000, "dimensions": 512, "classes": 1000, "iterations": 1, "computed": 10_000_000}
    for name, value in defaults.items():
        group.add_argument(f"--{name}", type=positive, default=value, help=f"default {value}")
    add_options(parser)
    group.add_argument("--folder", type=Path, help="of temporary files; default: the system's")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
