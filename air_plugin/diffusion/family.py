"""A family of generators: what differs between the pipelines of diffusers, as a Protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """The text inputs of the denoiser for T texts.

    states: (T, L, W) states of the text towers' tokens, for cross-attention or joint attention.
    pooled: (T, P) pooled text of SDXL, Stable Diffusion 3 and FLUX; None for other models.
    mask: (T, L) int64, 1 for tokens that are used and 0 for padding; None where all are used.
    """

    states: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None

    def __getitem__(self, index: Tensor | slice) -> Conditioning:
        pooled, mask = (None if part is None else part[index] for part in (self.pooled, self.mask))
        return Conditioning(self.states[index], pooled, mask)

    @classmethod
    def joined(cls, parts: Sequence[Conditioning]) -> Conditioning:
        """All texts of the parts, which have the same fields."""
        pooled = [part.pooled for part in parts if part.pooled is not None]
        masks = [part.mask for part in parts if part.mask is not None]
        states = torch.cat([part.states for part in parts])
        return cls(states, torch.cat(pooled) if pooled else None, torch.cat(masks) if masks else None)

    def added(self, size: int) -> dict[str, Tensor] | None:
        """The further inputs of SDXL's U-Net (Podell et al. 2023, section 2.2); None for other U-Nets.

        `time_ids` are three pairs: original size, corner of the crop and target size. They are those with which the
        pipeline generates images of `size` pixels, so that an adapter is trained for its use.
        """
        if self.pooled is None:
            return None
        ids = torch.tensor([[size, size, 0, 0, size, size]], device=self.pooled.device)
        return {"text_embeds": self.pooled, "time_ids": ids.expand(len(self.pooled), -1)}


Rows = dict[str, Tensor]  # (T, ...) tensors of T prompts, by the argument of the pipeline's call


class Family(Protocol):
    """What differs between generators, and what most of them share. `families.family_of` finds a pipeline's; no state.

    pipelines: the classes of diffusers.
    part: the pipeline's attribute with the denoiser, which is also the prefix of the adapter's weights.
    encoders: the pipeline's attributes with text encoders.
    samplers: values of AIR.SCHEDULER that it can use.
    noise: keys of the scheduler's config that determine the training.
    keeps_text_keys: whether the keys and values of the text are the same in all steps of a batch.
    """

    pipelines: tuple[str, ...]
    part: str
    encoders: tuple[str, ...]
    samplers: tuple[str, ...]
    noise: tuple[str, ...]
    keeps_text_keys: bool

    def load_options(self, kind: str, *, safety_checker: bool) -> dict[str, Any]:
        """Further arguments of `from_pretrained` for the class `kind`."""

    def release(self, pipeline: Any) -> None:
        """Take the text encoders off the device until texts are encoded, where they are large."""
        return

    def multiple_of(self, pipeline: Any) -> int:
        """Images have sides of a multiple of so many pixels."""

    def longest_text(self, pipeline: Any) -> int | None:
        """Tokens of the longest text besides the tokenizers' own limits; None: no further limit."""
        return None

    def encode(self, pipeline: Any, texts: list[str]) -> Conditioning:
        """The inputs of the denoiser for T texts, in training."""

    def encode_rows(self, pipeline: Any, texts: list[str], *, empty: bool) -> tuple[Rows, Rows]:
        """The pipeline's arguments for T prompts and, where `empty`, (1, ...) those of the empty prompt, else {}."""

    def call_options(self) -> dict[str, Any]:
        """Further arguments of the pipeline's call."""
        return {}

    def guided(self, guidance: float) -> bool:
        """Whether generation needs the empty prompt: classifier-free guidance."""
        return guidance > 1

    def training_scheduler(self, pipeline: Any) -> Any:
        """The scheduler of the base model's training."""

    def shift(self, pipeline: Any, size: int) -> float | None:
        """Shift of the noise levels of flow matching at `size` pixels; None: uniform time steps of diffusion."""
        return None

    def moments(self, pipeline: Any, pixels: Tensor) -> Tensor:
        """(B, 2c, h, w) mean and log-variance of the latents of (B, 3, H, W) images in [-1, 1]."""
        moments: Tensor = pipeline.vae.encode(pixels).latent_dist.parameters
        return moments

    def offset(self, pipeline: Any) -> float:
        """What is subtracted from latents before they are scaled."""
        return 0.0

    def added(self, texts: Conditioning, size: int) -> dict[str, Tensor] | None:
        """Further (T, ...) inputs of the denoiser in training."""

    def loss(
        self,
        model: Any,
        scheduler: Any,
        latents: Tensor,
        *,
        states: Tensor,
        noise: Tensor,
        steps: Tensor,
        added: dict[str, Tensor] | None,
    ) -> Tensor:
        """The base model's training loss; arguments as in `lora_step.denoising_loss`."""

    def save_adapter(self, pipeline: Any, folder: Any, layers: dict[str, Tensor]) -> None:
        """Write an adapter's weights in diffusers' format: pipe.load_lora_weights(folder) reads them."""
