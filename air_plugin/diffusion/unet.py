"""Generators with a U-Net: Stable Diffusion 1.5, 2.1, Turbo and XL."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from air_plugin.diffusion import lora_step
from air_plugin.diffusion.family import Conditioning, Family, Rows

XL = "StableDiffusionXLPipeline"
NOISE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "prediction_type",
)


class UNetFamily(Family):
    """See `Family`. SDXL has a second text tower, whose pooled text its U-Net takes together with the image's size.

    CLIP's text towers are small and stay on the device.
    """

    pipelines: tuple[str, ...] = ("StableDiffusionPipeline", XL)
    part = "unet"
    encoders: tuple[str, ...] = ("text_encoder", "text_encoder_2")
    samplers: tuple[str, ...] = ("dpm", "ddim", "euler", "lcm", "own")
    noise: tuple[str, ...] = NOISE
    keeps_text_keys = True

    def load_options(self, kind: str, *, safety_checker: bool) -> dict[str, Any]:
        if kind == XL:
            return {"add_watermarker": False}  # else images would depend on whether another package is installed
        return {} if safety_checker else {"safety_checker": None, "requires_safety_checker": False}

    def multiple_of(self, pipeline: Any) -> int:
        return int(pipeline.vae_scale_factor)

    def encode(self, pipeline: Any, texts: list[str]) -> Conditioning:
        encoded = pipeline.encode_prompt(
            prompt=texts, device=pipeline.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return Conditioning(encoded[0], encoded[2] if len(encoded) == 4 else None)  # SDXL: states, None, pooled, None

    def encode_rows(self, pipeline: Any, texts: list[str], *, empty: bool) -> tuple[Rows, Rows]:
        states, no_states, *pooled = pipeline.encode_prompt(
            prompt=texts, device=pipeline.device, num_images_per_prompt=1, do_classifier_free_guidance=empty
        )
        rows, no_rows = {"prompt_embeds": states}, {}
        if no_states is not None:
            no_rows["negative_prompt_embeds"] = no_states[:1]
        if pooled:  # SDXL
            rows["pooled_prompt_embeds"] = pooled[0]
            if pooled[1] is not None:
                no_rows["negative_pooled_prompt_embeds"] = pooled[1][:1]
        return rows, no_rows

    def training_scheduler(self, pipeline: Any) -> Any:
        from diffusers import DDPMScheduler

        return DDPMScheduler.from_config(pipeline.scheduler.config)

    def added(self, texts: Conditioning, size: int) -> dict[str, Tensor] | None:
        return texts.added(size)

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
        return lora_step.denoising_loss(model, scheduler, latents, states=states, noise=noise, steps=steps, added=added)

    def save_adapter(self, pipeline: Any, folder: Any, layers: dict[str, torch.Tensor]) -> None:
        pipeline.save_lora_weights(folder, unet_lora_layers=layers, safe_serialization=True)
