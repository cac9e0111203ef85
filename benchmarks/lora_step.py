"""A step of LoRA training, as it is now and as it was before the steps were captured.

    python -m benchmarks.lora_step                   # on a CPU: the embedded generator, half a minute on 2 cores
    python -m benchmarks.lora_step --device cuda     # SD 1.5 at 256 px, batch 16, rank 16, attention, bf16

Target: at most 60 ms a step of SD 1.5 on an H100, where the former way was measured at 165 ms (docs/performance.md); on
a CPU not slower than before. SD 1.5's weights are random, so nothing is fetched.

The former way: autocast, fp32 weights in the layers, AdamW of torch's choice, and the loss read in every step. Now:
`air_plugin.diffusion.lora_step`; on a GPU also without the graph, and with the U-Net in channels_last, which the
library does not use. All train the same adapter on the same batches, and take turns; a ratio is the median of those of
neighbouring turns. Operations are counted for the forward and backward pass of the U-Net, as in generator_flops.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from air_plugin.config import LoraSettings
from air_plugin.diffusion.family import Conditioning
from air_plugin.diffusion.lora import READ_EVERY, add_adapter
from air_plugin.diffusion.lora_step import Examples, LoraStep, Losses, denoising_loss
from air_plugin.diffusion.pipeline import load_generator
from air_plugin.utils.tensors import DTYPES
from benchmarks.generator_flops import ATTENTION, DEVICES, TOKENS, as_on_a_gpu, build_unet
from benchmarks.prompt_step import positive

# Of loss, relative: the former way and the present one round differently, and bf16 has 8 bits.
TOLERANCE = {"fp32": 1e-4, "bf16": 0.05, "fp16": 0.05}
# Part of a card's name -> peak of dense bf16 products, TFLOP/s, from the makers' data sheets; the first one that fits.
PEAKS = {"H100 PCIe": 756.0, "H100": DEVICES["H100 SXM"], "H200": 989.0, "A100": 312.0, "RTX 4090": 165.2}
TARGET_MS = 60  # of SD 1.5 on an H100
IMAGES, CAPTIONS = 64, 10


@dataclass(frozen=True)
class Case:
    """What is trained: a U-Net on its device, what it is trained on, and the settings."""

    unet: Any
    scheduler: Any
    examples: Examples
    texts: Conditioning
    settings: LoraSettings
    pixels: int

    def adapted(self) -> tuple[Any, dict[str, torch.nn.Parameter]]:
        """A copy of the U-Net with an adapter, the same on every call, and the adapter's parameters."""
        unet = copy.deepcopy(self.unet)
        return unet, add_adapter(unet, self.settings, seed=0)


class Way:
    """One way to train; `times` are seconds a step, one for each turn."""

    def __init__(self, name: str, step: Callable[[int], None], losses: Losses) -> None:
        self.name, self._step, self.losses = name, step, losses
        self.times: list[float] = []
        self.done = 0

    def turn(self, steps: int) -> None:
        """Train on the next batches, and wait for the device at the end."""
        start = time.perf_counter()
        for _ in range(steps):
            self._step(self.done)
            self.done += 1
        self.losses.read()
        self.times.append((time.perf_counter() - start) / steps)

    @property
    def milliseconds(self) -> float:
        return 1e3 * statistics.median(self.times[1:])  # the first turn warms up, and captures

    def ratio(self, other: Way) -> float:
        """How many times faster than another way."""
        return statistics.median(b / a for a, b in zip(self.times[1:], other.times[1:], strict=True))


