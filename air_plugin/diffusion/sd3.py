"""Stable Diffusion 3 and 3.5: a transformer over text and image tokens, two CLIP towers and a T5."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from air_plugin.diffusion.family import Rows
from air_plugin.diffusion.flow import FlowFamily


class StableDiffusion3(FlowFamily):
    """See `Family`; Esser et al. 2024 (arXiv 2403.03206)."""

    pipelines: tuple[str, ...] = ("StableDiffusion3Pipeline",)
    encoders: tuple[str, ...] = ("text_encoder", "text_encoder_2", "text_encoder_3")

    def longest_text(self, pipeline: Any) -> int | None:
        return 256  # of T5, the pipeline's default

    def encode_one(self, pipeline: Any, text: str | None) -> Rows:
        states, _, pooled, _ = pipeline.encode_prompt(
            prompt=[text or ""],
            prompt_2=None,
            prompt_3=None,
            device=pipeline.transformer.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.longest_text(pipeline),
        )
        return {"prompt_embeds": states, "pooled_prompt_embeds": pooled}

    def velocity(
        self, model: Any, scheduler: Any, noisy: Tensor, *, states: Tensor, levels: Tensor, added: dict[str, Tensor]
    ) -> Tensor:
        return model(
            hidden_states=noisy,
            timestep=levels * scheduler.config.num_train_timesteps,
            encoder_hidden_states=states,
            pooled_projections=added["pooled_projections"].to(model.dtype),
            return_dict=False,
        )[0]
