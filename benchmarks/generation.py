"""Generation of images, compared with its U-Net and its decoder alone, and with the former way.

    python -m benchmarks.generation --threads 1                           # the embedded generator on the CPU, a minute
    python -m benchmarks.generation --device cuda --batch 16 64           # SD 1.5 at 256 px with random weights
    python -m benchmarks.generation --device cuda --batch 64 --compile

`generate` encodes prompts, makes noise, runs the sampler, and writes checked PNG files. Beside it the U-Net and the
decoder alone, with the same settings: as many steps on one noise, then decoding. The former way encodes the prompts of
every batch, and writes the files while the device waits. All take turns in one process; on a CPU the images of the
former way are compared bit by bit. The target is a share of at least 0.92 on a GPU, at batch 16 and 64. Arithmetic is
counted as in benchmarks/generator_flops.py; the peak is that of the maker's data sheet for a known card, else the best
of a large product of the same turns. With one thread on the CPU its own seconds are counted, so that other programs do
not matter.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from air_plugin.config import LoraSettings
from air_plugin.diffusion.compile import compiled
from air_plugin.diffusion.generate import generate
from air_plugin.diffusion.jobs import ImageJob, plan_jobs
from air_plugin.diffusion.lora import add_adapter
from air_plugin.diffusion.sampling import encode_once, text_keys_reused
from air_plugin.diffusion.writers import MANIFEST, write_image
from air_plugin.utils.files import to_json
from benchmarks import generator_flops as counts
from benchmarks.lora_step import peak_of
from benchmarks.prompt_step import CLASSES, positive

TARGET = 0.92
TEMPLATE = "a photo of a {}."


@dataclass(frozen=True)
class Task:
    """What is generated: a pipeline, its sampling and the arithmetic of an image.

    flops: of an image: every step of the U-Net, twice with guidance, and decoding.
    """

    name: str
    pipeline: Any
    pixels: int
    steps: int
    guidance: float
    flops: int


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    task = (embedded if options.size == "tiny" else sd15)(options)
    device, precision = task.pipeline.device, str(task.pipeline.unet.dtype).removeprefix("torch.")
    print(
        f"{task.name}, {task.pixels} px, {task.steps} steps, guidance {task.guidance:g}, {precision}, "
        f"{task.flops / 1e12:.4f} TFLOP an image"
    )
    print(
        f"{device_name(device)}, {options.threads} threads; "
        f"median of {options.turns} turns of {options.batches} batches"
    )
    if options.rank:
        task.pipeline.unet.requires_grad_(False)
        dtype = task.pipeline.unet.dtype
        add_adapter(task.pipeline.unet, LoraSettings(rank=options.rank), 0)
        task.pipeline.unet.to(dtype)  # as adapters are that are loaded
    for size in options.batch:
        speed = measure(task, size, options)
        print(
            f"batch {size}: U-Net and decoder alone {speed.alone:.2f} images/s, generate {speed.generate:.2f}, "
            f"share {speed.generate / speed.alone:.2f}\n"
            f"    {speed.generate / speed.former:.2f} times as fast as the former way ({speed.former:.2f} images/s), "
            f"largest difference of a pixel {speed.difference}\n"
            f"    {speed.generate * task.flops / speed.peak:.3f} of the peak of {speed.peak / 1e12:.3g} TFLOP/s "
            f"({speed.source})"
        )
        if speed.difference and options.device == "cpu" and not options.compile:
            print("error: the images are not those of the former way", file=sys.stderr)
            return 1
    print(f"target on a GPU: a share of at least {TARGET}")
    return 0


@dataclass(frozen=True)
class Speed:
    """Images a second of U-Net and decoder alone, of `generate` and of the former way.

    difference: the largest between pixels of the last two, of 255.
    peak: of the device, in FLOP/s.
    source: of the peak.
    """

    alone: float
    generate: float
    former: float
    difference: int
    peak: float
    source: str


def measure(task: Task, size: int, options: argparse.Namespace) -> Speed:
    """Measure all ways, and the large product, in turns."""
    images = size * options.batches
    jobs = plan_jobs(
        CLASSES,
        template=TEMPLATE,
        images_per_class=-(-images // len(CLASSES)),
        seed=0,
        steps=task.steps,
        guidance=task.guidance,
        size=task.pixels,
        weights="random",
    )[:images]
    device, dtype = task.pipeline.device, task.pipeline.unet.dtype
    product, product_flops = large_product(device, dtype)
    seconds: list[list[float]] = [[], [], [], []]
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder) / name for name in ("generate", "former")]
        ways: list[Callable[[], object]] = [
            lambda: run_alone(task, size, options),
            lambda: run_generate(task, jobs, fresh(places[0]), size, options),
            lambda: run_former(task, jobs, fresh(places[1]), size),
            product,
        ]
        for turn in range(1 + options.turns):
            for way in (0, 1, 2, 3, 3, 3) if turn % 2 else (3, 3, 3, 2, 1, 0):
                seconds[way].append(timed(ways[way], device))
        files = [[place / f"{job.key}.png" for job in jobs] for place in places]
        made, before = (np.stack([np.asarray(Image.open(path)).astype(int) for path in paths]) for paths in files)
    alone, whole, former = (images / statistics.median(measured[1:]) for measured in seconds[:3])  # [0] warms up
    difference = int(np.abs(made - before).max())
    known = peak_of(device_name(device)) if dtype == torch.bfloat16 else None
    if known is not None:
        return Speed(alone, whole, former, difference, 1e12 * known, "data sheet, dense bf16")
    peak = product_flops / min(seconds[3])
    return Speed(alone, whole, former, difference, peak, "the best of a large product measured here")


def fresh(folder: Path) -> Path:
    """The folder, empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def run_generate(task: Task, jobs: Sequence[ImageJob], folder: Path, size: int, options: argparse.Namespace) -> None:
    report = generate(task.pipeline, jobs, folder, batch_size=size, compile_unet=bool(options.compile))
    assert (report.generated, report.failed) == (len(jobs), 0)


