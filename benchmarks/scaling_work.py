"""The parts `generation` and `runs` of benchmarks.scaling: rates while all workers work, and the start beside them."""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from air_plugin.config import AirSettings
from air_plugin.diffusion.jobs import plan_jobs
from air_plugin.diffusion.pipeline import load_generator
from air_plugin.diffusion.spread import Place, Portion, Recipe, generate_portion, set_up
from air_plugin.engine import chosen
from air_plugin.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
NAMES = [f"digit {number}" for number in range(10)]
PATIENCE = 300  # seconds for all workers to start
BUSY = 0.5  # load average above which other processes disturb the measurement


@dataclass(frozen=True)
class Finish:
    """A unit that was finished.

    time: when, in seconds.
    amount: images or runs.
    cpu: seconds of processor time that it took.
    """

    time: float
    amount: int
    cpu: float


@dataclass(frozen=True)
class Timing:
    """How long some work took.

    rate: of the amount, a second, while all workers worked.
    start: seconds until then: the start of the workers, and their first units.
    whole: seconds in all.
    cpu: seconds of processor time for one of the amount, in that time.
    """

    rate: float
    start: float
    whole: float
    cpu: float


def steady(finishes: Sequence[Finish], *, begin: float, end: float, workers: int) -> Timing:
    """The rate from the first finished units, one for each worker, until the last unit.

    Where workers have equally many units and begin at the same time, it is the rate of all of them at work. A worker
    that has nothing to do at the end, since its units were shorter, counts as one that works.

    Args:
        finishes: of all units, in the order of time.
        begin, end: of the whole work.
        workers: how many there are.

    Raises:
        UserError: there are too few units.
    """
    if len(finishes) <= workers:
        raise UserError(f"{len(finishes)} runs or batches are too few to measure {workers} workers; give more")
    since, later = finishes[workers - 1].time, finishes[workers:]
    amount = sum(finish.amount for finish in later)
    cpu = sum(finish.cpu for finish in later) / amount
    return Timing(amount / (later[-1].time - since), since - begin, end - begin, cpu)


