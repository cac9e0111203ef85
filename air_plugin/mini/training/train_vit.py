"""Train the image tower of mini_vit on rendered type: text tower and teacher, a ResNet, are those of mini, frozen."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from air_plugin.mini import load_clip
from air_plugin.mini.models import build_clip, build_tokenizer, read_vit
from air_plugin.mini.training.captions import NAMES, Look, call_by_name, describe, match
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
from air_plugin.mini.training.train_clip import (
    CAPTIONS,
    PICTURES,
    contrast,
    encode_short,
    name_indices,
    normalise,
    zero_shot_metrics,
)

if TYPE_CHECKING:
    from open_clip import CLIP

STEPS = 1800
PEAK = 2e-3  # of the learning rate
TEACHER = 10.0  # weight of the distance to the teacher's features
EVERY = 200  # steps between checkpoints


def distillation_loss(
    clip: CLIP, pictures: Tensor, teacher: Tensor, captions: Tensor, looks: Sequence[Look], truth: Tensor
) -> Tensor:
    """Distance to the teacher, plus the losses that mini's CLIP was trained with.

    Args:
        clip: for its temperature.
        pictures: (N, D), as encoded by the ViT.
        teacher: (N, D), the same pictures as encoded by mini's ResNet.
        captions: (36 + M, D), unit norm: one caption a name, in the order of NAMES, then M described ones.
        looks: what the N pictures show.
        truth: (N, M) in {0, 1}.
    """
    distance = 1 - F.cosine_similarity(pictures, teacher, dim=1).mean()
    similarity = clip.logit_scale.exp() * F.normalize(pictures, dim=-1) @ captions.T
    named = F.cross_entropy(similarity[:, : len(NAMES)], name_indices(looks))
    return TEACHER * distance + named + contrast(similarity[:, len(NAMES) :], truth)


def train_vit(corpus: Corpus, clip: CLIP, out: Path, *, steps: int = STEPS, seed: int = SEED) -> Path:
    """Train and write vit.safetensors. A checkpoint of every 200 steps lies beside it; a later call goes on from there.

    What is sampled at a step depends on the seed and the step alone, so a resumed run equals an undisturbed one.

    Args:
        corpus: rendered type.
        clip: mini's CLIP, frozen: the teacher, and the text tower.
        out: folder for weights and checkpoint.
        steps: of the whole training. A checkpoint of another number of steps, seed or number of faces is not used.
        seed: of initial values and samples.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # open_clip initialises from the global state
        tower = build_clip(vocabulary=1, vit=True).visual
    tokenizer = build_tokenizer()
    optimiser = build_optimiser(tower.parameters(), decay=0.05)
    checkpoint = out / "vit.checkpoint"
    run = {"steps": steps, "seed": seed, "faces": len(corpus.faces)}
    first = load_checkpoint(checkpoint, tower, optimiser, run=run)
    tower.train()
    log = Log("vit")
    for step in range(first, steps):
        set_rate(optimiser, learning_rate(step, steps, peak=PEAK, warm_up=min(100, steps // 10 + 1)))
        generator, rng = torch.Generator().manual_seed(seed * 1_000_000 + step), np.random.default_rng([seed, step])
        images, looks = corpus.sample(PICTURES, generator)
        texts, claims = zip(*(describe(look, rng) for look in looks[:CAPTIONS]), strict=True)
        tokens = tokenizer([*(call_by_name(name, rng) for name in NAMES), *texts])
        pixels = normalise(images)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                captions = encode_short(clip, tokens[:, : int((tokens > 0).sum(1).max())])
                teacher = clip.visual(pixels)
            pictures = tower(pixels)
        claimed = match(looks, claims)
        loss = distillation_loss(clip, pictures.float(), teacher.float(), captions.float(), looks, claimed)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimiser.step()
        cosine = F.cosine_similarity(pictures.detach().float(), teacher.float(), dim=1).mean()
        log.add(step, loss=loss.item(), cosine=cosine.item())
        if (step + 1) % EVERY == 0:
            save_checkpoint(checkpoint, tower, optimiser, step=step + 1, run=run)
    save_weights(tower.state_dict(), out / "vit.safetensors")
    checkpoint.unlink(missing_ok=True)
    return out / "vit.safetensors"


def save_checkpoint(
    path: Path, tower: nn.Module, optimiser: torch.optim.Optimizer, *, step: int, run: Mapping[str, int]
) -> None:
    """Write weights, the optimiser's state, the number of steps done and the run's settings, whole or not at all."""
    partial = path.with_suffix(".partial")
    state = {"step": step, "run": dict(run), "tower": tower.state_dict(), "optimiser": optimiser.state_dict()}
    torch.save(state, partial)
    os.replace(partial, path)


def load_checkpoint(path: Path, tower: nn.Module, optimiser: torch.optim.Optimizer, *, run: Mapping[str, int]) -> int:
    """The number of steps done, 0 where no checkpoint of a run with these settings lies at `path`."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    if state["run"] != run:
        return 0
    tower.load_state_dict(state["tower"])
    optimiser.load_state_dict(state["optimiser"])
    return int(state["step"])


def main(out: Path, *, steps: int = STEPS, fonts: str = "debian") -> dict[str, float]:
    """Train, evaluate on held-out families and on the development handwriting, write vit.json."""
    start, clip = time.monotonic(), load_clip()
    path = train_vit(load_corpus(fonts, out), clip, out, steps=steps)
    metrics: dict[str, float] = {"steps": steps, "seconds": round(time.monotonic() - start)}
    metrics |= zero_shot_metrics(read_vit(path, clip), out, fonts=fonts)
    save_json(metrics, out / "vit.json")
    return metrics