def former_way(case: Case) -> Way:
    unet, layers = case.adapted()
    optimizer = torch.optim.AdamW(layers.values(), lr=case.settings.lr)
    losses = Losses([], lr=case.settings.lr, every=1)
    device, half = case.texts.states.device, unet.dtype != torch.float32

    def step(number: int) -> None:
        batch = case.examples.batch(case.settings.batch, seed=0, step=number)
        texts = case.texts[batch["captions"]]
        latents, noise, steps = (batch[name].to(device) for name in ("latents", "noise", "steps"))
        with torch.autocast(device.type, dtype=unet.dtype, enabled=half):
            loss = denoising_loss(unet, case.scheduler, latents, states=texts.states, noise=noise, steps=steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.add(loss.detach())

    return Way("former way", step, losses)


def present_way(case: Case, name: str = "now", *, graphs: bool = True, channels_last: bool = False) -> Way:
    unet, layers = case.adapted()
    if channels_last:
        unet.to(memory_format=torch.channels_last)
    settings, on_gpu = case.settings, case.texts.states.device.type == "cuda"
    train = LoraStep(unet, case.scheduler, layers, case.texts, lr=settings.lr, size=case.pixels, graphs=graphs)
    losses = Losses([], lr=settings.lr, every=READ_EVERY if on_gpu else 1)
    return Way(name, lambda number: losses.add(train(case.examples.batch(settings.batch, seed=0, step=number))), losses)


def make_case(options: argparse.Namespace) -> Case:
    """The embedded generator's U-Net with its settings (tiny), or SD 1.5's architecture with random weights."""
    from diffusers import DDPMScheduler

    device, dtype = torch.device(options.device), DTYPES[options.precision]
    targets: tuple[str, ...] = ATTENTION
    if options.size == "tiny":
        unet, pixels, factor = load_generator("mini", precision=options.precision).pipeline.unet.to(device), 32, 4
        targets, batch = (*targets, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"), 32
    else:
        unet, pixels, factor, batch = random_unet(options.size, device, dtype), 256, 8, 16
    unet.eval().requires_grad_(False)
    rng = torch.Generator().manual_seed(1)
    channels, side = unet.config.in_channels, pixels // factor
    moments = torch.randn(IMAGES, 2 * channels, side, side, generator=rng)
    moments[:, channels:] -= 5  # log-variances
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    captions = torch.randint(CAPTIONS, (IMAGES,), generator=rng)
    examples = Examples(moments, captions, 1.0, scheduler.config.num_train_timesteps)
    states = torch.randn(CAPTIONS, TOKENS, unet.config.cross_attention_dim, generator=rng)
    settings = LoraSettings(rank=options.rank, targets=targets, batch=options.batch or batch)
    return Case(unet, scheduler, examples, Conditioning(states.to(device, dtype)), settings, pixels)


def random_unet(architecture: str, device: torch.device, dtype: torch.dtype) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return build_unet(architecture)
    finally:
        torch.set_default_dtype(before)


def flops_of(case: Case) -> int:
    """Of the forward and backward pass of a step, counted on the meta device."""
    unet, _ = case.adapted()
    torch.nn.Module.to(unet, "meta", torch.bfloat16)  # diffusers' own method warns
    batch = case.examples.batch(case.settings.batch, seed=0, step=0)
    latents, steps = batch["latents"].to("meta", torch.bfloat16), batch["steps"].to("meta")
    states = case.texts.states[batch["captions"]].to("meta", torch.bfloat16)
    with as_on_a_gpu(), FlopCounterMode(display=False) as counter:
        unet(latents, steps, encoder_hidden_states=states).sample.float().square().mean().backward()
    return int(counter.get_total_flops())


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    case = make_case(options)
    ways = [former_way(case), present_way(case)]
    if options.device == "cuda":
        ways += [
            present_way(case, "without a graph", graphs=False),
            present_way(case, "channels_last", channels_last=True),
        ]
    for turn in range(1 + options.turns):
        for way in ways if turn % 2 else ways[::-1]:
            way.turn(options.steps)
    return report(case, ways, options)


def peak_of(card: str) -> float | None:
    """The card's peak of dense bf16 products in TFLOP/s; None where it is not known."""
    return next((peak for part, peak in PEAKS.items() if part in card), None)


def report(case: Case, ways: Sequence[Way], options: argparse.Namespace) -> int:
    """Print the table; returns the exit code."""
    flops = flops_of(case)
    card = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {options.threads} threads"
    peak = peak_of(card) if options.precision != "fp32" else None
    print(
        f"{options.size} U-Net, {case.pixels} px, batch {case.settings.batch}, rank {case.settings.rank}, "
        f"{options.precision}, {card}; {flops / 1e12:.3g} TFLOP a step; median of {options.turns} turns "
        f"of {options.steps} steps"
    )
    former = ways[0]
    differences = []
    for way in ways:
        speed = flops / way.milliseconds / 1e9
        share = f" {speed / peak:7.1%} of the peak" if peak else ""
        print(f"{way.name:16s}{way.milliseconds:10.1f} ms {way.ratio(former):6.2f} x {speed:9.3g} TFLOP/s{share}")
        a, b = torch.tensor(former.losses.values), torch.tensor(way.losses.values)
        differences.append(float(((a - b).abs() / a).max()))
    print(f"largest relative difference of a loss: {max(differences):.1e}")
    if options.size == "sd15" and "H100" in card:
        reached = "reached" if ways[1].milliseconds <= TARGET_MS else "missed"
        print(f"target of {TARGET_MS} ms: {reached}")
    if max(differences) > TOLERANCE[options.precision]:
        print(f"error: the losses differ by more than {TOLERANCE[options.precision]:g}", file=sys.stderr)
        return 1
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A step of LoRA training, beside the former way.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=("tiny", "sd15"), help="default: tiny on a CPU, sd15 on a GPU")
    parser.add_argument("--precision", choices=tuple(DTYPES), help="default: fp32 on a CPU, bf16 on a GPU")
    parser.add_argument("--batch", type=positive, help="default: 32 (tiny), 16 (sd15)")
    parser.add_argument("--rank", type=positive, default=16)
    parser.add_argument("--turns", type=positive, default=15, help="of each way, after one that warms up")
    parser.add_argument("--steps", type=positive, help="of each turn; default: 3 on a CPU, 20 on a GPU")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")
    on_gpu = options.device == "cuda"
    options.size = options.size or ("sd15" if on_gpu else "tiny")
    options.steps = options.steps or (20 if on_gpu else 3)
    options.precision = options.precision or ("bf16" if on_gpu else "fp32")
    return options


if __name__ == "__main__":
    sys.exit(main())