def share(units: Sequence[Any], workers: int) -> Sequence[Any]:
    """As many of the units as can be shared evenly."""
    return units[: len(units) // workers * workers]


def generation(options: argparse.Namespace) -> int:
    """Images a second by one worker and by several."""
    settings = AirSettings(prompt="a photo of a {}.", batch=options.batch, steps=options.steps)
    fingerprint = load_generator(options.generator, **settings.loading).fingerprint
    print(f"generation: {options.generator}, {options.steps} steps, batches of {options.batch}; ENGINE={chosen().name}")
    numbers = dict.fromkeys((1, options.workers))
    timings = [time_generation(options, settings, fingerprint, workers=workers) for workers in numbers]
    return show("images/s", timings, options.workers)


def time_generation(options: argparse.Namespace, settings: AirSettings, fingerprint: str, *, workers: int) -> Timing:
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        jobs = plan_jobs(
            NAMES,
            template=settings.prompt,
            images_per_class=-(-options.generated // len(NAMES)),
            seed=0,
            steps=options.steps,
            guidance=settings.guidance,
            size=settings.size,
            weights=fingerprint,
        )
        recipe = Recipe(
            name=options.generator,
            loading=settings.loading,
            fingerprint=fingerprint,
            adapter=None,
            prompts=tuple(dict.fromkeys(job.prompt for job in jobs)),
            guidance=settings.guidance,
            folder=folder,
            size=options.batch,
        )
        batches = [jobs[start : start + options.batch] for start in range(0, len(jobs), options.batch)]
        even = share(batches, options.workers)
        portions = [Portion(batch, frozenset(job.key for job in batch)) for batch in even]
        engine, finishes, begin = chosen(), [], time.perf_counter()
        gpus = min(1.0, engine.gpus())
        for _, (amount, cpu) in engine.map(
            partial(set_up_together, recipe, workers),
            generate_timed,
            portions,
            workers=workers,
            gpus=gpus,
            folders=[folder],
        ):
            finishes.append(Finish(time.perf_counter(), amount, cpu))
        return steady(finishes, begin=begin, end=time.perf_counter(), workers=workers)


def set_up_together(recipe: Recipe, workers: int) -> Place:
    """A worker that waits for the others before its first unit: else a quick one does the units of those that start."""
    place = set_up(recipe)
    gather(recipe.folder, workers)
    return place


def gather(folder: Path, workers: int) -> None:
    """Wait until so many processes have called this with the same folder."""
    (folder / f"ready-{os.uname().nodename}-{os.getpid()}").touch()
    end = time.monotonic() + PATIENCE
    while len(list(folder.glob("ready-*"))) < workers and time.monotonic() < end:
        time.sleep(0.05)


def generate_timed(place: Place, portion: Portion) -> tuple[int, float]:
    """A batch of images; returns how many, and seconds of processor time."""
    before = time.process_time()
    written = generate_portion(place, portion)
    return len(written), time.process_time() - before


def runs(options: argparse.Namespace) -> int:
    """Runs an hour, one at a time and several: CPL on the digits, with features from the store."""
    seeds = share(range(1, options.runs + 1), options.workers)
    print(f"runs: {len(seeds)} of CPL on digits; ENGINE={chosen().name}")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for jobs in dict.fromkeys((1, options.workers)):
            script(options, Path(folder) / str(jobs), jobs=1, seeds=[0])  # computes the features
        numbers = dict.fromkeys((1, options.workers))
        timings = [time_runs(options, Path(folder) / str(jobs), jobs=jobs, seeds=seeds) for jobs in numbers]
    return show("runs/hour", timings, options.workers, factor=3600)


def time_runs(options: argparse.Namespace, output: Path, *, jobs: int, seeds: Sequence[int]) -> Timing:
    """A run is finished when its result.json is there, which is written last."""
    begin, before = time.time(), resource.getrusage(resource.RUSAGE_CHILDREN)
    script(options, output, jobs=jobs, seeds=seeds)
    end, after = time.time(), resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / len(seeds)
    results = [path for seed in seeds for path in output.glob(f"digits/CPL/*/seed{seed}/result.json")]
    times = sorted(path.stat().st_mtime for path in results)
    return steady([Finish(at, 1, cpu) for at in times], begin=begin, end=end, workers=jobs)


def script(options: argparse.Namespace, output: Path, *, jobs: int, seeds: Sequence[int]) -> None:
    environment = {"DATA": str(options.data), "OUTPUT": str(output), "JOBS": str(jobs)}
    environment |= {"SEEDS": " ".join(map(str, seeds))}
    command = [sys.executable, str(ROOT / "scripts" / "run.py"), "--trainers", "CPL", "digits"]
    subprocess.run(command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL, check=True)


def warn_if_busy() -> None:
    """Say so where other processes use this machine's cores, by the load of the last minute."""
    load = os.getloadavg()[0]
    if load > BUSY:
        print(f"other processes use this machine (load {load:.1f}): rates and efficiency are not those of free cores")


def number(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def show(unit: str, timings: Sequence[Timing], workers: int, *, factor: float = 1.0) -> int:
    """Print the rates, what is beside them, and the efficiency."""
    one, several = timings[0], timings[-1]
    rates = [number(factor * timing.rate) for timing in (one, several)]
    print(f"1 worker: {rates[0]} {unit}; {workers} workers: {rates[1]} {unit}")
    for name, timing in (("1 worker", one), (f"{workers} workers", several)):
        print(
            f"{name}: {timing.start:.1f} s until as many units were finished, {timing.whole:.1f} s in "
            f"all; {timing.cpu:.2f} s of processor time each"
        )
    print(f"efficiency of {workers} workers {several.rate / one.rate / workers:.2f}")
    return 0
