"""Sana: a transformer with linear attention, an autoencoder that shrinks sides 32 times, and Gemma 2 for the text."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor

from air_plugin.diffusion.family import Conditioning, Rows
from air_plugin.diffusion.flow import FlowFamily

STEP = 32  # pixels; the pipeline refuses other multiples
LOG_VARIANCE = -30.0  # of an autoencoder without noise: `sample_latents` takes no smaller one
TEXT = 298  # tokens: of the 300 that are kept, one is the first of the instruction, and one is spare


class Sana(FlowFamily):
    """See `Family`; Xie et al. 2024 (arXiv 2410.10629).

    A prompt follows the pipeline's own instruction to the language model; the empty prompt of guidance has none.
    """

    pipelines: tuple[str, ...] = ("SanaPipeline",)
    encoders: tuple[str, ...] = ("text_encoder",)
    noise: tuple[str, ...] = ("num_train_timesteps", "prediction_type", "use_flow_sigmas", "flow_shift", "shift")

    def multiple_of(self, pipeline: Any) -> int:
        return math.lcm(STEP, int(pipeline.vae_scale_factor) * int(pipeline.transformer.config.patch_size))

    def longest_text(self, pipeline: Any) -> int | None:
        return TEXT

    def call_options(self) -> dict[str, Any]:
        return {
            "use_resolution_binning": False,  # else images of other sizes are generated and cropped
            "negative_prompt": None,  # it is given as states
        }

    def encode_one(self, pipeline: Any, text: str | None) -> Rows:
        parameters = inspect.signature(type(pipeline).__call__).parameters
        states, mask, _, _ = pipeline.encode_prompt(
            text or "",
            do_classifier_free_guidance=False,
            device=pipeline.transformer.device,
            complex_human_instruction=None if text is None else parameters["complex_human_instruction"].default,
        )
        return {"prompt_embeds": states, "prompt_attention_mask": mask}

    def shift(self, pipeline: Any, size: int) -> float | None:
        config = pipeline.scheduler.config
        return float(config.get("flow_shift") or config.get("shift") or 1.0)

    def moments(self, pipeline: Any, pixels: Tensor) -> Tensor:
        latents = pipeline.vae.encode(pixels).latent
        return torch.cat([latents, torch.full_like(latents, LOG_VARIANCE)], dim=1)

    def added(self, texts: Conditioning, size: int) -> dict[str, Tensor] | None:
        assert texts.mask is not None
        return {"encoder_attention_mask": texts.mask}

    def velocity(
        self, model: Any, scheduler: Any, noisy: Tensor, *, states: Tensor, levels: Tensor, added: dict[str, Tensor]
    ) -> Tensor:
        return model(
            hidden_states=noisy,
            timestep=levels * scheduler.config.num_train_timesteps * model.config.timestep_scale,
            encoder_hidden_states=states,
            encoder_attention_mask=added["encoder_attention_mask"],
            return_dict=False,
        )[0]
