"""The families of generators that are known, and which one a pipeline belongs to."""

from __future__ import annotations

from typing import Any

from air_plugin.diffusion.family import Family
from air_plugin.diffusion.flux import Flux
from air_plugin.diffusion.sana import Sana
from air_plugin.diffusion.sd3 import StableDiffusion3
from air_plugin.diffusion.unet import UNetFamily

UNET = UNetFamily()
FAMILIES: tuple[Family, ...] = (UNET, StableDiffusion3(), Flux(), Sana())
PIPELINES = tuple(kind for family in FAMILIES for kind in family.pipelines)


def family_of(pipeline: Any) -> Family:
    """The family of a pipeline, or of its class's name; U-Nets for pipelines that are not of diffusers."""
    kind = pipeline if isinstance(pipeline, str) else type(pipeline).__name__
    return next((family for family in FAMILIES if kind in family.pipelines), UNET)


def denoiser_of(pipeline: Any) -> Any:
    """The U-Net or transformer of a pipeline."""
    return getattr(pipeline, family_of(pipeline).part)
