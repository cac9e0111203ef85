"""A pipeline whose images are the noise of their seeds, and the jobs for it: generation without a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from air_plugin.diffusion.jobs import ImageJob, plan_jobs

NAMES = ["dog", "annual_crop land", "sea"]


def plan(names: Sequence[str] = NAMES, images: int = 2, **changes: Any) -> list[ImageJob]:
    settings: dict[str, Any] = {
        "template": "a photo of a {}.",
        "seed": 0,
        "steps": 2,
        "guidance": 3.0,
        "size": 16,
        "weights": "w",
    }
    return plan_jobs(names, images_per_class=images, **{**settings, **changes})


class _Unet(torch.nn.Module):
    dtype = torch.float32


class FakePipeline:
    """Gives noise of the asked seeds, except where `spoil` makes something else of it; notes what it was asked for.

    fits: images at once; with more, the memory is too small.
    """

    device = torch.device("cpu")

    def __init__(
        self, spoil: Callable[[int, Tensor], Tensor] = lambda seed, image: image, *, fits: int = 10**6
    ) -> None:
        self.spoil, self.fits = spoil, fits
        self.unet, self.vae = _Unet(), SimpleNamespace(dtype=torch.float32)
        self.encoded: list[str] = []
        self.sizes: list[int] = []  # of all batches, also those that do not fit
        self.seeds: list[list[int]] = []
        self.prompts: list[str] = []
        self.guided: list[bool] = []
        self.break_at: int | None = None

    def encode_prompt(self, *, prompt: list[str], do_classifier_free_guidance: bool, **_: Any):
        """A prompt's states are its number among the encoded ones."""
        rows = torch.arange(len(self.encoded), len(self.encoded) + len(prompt))[:, None, None]
        self.encoded += prompt
        return rows, torch.full_like(rows, -1) if do_classifier_free_guidance else None

    def __call__(
        self,
        *,
        prompt_embeds: Tensor,
        generator: list[torch.Generator],
        height: int,
        width: int,
        negative_prompt_embeds: Tensor | None = None,
        **_: Any,
    ):
        if len(self.seeds) == self.break_at:
            raise KeyboardInterrupt
        self.sizes.append(len(generator))
        if len(generator) > self.fits:
            raise torch.cuda.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {len(generator)} GiB.\nMore lines"
            )
        self.seeds.append([g.initial_seed() for g in generator])
        self.prompts += [self.encoded[row] for row in prompt_embeds.flatten().tolist()]
        self.guided.append(negative_prompt_embeds is not None)
        images = [self.spoil(g.initial_seed(), torch.rand(3, height, width, generator=g)) for g in generator]
        return SimpleNamespace(images=torch.stack(images))

    @property
    def generated(self) -> int:
        return sum(len(seeds) for seeds in self.seeds)
