"""Train the denoiser on latents of rendered type, with captions.

It uses the text tower of the CLIP and the latents of the autoencoder, so both must be trained first and must not change
afterwards.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from air_plugin.mini.models import (
    CONTEXT_LENGTH,
    NOISE,
    TEXT_WIDTH,
    build_pipeline,
    build_tokenizer,
    build_unet,
    read_clip,
    read_unet,
    read_vae,
)
from air_plugin.mini.training.captions import DIGIT_NAMES, describe
from air_plugin.mini.training.common import SEED, Log, build_optimiser, load_corpus, save_json, save_weights, set_rate
from air_plugin.mini.training.corpus import Corpus

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from open_clip import CLIP

STEPS = 5000
BATCH = 64
POOL = 40_000  # pictures encoded up front
DROPPED = 0.1  # share of empty captions, for guidance
PEAK = 1e-3


class Latents:
    """Encoded pictures with a caption each.

    Args:
        means: (N, 4, 8, 8), scaled to unit variance.
        words: (N, 32, 128) fp16, the text tower's states of the captions.
        silence: (32, 128), of the empty caption.
    """

    def __init__(self, means: Tensor, words: Tensor, silence: Tensor) -> None:
        self.means, self.words, self.silence = means, words, silence

    @classmethod
    @torch.no_grad()
    def of(cls, corpus: Corpus, vae: AutoencoderKL, clip: CLIP, *, count: int, seed: int) -> Latents:
        """Sample, describe and encode. Means suffice: the posterior's variance is far below the noise's."""
        generator, rng = torch.Generator().manual_seed(seed + 20), np.random.default_rng(seed + 20)
        means = torch.empty(count, 4, 8, 8)
        words = torch.empty(count, CONTEXT_LENGTH, TEXT_WIDTH, dtype=torch.half)
        tokenizer = build_tokenizer()
        for start in range(0, count, 500):
            part = slice(start, min(start + 500, count))
            images, looks = corpus.sample(part.stop - start, generator)
            means[part] = vae.encode(images * 2 - 1).latent_dist.mean * vae.config.scaling_factor
            words[part] = text_states(clip, tokenizer([describe(look, rng)[0] for look in looks])).half()
        return cls(means, words, text_states(clip, tokenizer([""]))[0])

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Latents (size, 4, 8, 8) and words (size, 32, 128), a tenth of them of the empty caption."""
        chosen = torch.randint(len(self.means), (size,), generator=generator)
        silent = torch.rand(size, generator=generator) < DROPPED
        words = torch.where(silent.view(-1, 1, 1), self.silence, self.words[chosen].float())
        return self.means[chosen], words


def text_states(clip: CLIP, tokens: Tensor) -> Tensor:
    """(N, 32) tokens -> (N, 32, 128), what transformers calls last_hidden_state."""
    hidden = clip.token_embedding(tokens) + clip.positional_embedding
    return clip.ln_final(clip.transformer(hidden, attn_mask=clip.attn_mask))


def rate(step: int, steps: int) -> float:
    """Warm-up, level, and linearly down over the last two fifths: a checkpoint on the way is usable."""
    return PEAK * min((step + 1) / min(200, steps // 10 + 1), 1.0, (steps - step) / (0.4 * steps))


def diffusion_loss(
    unet: UNet2DConditionModel, scheduler: DDPMScheduler, latents: Tensor, words: Tensor, *, generator: torch.Generator
) -> Tensor:
    """Mean squared error of the predicted velocity.

    Args:
        unet: the denoiser.
        scheduler: of the noise levels.
        latents: (N, 4, 8, 8), unit variance.
        words: (N, 32, 128).
        generator: for times and noise.
    """
    times = torch.randint(scheduler.config.num_train_timesteps, (len(latents),), generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    noisy = scheduler.add_noise(latents, noise, times)
    return F.mse_loss(unet(noisy, times, words).sample, scheduler.get_velocity(latents, noise, times))


def average(kept: dict[str, Tensor], unet: UNet2DConditionModel, *, step: int) -> None:
    """Exponential moving average of the weights, with a smaller decay at the start."""
    decay = min(0.999, (step + 1) / (step + 20))
    current = unet.state_dict()
    torch._foreach_lerp_(list(kept.values()), [current[name] for name in kept], 1 - decay)


def train_unet(corpus: Corpus, out: Path, *, steps: int = STEPS, seed: int = SEED, pool: int = POOL) -> Path:
    """Train and write unet.safetensors (the averaged weights); checkpoints every 500 steps."""
    from diffusers import DDPMScheduler

    generator, scheduler = torch.Generator().manual_seed(seed + 21), DDPMScheduler(**NOISE)
    latents = Latents.of(corpus, read_vae(out), read_clip(out / "clip.safetensors"), count=pool, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # diffusers initialises from the global state
        unet = build_unet()
    unet.train()
    kept = {name: value.clone() for name, value in unet.state_dict().items()}
    optimiser = build_optimiser(unet.parameters(), decay=0.01, fused=True)
    log = Log("unet")
    for step in range(steps):
        set_rate(optimiser, rate(step, steps))
        loss = diffusion_loss(unet, scheduler, *latents.batch(BATCH, generator), generator=generator)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimiser.step()
        average(kept, unet, step=step)
        log.add(step, loss=loss.item())
        if (step + 1) % 250 == 0:
            save_weights(kept, out / "unet.safetensors")
    save_weights(kept, out / "unet.safetensors")
    return out / "unet.safetensors"


@torch.no_grad()
def agreement(out: Path, *, count: int = 50, seed: int = SEED) -> dict[str, float]:
    """How often the CLIP classifies a generated image as its prompt: digits among 10, letters among 26."""
    import string

    from air_plugin.mini.training.train_clip import normalise

    clip, tokenizer = read_clip(out / "clip.safetensors"), build_tokenizer()
    pipe = build_pipeline(read_vae(out), read_unet(out / "unet.safetensors"), clip)
    metrics = {}
    for kind, names in (("digit", list(DIGIT_NAMES)), ("letter", list(string.ascii_lowercase))):
        each = count if kind == "digit" else count // 5
        texts = [f"a photo of the {kind} {name}." for name in names]
        heads = clip.encode_text(tokenizer(texts), normalize=True)
        generator, right = torch.Generator().manual_seed(seed + 22), 0
        for index, text in enumerate(texts):
            images = pipe(
                prompt=[text] * each,
                height=32,
                width=32,
                num_inference_steps=12,
                guidance_scale=3,
                generator=generator,
                output_type="pt",
            ).images
            seen = (clip.encode_image(normalise(images), normalize=True) @ heads.T).argmax(1)
            right += int((seen == index).sum())
        metrics[f"agreement_{kind}s"] = round(right / (each * len(names)), 4)
    return metrics


def main(out: Path, *, steps: int = STEPS, fonts: str = "debian") -> dict[str, float]:
    """Train, measure `agreement`, write unet.json. Needs the other two models in `out`."""
    needed = ("clip.safetensors", "vae.safetensors", "vae_config.json")
    missing = [name for name in needed if not (out / name).exists()]
    if missing:
        raise FileNotFoundError(f"unet: {', '.join(missing)} not in {out}; train clip and vae first")
    start = time.monotonic()
    train_unet(load_corpus(fonts, out), out, steps=steps)
    metrics = {"steps": steps, "seconds": round(time.monotonic() - start)} | agreement(out)
    save_json(metrics, out / "unet.json")
    return metrics
