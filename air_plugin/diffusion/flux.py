"""FLUX.1 (schnell and dev): a transformer over text and image tokens, the pooled text of a CLIP, and a T5."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from air_plugin.diffusion.family import Rows
from air_plugin.diffusion.flow import FlowFamily


class Flux(FlowFamily):
    """See `Family`. Neither model uses classifier-free guidance: dev takes the guidance as an input, schnell has none.

    An adapter of dev is trained at guidance 1, at which the distilled model predicts the flow of the data itself.
    """

    pipelines: tuple[str, ...] = ("FluxPipeline",)
    encoders: tuple[str, ...] = ("text_encoder", "text_encoder_2")

    def longest_text(self, pipeline: Any) -> int | None:
        return 512 if pipeline.transformer.config.guidance_embeds else 256  # of T5: dev, schnell

    def encode_one(self, pipeline: Any, text: str | None) -> Rows:
        states, pooled, _ = pipeline.encode_prompt(
            prompt=[text or ""],
            prompt_2=None,
            device=pipeline.transformer.device,
            max_sequence_length=self.longest_text(pipeline),
        )
        return {"prompt_embeds": states, "pooled_prompt_embeds": pooled}

    def guided(self, guidance: float) -> bool:
        return False

    def velocity(
        self, model: Any, scheduler: Any, noisy: Tensor, *, states: Tensor, levels: Tensor, added: dict[str, Tensor]
    ) -> Tensor:
        _, _, height, width = noisy.shape
        tokens = model(
            hidden_states=pack(noisy),
            timestep=levels,
            guidance=torch.ones_like(levels) if model.config.guidance_embeds else None,
            encoder_hidden_states=states,
            pooled_projections=added["pooled_projections"].to(model.dtype),
            txt_ids=torch.zeros(states.shape[1], 3, dtype=model.dtype, device=states.device),
            img_ids=positions(height // 2, width // 2, noisy.device).to(model.dtype),
            return_dict=False,
        )[0]
        return unpack(tokens, height, width)


def pack(latents: Tensor) -> Tensor:
    """(B, c, h, w) latents to (B, h/2 * w/2, 4c) tokens of 2 x 2 latents, row by row."""
    batch, channels, height, width = latents.shape
    blocks = latents.view(batch, channels, height // 2, 2, width // 2, 2)
    return blocks.permute(0, 2, 4, 1, 3, 5).reshape(batch, height * width // 4, 4 * channels)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """(B, h/2 * w/2, 4c) tokens to (B, c, h, w) latents, the inverse of `pack`."""
    batch, _, channels = tokens.shape
    blocks = tokens.view(batch, height // 2, width // 2, channels // 4, 2, 2)
    return blocks.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels // 4, height, width)


def positions(height: int, width: int, device: torch.device) -> Tensor:
    """(height * width, 3) positions of the image's tokens: zero, row and column. Made on the device."""
    rows = torch.arange(height, device=device).repeat_interleave(width)
    columns = torch.arange(width, device=device).repeat(height)
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=1)
