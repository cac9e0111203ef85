"""The parts `generation` and `runs` of benchmarks.scaling."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from air_plugin.config import AirSettings
from air_plugin.diffusion.jobs import plan_jobs
from air_plugin.diffusion.pipeline import load_generator
from air_plugin.diffusion.spread import Portion, Recipe, generate_portion, set_up
from air_plugin.engine import chosen

ROOT = Path(__file__).resolve().parents[1]
NAMES = [f"digit {number}" for number in range(10)]


def generation(options: argparse.Namespace) -> int:
    """Images a second by one worker and by several. The time before every worker has its first batch is left out."""
    settings = AirSettings(prompt="a photo of a {}.", batch=options.batch, steps=options.steps)
    fingerprint = load_generator(options.generator, **settings.loading).fingerprint
    count = -(-options.generated // len(NAMES))
    rates = [images_a_second(options, settings, fingerprint, count, workers) for workers in (1, options.workers)]
    print(f"generation: {options.generator}, {options.steps} steps, batches of {options.batch}; ENGINE={chosen().name}")
    return show("images/s", rates, options.workers)


def images_a_second(
    options: argparse.Namespace, settings: AirSettings, fingerprint: str, count: int, workers: int
) -> float:
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        jobs = plan_jobs(
            NAMES,
            template=settings.prompt,
            images_per_class=count,
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
        portions = [Portion(batch, frozenset(job.key for job in batch)) for batch in batches]
        engine, times, images = chosen(), [], []
        gpus = min(1.0, engine.gpus())
        for _, written in engine.map(
            partial(set_up, recipe), generate_portion, portions, workers=workers, gpus=gpus, folders=[folder]
        ):
            times.append(time.perf_counter())
            images.append(len(written))
        return sum(images[workers:]) / (times[-1] - times[workers - 1])


def runs(options: argparse.Namespace) -> int:
    """Runs an hour, one at a time and several: CPL on the digits, with features from the store."""
    rates = []
    for jobs in (1, options.workers):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            script(options, folder, jobs=1, seeds=[0])  # computes the features
            start = time.perf_counter()
            script(options, folder, jobs=jobs, seeds=range(1, options.runs + 1))
            rates.append(3600 * options.runs / (time.perf_counter() - start))
    print(f"runs: {options.runs} of CPL on digits; with the start of the script and its table; ENGINE={chosen().name}")
    return show("runs/hour", rates, options.workers)


def script(options: argparse.Namespace, output: str, *, jobs: int, seeds: range | list[int]) -> None:
    environment = {"DATA": str(options.data), "OUTPUT": output, "JOBS": str(jobs), "SEEDS": " ".join(map(str, seeds))}
    command = [sys.executable, str(ROOT / "scripts" / "run.py"), "--trainers", "CPL", "digits"]
    subprocess.run(command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL, check=True)


def number(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def show(unit: str, rates: list[float], workers: int) -> int:
    one, several = rates
    print(f"1 worker: {number(one)} {unit}; {workers} workers: {number(several)} {unit}")
    print(f"efficiency of {workers} workers {several / one / workers:.2f}")
    return 0
