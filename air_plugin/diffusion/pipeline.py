"""Loading a generator: a diffusers StableDiffusionPipeline, whatever its size."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from air_plugin.backbone import DTYPES
from air_plugin.errors import UserError, unknown
from air_plugin.store import tensor_digest


@dataclass
class Generator:
    """A pipeline and the checksum of its weights before any adapter."""

    pipeline: Any
    fingerprint: str


def load_generator(name: str, *, precision: str = "fp32", device: str | torch.device = "cpu") -> Generator:
    """Load a text-to-image pipeline of the Stable Diffusion 1/2 family.

    Args:
        name: `mini` (the embedded default), a hub name ("stable-diffusion-v1-5/stable-diffusion-v1-5") or a local
            folder in diffusers' layout. Weights are read from safetensors only.
        precision: fp32, fp16 or bf16.
        device: where it lies.

    Raises:
        UserError: it cannot be loaded; the message says why.
    """
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    if precision not in DTYPES:
        raise unknown("precision", precision, DTYPES)
    dtype = DTYPES[precision]
    if name == "mini":
        from air_plugin import mini

        pipeline = mini.load_pipeline(dtype)
    elif "/" not in name and not Path(name).is_dir():
        raise UserError(f"AIR.GENERATOR is '{name}'; it must be mini, a hub name OWNER/MODEL, or a local folder")
    else:
        try:
            pipeline = StableDiffusionPipeline.from_pretrained(
                name, torch_dtype=dtype, use_safetensors=True, safety_checker=None, requires_safety_checker=False
            )
        except (OSError, ValueError) as error:
            raise UserError(f"generator '{name}' cannot be loaded: {str(error).splitlines()[0]}") from error
        if pipeline.unet.config.addition_embed_type:  # SDXL loads without a word and fails in its first step
            raise UserError(f"generator '{name}' is not of the Stable Diffusion 1/2 family, others are not supported")
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False).eval()
    return Generator(pipeline, _fingerprint(pipeline))


def _fingerprint(pipeline: Any) -> str:
    parts = {"unet": pipeline.unet, "vae": pipeline.vae, "text": pipeline.text_encoder}
    state = {f"{part}.{name}": value for part, m in parts.items() for name, value in m.state_dict().items()}
    return tensor_digest(state)


@torch.no_grad()
def encode_prompts(pipeline: Any, prompts: list[str]) -> torch.Tensor:
    """(T, L, W) states of the text encoder that the U-Net attends to."""
    states, _ = pipeline.encode_prompt(prompts, pipeline.device, 1, do_classifier_free_guidance=False)
    return states