@torch.no_grad()
def run_former(task: Task, jobs: Sequence[ImageJob], folder: Path, size: int) -> None:
    """One thing after another: prompts, steps and decoding of a batch by diffusers, the copy, files and manifest."""
    for start in range(0, len(jobs), size):
        batch = jobs[start : start + size]
        output = task.pipeline(
            prompt=[job.prompt for job in batch],
            num_inference_steps=task.steps,
            guidance_scale=task.guidance,
            height=task.pixels,
            width=task.pixels,
            generator=[torch.Generator("cpu").manual_seed(job.seed) for job in batch],
            output_type="pt",
        )
        values = output.images.float().clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
        for job, image in zip(batch, values, strict=True):
            levels = np.round(image * 255)
            assert np.isfinite(image).all() and np.ptp(levels, axis=(0, 1)).max() > 0
            line = {**asdict(job), "sha256": write_image(folder / f"{job.key}.png", levels.astype(np.uint8))}
            with open(folder / MANIFEST, "a", encoding="utf-8") as manifest:
                manifest.write(to_json(line) + "\n")


def large_product(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], object], int]:
    """A product of matrices on a GPU, a convolution on a CPU (there it is the faster one); and its FLOPs."""
    if device.type == "cuda":
        matrix = torch.ones(8192, 8192, device=device, dtype=dtype)
        return lambda: matrix @ matrix, 2 * 8192**3
    images, weight = torch.ones(64, 128, 16, 16, dtype=dtype), torch.ones(128, 128, 3, 3, dtype=dtype)
    return lambda: torch.nn.functional.conv2d(images, weight, padding=1), 2 * images.numel() * 128 * 9


