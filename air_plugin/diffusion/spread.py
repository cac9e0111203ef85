"""Generation by the workers of an engine: each of them holds pipeline and adapter, and generates batch after batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from air_plugin.diffusion.generate import GenerationReport, Sampling, report_on
from air_plugin.diffusion.image_set import ImageSet
from air_plugin.diffusion.jobs import ImageJob
from air_plugin.diffusion.lora import adapter_loaded
from air_plugin.diffusion.pipeline import Generator, load_generator
from air_plugin.diffusion.sampling import EncodedPrompts, denoiser_for_sampling, encode_once
from air_plugin.diffusion.writers import THREADS, add_lines, write_image
from air_plugin.engine import Engine
from air_plugin.utils.errors import UserError
from air_plugin.utils.progress import Progress


@dataclass(frozen=True)
class Recipe:
    """What a worker needs to generate images.

    name, loading: `load_generator`'s arguments.
    fingerprint: of the generator that the driver has.
    adapter: folder of the LoRA adapter, or None.
    prompts: all of them.
    guidance: see `ImageJob`.
    folder: of the images.
    size: images at once.
    compile_unet: use torch.compile.
    """

    name: str
    loading: dict[str, Any]
    fingerprint: str
    adapter: Path | None
    prompts: tuple[str, ...]
    guidance: float
    folder: Path
    size: int
    compile_unet: bool = False


@dataclass(frozen=True)
class Portion:
    """A unit: a batch of jobs, and the keys of the images that are wanted."""

    jobs: Sequence[ImageJob]
    wanted: frozenset[str] = frozenset()


@dataclass
class Place:
    """What a worker holds; `stack` keeps the pipeline as it is."""

    recipe: Recipe
    generator: Generator
    prompts: EncodedPrompts
    forget: Any
    size: int
    stack: ExitStack = field(default_factory=ExitStack)


def generate_with(
    engine: Engine, recipe: Recipe, jobs: Sequence[ImageJob], *, workers: int, gpus: float
) -> GenerationReport:
    """Generate the images that do not exist yet with an engine's workers; see `generate`.

    This process claims batches and adds finished images to the manifest; workers write the files.

    Args:
        engine: starts the workers.
        recipe: what a worker needs.
        jobs: from `plan_jobs`.
        workers, gpus: see `Engine.map`.
    """
    with (
        ImageSet(recipe.folder, jobs, recipe.size) as images,
        Progress(len(jobs), title="images", unit="images") as progress,
    ):
        progress.skip(len(jobs) - len(images.missing))
        while images.missing:
            for written in _spread(engine, recipe, images, workers=workers, gpus=gpus):
                finished = [(images.by_key[key], attempt, sha256) for key, attempt, sha256 in written]
                for line in add_lines(images.folder, finished):
                    images.records[line["key"]] = line
                    images.recorded(line["key"])
                    progress.update()
            if images.missing:
                images.wait()
            if found := images.take_found():
                progress.skip(found)
    return report_on(images)


def _spread(
    engine: Engine, recipe: Recipe, images: ImageSet, *, workers: int, gpus: float
) -> Iterator[list[tuple[str, int, str]]]:
    """Let workers generate what this process can claim; yields what was written of each batch."""
    portions = [Portion(batch) for batch in images.waiting]
    index_of = {batch[0].key: index for index, batch in enumerate(images.waiting)}

    def choose(waiting: Sequence[int], active: Sequence[int]) -> int | None:
        """A batch whose worker was lost, which this process still claims; else one that can be claimed."""
        lost = next((index for index in waiting if portions[index].wanted), None)
        if lost is not None:
            return lost
        batch = images.take()
        if batch is None:
            return None
        index = index_of[batch[0].key]
        portions[index] = replace(portions[index], wanted=frozenset(images.claimed & {job.key for job in batch}))
        return index

    folders = [recipe.folder, *([recipe.adapter] if recipe.adapter else [])]
    for _, written in engine.map(
        partial(set_up, recipe),
        generate_portion,
        portions,
        workers=workers,
        gpus=gpus,
        title="batch",
        folders=folders,
        choose=choose,
    ):
        yield written


def set_up(recipe: Recipe) -> Place:
    """Load the generator in a worker.

    Raises:
        UserError: it cannot be loaded, or has other weights than the driver's.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = load_generator(recipe.name, device=device, **recipe.loading)
    if generator.fingerprint != recipe.fingerprint:
        raise UserError(f"generator '{recipe.name}' has other weights on a worker's machine than on this one")
    pipeline, stack = generator.pipeline, ExitStack()
    stack.enter_context(adapter_loaded(pipeline, recipe.adapter, accelerator=generator.accelerator))
    forget = stack.enter_context(denoiser_for_sampling(pipeline, fast=recipe.compile_unet))
    prompts = encode_once(pipeline, recipe.prompts, guidance=recipe.guidance)
    return Place(recipe, generator, prompts, forget, recipe.size, stack)


def generate_portion(place: Place, portion: Portion) -> list[tuple[str, int, str]]:
    """Generate a batch and write its images; returns key, number of the attempt and SHA-256 of each."""
    written: list[tuple[str, int, Future[str]]] = []
    with ThreadPoolExecutor(THREADS) as pool:

        def keep(job: ImageJob, pixels: np.ndarray, attempt: int) -> None:
            if job.key in portion.wanted:
                path = place.recipe.folder / f"{job.key}.png"
                written.append((job.key, attempt, pool.submit(write_image, path, pixels)))

        sampling = Sampling(
            place.generator.pipeline,
            place.prompts,
            set(portion.wanted),
            size=place.size,
            keep=keep,
            forget=place.forget,
        )
        sampling.run([portion.jobs])
        place.size = sampling.size  # smaller where the memory was too small
        return [(key, attempt, future.result()) for key, attempt, future in written]
