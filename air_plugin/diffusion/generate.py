"""Drawing images: every image has its own seed and key, and an interrupted run goes on where it was."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from air_plugin.utils.class_names import fill
from air_plugin.utils.errors import UserError
from air_plugin.utils.files import digest, write_atomically
from air_plugin.utils.seeding import stable_seed
from air_plugin.utils.store import key_of

log = logging.getLogger(__name__)

ATTEMPTS = 8
MANIFEST = "manifest.jsonl"


@dataclass(frozen=True)
class ImageJob:
    """One image to be generated: everything that decides how it looks.

    weights: checksum of the generator with its adapter. seed: of the image's noise; another attempt takes another one.
    """

    classname: str
    number: int
    prompt: str
    seed: int
    steps: int
    guidance: float
    size: int
    weights: str

    @property
    def key(self) -> str:
        return key_of(asdict(self))

    def seed_of_attempt(self, attempt: int) -> int:
        return self.seed if attempt == 0 else stable_seed(self.seed, "attempt", attempt)


def plan_jobs(
    classnames: Sequence[str],
    *,
    template: str,
    images_per_class: int,
    seed: int,
    steps: int,
    guidance: float,
    size: int,
    weights: str,
) -> list[ImageJob]:
    """What is to be generated, first image of every class first: fewer images a class are a prefix of more.

    An image depends on its class's name and number, not on which other classes there are.
    """
    return [
        ImageJob(
            classname=name,
            number=number,
            prompt=fill(template, name),
            seed=stable_seed("image", seed, name, number),
            steps=steps,
            guidance=guidance,
            size=size,
            weights=weights,
        )
        for number in range(images_per_class)
        for name in classnames
    ]


@dataclass(frozen=True)
class GenerationReport:
    """What a call did: the images in the order of the jobs, how many were generated now, how many attempts failed."""

    paths: list[Path]
    generated: int
    failed: int


def generate(pipeline: Any, jobs: Sequence[ImageJob], folder: Path, *, batch_size: int) -> GenerationReport:
    """Generate every image that is not there yet.

    Jobs run in fixed batches, so that an interrupted run ends with the same files, bit by bit, as an undisturbed one.
    Uniform images, among them those that a safety checker blackened, and non-finite ones are generated again with the
    job's next seed.

    Args:
        pipeline: a StableDiffusionPipeline or StableDiffusionXLPipeline, adapters loaded.
        jobs: as planned.
        folder: of the images (`<key>.png`) and of the manifest, a JSON object a line.
        batch_size: images generated at once; changes them by rounding at the most.

    Raises:
        UserError: an image failed at every attempt.
    """
    from tqdm import tqdm

    folder.mkdir(parents=True, exist_ok=True)
    known = _read_manifest(folder)
    generated = 0
    with tqdm(total=len(jobs), desc="images", unit="image", disable=None) as bar:
        for start in range(0, len(jobs), batch_size):
            batch = jobs[start : start + batch_size]
            missing = {job.key for job in batch if not _is_whole(folder, job, known)}
            if missing:
                for job, image, attempt in _draw(pipeline, batch):
                    if job.key in missing:
                        known[job.key] = _keep(folder, job, image, attempt)
                generated += len(missing)
            bar.update(len(batch))
    failed = sum(known[job.key]["attempt"] for job in jobs)
    if failed:
        log.info(
            "images: %d attempts gave black (as a safety checker leaves them), uniform or non-finite images; "
            "each was generated again with the next seed",
            failed,
        )
    return GenerationReport([folder / f"{job.key}.png" for job in jobs], generated, failed)


def _draw(pipeline: Any, batch: Sequence[ImageJob]) -> Iterator[tuple[ImageJob, np.ndarray, int]]:
    """The images (H, W, 3) uint8 of a batch with the number of the attempt that gave them."""
    waiting = list(batch)
    for attempt in range(ATTEMPTS):
        pixels = _sample(pipeline, waiting, attempt)
        failed = []
        for job, values in zip(waiting, pixels, strict=True):
            if is_blank(values):
                failed.append(job)
            else:
                yield job, np.round(values * 255).astype(np.uint8), attempt
        if not failed:
            return
        waiting = failed
    raise UserError(
        f"the generator gave {ATTEMPTS} uniform or non-finite images in a row for '{waiting[0].prompt}'; "
        "try another AIR.PROMPT, AIR.PRECISION bf16 or fp32, fewer AIR.LORA.STEPS, or AIR.SAFETY_CHECKER False"
    )


def is_blank(values: np.ndarray) -> bool:
    """Whether an image (H, W, 3) in [0, 1] is not finite, or one colour all over once it has 8 bits."""
    return not np.isfinite(values).all() or np.ptp(np.round(values * 255), axis=(0, 1)).max() == 0


@torch.no_grad()
def _sample(pipeline: Any, jobs: Sequence[ImageJob], attempt: int) -> np.ndarray:
    """(B, H, W, 3) float32 in [0, 1], or NaN where the model gave none."""
    seeds = [torch.Generator("cpu").manual_seed(job.seed_of_attempt(attempt)) for job in jobs]
    first = jobs[0]
    output = pipeline(
        prompt=[job.prompt for job in jobs],
        num_inference_steps=first.steps,
        guidance_scale=first.guidance,
        height=first.size,
        width=first.size,
        generator=seeds,
        output_type="pt",
    )
    return output.images.float().clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()


def _keep(folder: Path, job: ImageJob, image: np.ndarray, attempt: int) -> dict[str, Any]:
    """Write one image, then its line in the manifest."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="png")
    data = buffer.getvalue()
    write_atomically(folder / f"{job.key}.png", data)
    line = {**asdict(job), "key": job.key, "attempt": attempt, "sha256": digest(data)}
    with open(folder / MANIFEST, "a", encoding="utf-8") as manifest:
        manifest.write(json.dumps(line) + "\n")
    return line


def _read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """The manifest's lines by key; a line that a kill cut short is left out."""
    path = folder / MANIFEST
    if not path.exists():
        return {}
    lines = {}
    text = path.read_text(encoding="utf-8", errors="replace")
    for line in text.splitlines():
        try:
            record = json.loads(line)
            lines[record["key"]] = record
        except (ValueError, KeyError, TypeError):
            log.info("cache: a damaged line in %s is left out", path)
    if text and not text.endswith("\n"):
        with open(path, "a", encoding="utf-8") as manifest:
            manifest.write("\n")
    return lines


def _is_whole(folder: Path, job: ImageJob, known: dict[str, dict[str, Any]]) -> bool:
    """Whether an image is there with the content that its manifest line says."""
    path = folder / f"{job.key}.png"
    if job.key not in known or not path.exists():
        return False
    if digest(path.read_bytes()) == known[job.key].get("sha256"):
        return True
    log.info("cache: %s is thrown away and made again: its content does not match its key", path)
    return False