@torch.no_grad()
def run_alone(task: Task, size: int, options: argparse.Namespace) -> None:
    """The U-Net's steps and the decoding of some batches, on one noise and the same prompts."""
    pipeline, unet = task.pipeline, task.pipeline.unet
    encoded = encode_once(pipeline, [TEMPLATE.format("sea")], guidance=task.guidance)
    given = encoded.arguments([TEMPLATE.format("sea")] * size)
    states = torch.cat([given[name] for name in ("negative_prompt_embeds", "prompt_embeds") if name in given])
    side = task.pixels // pipeline.vae_scale_factor
    latents = torch.randn(len(states), unet.config.in_channels, side, side, generator=torch.Generator().manual_seed(0))
    latents = latents.to(unet.device, unet.dtype)
    step = torch.tensor(500, device=unet.device)
    used: AbstractContextManager[Any] = compiled(unet) if options.compile else text_keys_reused(unet)
    with used as forget:
        for _ in range(options.batches):
            forget()  # `generate` computes the text's keys once a batch
            for _ in range(task.steps):
                unet(latents, step, encoder_hidden_states=states, return_dict=False)
            pipeline.vae.decode(latents[:size], return_dict=False)


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds until the device has finished; with one thread on the CPU, seconds of the CPU."""
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def embedded(options: argparse.Namespace) -> Task:
    """The generator that comes with the package."""
    from air_plugin import mini
    from air_plugin.mini import models

    pixels, steps, guidance = options.pixels or models.IMAGE_SIZE, options.steps or 12, 2.0
    pipeline = mini.load_pipeline(torch.float32).to(options.device)
    side = pixels // pipeline.vae_scale_factor
    with counts.meta(), torch.no_grad():
        unet, vae = models.build_unet(), models.build_vae()
        states = torch.empty(1, models.CONTEXT_LENGTH, models.TEXT_WIDTH)
        latents, moment = torch.empty(1, 4, side, side), torch.tensor(500)
        denoising = counts.count(unet, lambda: unet(latents, moment, encoder_hidden_states=states)).flops
        decoding = counts.count(vae, lambda: vae.decode(latents)).flops
    flops = flops_of_image(pipeline.unet, models.CONTEXT_LENGTH, denoising, decoding, steps, options.compile)
    return Task("embedded generator", pipeline, pixels, steps, guidance, flops)


def sd15(options: argparse.Namespace) -> Task:
    """The architecture of SD 1.5 with random weights."""
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    from air_plugin.mini.models import build_hf_tokenizer

    pixels, steps, guidance = options.pixels or 256, options.steps or 20, 2.0
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    tokenizer = build_hf_tokenizer()
    tokenizer.model_max_length = counts.TOKENS
    torch.manual_seed(0)
    with torch.device(options.device):
        unet, vae = counts.build_unet("sd15"), counts.build_vae("sd15")
        text = counts.build_text_towers("sd15")[0]
    for part in (unet, vae, text):
        part.to(dtype).eval().requires_grad_(False)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DPMSolverMultistepScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    denoising, decoding = counts.unet_cost("sd15", pixels).flops, counts.vae_cost("sd15", pixels).flops
    flops = flops_of_image(unet, counts.TOKENS, denoising, decoding, steps, options.compile)
    return Task("SD 1.5, random weights", pipeline, pixels, steps, guidance, flops)


def flops_of_image(unet: Any, tokens: int, denoising: int, decoding: int, steps: int, compiled: bool) -> int:
    """FLOPs with guidance. The keys and values of the text are computed in one step, or compiled in every step."""
    keys = [
        value for name, value in unet.named_parameters() if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
    ]
    saved = 0 if compiled else (steps - 1) * sum(2 * tokens * value.numel() for value in keys)
    return 2 * (steps * denoising - saved) + decoding


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Generation of images, beside its U-Net and its decoder alone.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--size", choices=["tiny", "sd15"], help="tiny: the embedded generator; default: sd15 on a GPU")
    parser.add_argument("--batch", type=positive, nargs="+", default=[16], help="images at once; several are measured")
    parser.add_argument("--batches", type=positive, default=4, help="in each turn")
    parser.add_argument("--turns", type=positive, default=3, help="of each way, after one that warms up")
    parser.add_argument("--steps", type=positive, help="sampling steps; default: 12 (tiny), 20 (sd15)")
    parser.add_argument("--pixels", type=positive, help="side of the images; default: 32 (tiny), 256 (sd15)")
    parser.add_argument("--rank", type=int, default=0, help="of an adapter on the attention layers; 0: none")
    parser.add_argument("--compile", action="store_true", help="with torch.compile, both ways")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    options.size = options.size or ("sd15" if options.device == "cuda" else "tiny")
    return options


if __name__ == "__main__":
    sys.exit(main())
