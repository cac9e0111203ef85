"""Shared code of the three trainings: fonts, schedules, atomic files."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from air_plugin.mini.training.corpus import Corpus, render_masks
from air_plugin.mini.training.fonts import find_faces, is_held_out
from air_plugin.utils.files import to_json

log = logging.getLogger(__name__)

SEED = 2025


def load_corpus(fonts: str, out: Path, *, part: str = "train") -> Corpus:
    """The corpus of a source of fonts; masks are kept in `out`.

    Args:
        fonts: "debian", "matplotlib" or "development" (the handwriting that settings may be chosen on).
        out: folder for the cache.
        part: "train" or "held_out"; "development" fonts have no parts.
    """
    faces = find_faces(fonts, check_excluded=fonts != "development")
    if fonts != "development":
        faces = [face for face in faces if is_held_out(face.family) == (part == "held_out")]
    out.mkdir(parents=True, exist_ok=True)
    return Corpus(faces, render_masks(faces, out / f"masks-{fonts}-{part}-{len(faces)}.npy"))


def save_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file whole or not at all; floats as fp16."""
    from safetensors.torch import save_file

    small = {
        name: (value.detach().half() if value.is_floating_point() else value).contiguous()
        for name, value in weights.items()
    }
    partial = path.with_suffix(".partial")
    save_file(small, str(partial))
    partial.chmod(0o644)  # safetensors makes files that only their owner can read
    os.replace(partial, path)


def save_json(value: Mapping[str, Any], path: Path) -> None:
    """Write a JSON file whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(to_json(value, indent=1) + "\n")
    os.replace(partial, path)


def learning_rate(step: int, steps: int, *, peak: float, warm_up: int) -> float:
    """Linear warm-up to `peak`, then a cosine down to 0 at `steps`."""
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(steps - warm_up, 1)))


def build_optimiser(
    parameters: Iterable[torch.nn.Parameter], *, decay: float, fused: bool = False
) -> torch.optim.AdamW:
    """AdamW with weight decay for matrices and kernels, but not for gains, biases and scales."""
    values = list(parameters)
    groups = [
        {"params": [value for value in values if value.ndim >= 2], "weight_decay": decay},
        {"params": [value for value in values if value.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), eps=1e-8, fused=fused)


def set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """The same learning rate for all groups."""
    for group in optimiser.param_groups:
        group["lr"] = rate


class Log:
    """Logs running means of named metrics every `every` steps."""

    def __init__(self, name: str, *, every: int = 100) -> None:
        self.name, self.every, self.start = name, every, time.monotonic()
        self.sums: dict[str, float] = {}

    def add(self, step: int, **metrics: float) -> None:
        """Add one step's metrics; log after every `every` steps."""
        for key, value in metrics.items():
            self.sums[key] = self.sums.get(key, 0.0) + value
        if (step + 1) % self.every == 0:
            means = "  ".join(f"{key} {value / self.every:.4f}" for key, value in self.sums.items())
            log.info("%s %d  %s  %.0f s", self.name, step + 1, means, time.monotonic() - self.start)
            self.sums = {}
