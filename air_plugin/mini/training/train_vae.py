"""Train the autoencoder on rendered type: 32 x 32 x 3 pictures to 8 x 8 x 4 latents and back."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from air_plugin.mini.models import build_vae, read_vae
from air_plugin.mini.training.common import (
    SEED,
    Log,
    build_optimiser,
    learning_rate,
    load_corpus,
    save_json,
    save_weights,
    set_rate,
)
from air_plugin.mini.training.corpus import Corpus

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

STEPS = 4000
BATCH = 32
CHUNK = 8  # batches that are rendered together, which is faster
KL_WEIGHT = 1e-5


def vae_loss(vae: AutoencoderKL, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """L1 plus squared error of the reconstruction, plus KL_WEIGHT times the KL divergence to N(0, I).

    Args:
        vae: the autoencoder.
        images: (N, 3, 32, 32) in [-1, 1].
        noise: (N, 4, 8, 8), standard normal.

    Returns:
        The loss, and the mean squared error on [0, 1] for PSNR.
    """
    posterior = vae.encode(images).latent_dist
    mean, deviation = posterior.mean.float(), posterior.std.float()
    output = vae.decode(mean + deviation * noise).sample.float()
    divergence = 0.5 * (mean**2 + deviation**2 - 1 - 2 * deviation.log()).sum(dim=(1, 2, 3)).mean()
    squared = F.mse_loss(output, images)
    return F.l1_loss(output, images) + squared + KL_WEIGHT * divergence, squared.detach() / 4


def train_vae(corpus: Corpus, out: Path, *, steps: int = STEPS, seed: int = SEED) -> Path:
    """Train and write vae.safetensors and its scaling factor; checkpoints every 500 steps."""
    generator = torch.Generator().manual_seed(seed + 10)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # diffusers initialises from the global state
        vae = build_vae()
    vae.train()
    optimiser = build_optimiser(vae.parameters(), decay=0.01)
    log = Log("vae", every=250)
    pictures = torch.empty(0)
    for step in range(steps):
        set_rate(optimiser, learning_rate(step, steps, peak=2e-3, warm_up=min(200, steps // 10 + 1)))
        if step % CHUNK == 0:
            pictures = corpus.sample(BATCH * CHUNK, generator)[0] * 2 - 1
        images = pictures[step % CHUNK * BATCH :][:BATCH]
        noise = torch.randn(BATCH, 4, 8, 8, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            loss, squared = vae_loss(vae, images, noise)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        log.add(step, loss=loss.item(), psnr=float(-10 * squared.log10()))
        if (step + 1) % 500 == 0:
            save_weights(vae.state_dict(), out / "vae.safetensors")
    save_weights(vae.state_dict(), out / "vae.safetensors")
    save_json({"scaling_factor": measure_scale(vae, corpus)}, out / "vae_config.json")
    return out / "vae.safetensors"


@torch.no_grad()
def measure_scale(vae: AutoencoderKL, corpus: Corpus, *, seed: int = SEED) -> float:
    """1 / standard deviation of the latents of 1,000 pictures, so that diffusion sees unit variance."""
    images, _ = corpus.sample(1000, torch.Generator().manual_seed(seed + 11))
    return round(1 / float(vae.encode(images * 2 - 1).latent_dist.mean.std()), 5)


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, corpus: Corpus, *, seed: int = SEED, count: int = 1000) -> float:
    """Mean PSNR in dB of reconstructions from the latents' means."""
    images, _ = corpus.sample(count, torch.Generator().manual_seed(seed + 12))
    output = vae.decode(vae.encode(images * 2 - 1).latent_dist.mean).sample.clamp(-1, 1) / 2 + 0.5
    return float((-10 * (output - images).square().mean(dim=(1, 2, 3)).log10()).mean())


def main(out: Path, *, steps: int = STEPS, fonts: str = "debian") -> dict[str, float]:
    """Train, measure PSNR on held-out families, write vae.json."""
    start = time.monotonic()
    train_vae(load_corpus(fonts, out), out, steps=steps)
    metrics: dict[str, float] = {"steps": steps, "seconds": round(time.monotonic() - start)}
    part = "held_out" if fonts == "debian" else "train"
    metrics[f"psnr_{part}"] = round(reconstruction_psnr(read_vae(out), load_corpus(fonts, out, part=part)), 2)
    save_json(metrics, out / "vae.json")
    return metrics
