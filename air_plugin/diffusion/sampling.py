"""One batch of a pipeline: prompts encoded once, images that leave the device without a stop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from air_plugin.diffusion.compile import compiled
from air_plugin.diffusion.families import denoiser_of, family_of
from air_plugin.diffusion.jobs import ImageJob

CHUNK = 64  # prompts that a text tower encodes at once


@dataclass(frozen=True)
class EncodedPrompts:
    """T prompts and the empty one as a pipeline takes them.

    index: row of each prompt.
    prompts: (T, ...) tensors by the pipeline's argument: `prompt_embeds`, and where there is one,
        `pooled_prompt_embeds`.
    empty: (1, ...) tensors of the empty prompt, `negative_prompt_embeds` and so on; none without guidance.
    """

    index: dict[str, int]
    prompts: dict[str, Tensor]
    empty: dict[str, Tensor]

    def arguments(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The pipeline's arguments for a batch."""
        rows = [self.index[prompt] for prompt in prompts]
        repeated = {name: value.expand(len(rows), *value.shape[1:]) for name, value in self.empty.items()}
        return {name: value[rows] for name, value in self.prompts.items()} | repeated


@torch.no_grad()
def encode_once(pipeline: Any, prompts: Iterable[str], *, guidance: float) -> EncodedPrompts:
    """Encode every distinct prompt, and the empty one where classifier-free guidance needs it (above 1)."""
    distinct = list(dict.fromkeys(prompts))
    family = family_of(pipeline)
    parts: dict[str, list[Tensor]] = {}
    empty: dict[str, Tensor] = {}
    for start in range(0, len(distinct), CHUNK):
        with_empty = family.guided(guidance) and not start
        rows, no_rows = family.encode_rows(pipeline, distinct[start : start + CHUNK], empty=with_empty)
        empty |= no_rows
        for name, value in rows.items():
            parts.setdefault(name, []).append(value)
    index = {prompt: row for row, prompt in enumerate(distinct)}
    return EncodedPrompts(index, {name: torch.cat(values) for name, values in parts.items()}, empty)


@dataclass(frozen=True)
class Batch:
    """Images on their way from the device.

    pixels: (B, H, W, 3) uint8, on the host.
    blank: (B,) bool, see `is_blank`, on the host.
    copied: CUDA's event after the copies; None on the CPU.
    """

    pixels: Tensor
    blank: Tensor
    copied: Any = None

    def read(self) -> list[np.ndarray | None]:
        """The images, after the copies; None for a blank one."""
        if self.copied is not None:
            self.copied.synchronize()
        pixels = self.pixels.numpy()
        return [None if blank else pixels[row] for row, blank in enumerate(self.blank.tolist())]


@torch.no_grad()
def start_batch(pipeline: Any, jobs: Sequence[ImageJob], prompts: EncodedPrompts, attempt: int) -> Batch:
    """Generate the images of some jobs, of equal steps, guidance and size; a GPU still computes when this returns."""
    first = jobs[0]
    output = pipeline(
        **prompts.arguments([job.prompt for job in jobs]),
        num_inference_steps=first.steps,
        guidance_scale=first.guidance,
        height=first.size,
        width=first.size,
        generator=[torch.Generator("cpu").manual_seed(job.seed_of_attempt(attempt)) for job in jobs],
        output_type="pt",
        **family_of(pipeline).call_options(),
    )
    levels, blank = to_levels(output.images)
    if not levels.is_cuda:
        return Batch(levels, blank)
    copied = torch.cuda.Event()
    batch = Batch(_to_pinned(levels), _to_pinned(blank), copied)
    copied.record()
    return batch


def _to_pinned(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def to_levels(images: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 3, H, W) images, [0, 1] or NaN, as (B, H, W, 3) uint8; and (B,) bool, which of them are blank.

    Blank is an image with a non-finite value, or with a single colour after rounding to 8 bits.
    """
    levels = (images.float().clamp(0, 1) * 255).round()
    flat = levels.flatten(2)
    uniform = (flat.amax(2) == flat.amin(2)).all(1)
    blank = uniform | ~flat.isfinite().flatten(1).all(1)
    return levels.nan_to_num().to(torch.uint8).permute(0, 2, 3, 1).contiguous(), blank


def denoiser_for_sampling(pipeline: Any, *, fast: bool) -> AbstractContextManager[Callable[[], None]]:
    """Context in which the denoiser is compiled (`fast`), or reuses what is the same in all steps of a batch.

    Yields a function that frees what is kept of the last batch.
    """
    if fast:
        return compiled(denoiser_of(pipeline))
    if family_of(pipeline).keeps_text_keys:
        return text_keys_reused(denoiser_of(pipeline))
    return nullcontext(lambda: None)


class _Remembering:
    """A layer's forward that returns its last output where its input is the same tensor again."""

    def __init__(self, forward: Callable[..., Tensor]) -> None:
        self.forward = forward
        self.forget()

    def forget(self) -> None:
        self.input: Tensor | None = None
        self.output: Tensor | None = None

    def __call__(self, x: Tensor, *arguments: Any, **named: Any) -> Tensor:
        if self.output is None or self.input is not x:
            self.input, self.output = x, self.forward(x, *arguments, **named)
        return self.output


@contextmanager
def text_keys_reused(unet: torch.nn.Module) -> Iterator[Callable[[], None]]:
    """Context in which a U-Net computes the keys and values of the text once a batch, not in every step.

    They depend on the text alone, which is one tensor in all steps of a batch; the result is the same, bit by bit.
    Yields a function that frees the last batch's.
    """
    layers = [layer for name, layer in unet.named_modules() if name.endswith((".attn2.to_k", ".attn2.to_v"))]
    remembering = [_Remembering(layer.forward) for layer in layers]

    def forget() -> None:
        for one in remembering:
            one.forget()

    for layer, forward in zip(layers, remembering, strict=True):
        layer.forward = forward
    try:
        yield forget
    finally:
        for layer in layers:
            del layer.forward
