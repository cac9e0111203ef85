"""The embedded default: a small CLIP and a small latent diffusion model that come with the package.

Both were trained on rendered type alone (see MODEL_CARD.md) by `air_plugin.mini.training`, and load in about a second
without a network.

    clip = load_clip()  # an open_clip.CLIP: pictures (N, 3, 32, 32), texts (N, 32)
    vit = load_clip("mini_vit")  # the same with a VisionTransformer, for visual prompts; the text tower is the same
    pipe = load_pipeline()  # a diffusers StableDiffusionPipeline
    pipe(prompt=["a photo of the digit seven."], height=32, width=32,
         num_inference_steps=12, guidance_scale=3)
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionPipeline
    from open_clip import CLIP
    from open_clip.tokenizer import SimpleTokenizer

IMAGE_SIZE = 32
MEAN = (0.48145466, 0.4578275, 0.40821073)  # OpenAI's, as for other CLIP models
STD = (0.26862954, 0.26130258, 0.27577711)
WEIGHTS = Path(__file__).parent / "weights"
# mini: backbone and generator. mini_vit: a backbone; its text tower is in mini's file.
FILES = {
    "mini": ("clip.safetensors", "unet.safetensors", "vae.safetensors", "vae_config.json"),
    "mini_vit": ("clip.safetensors", "vit.safetensors"),
}
BACKBONES = tuple(FILES)

__all__ = [
    "BACKBONES",
    "IMAGE_SIZE",
    "MEAN",
    "STD",
    "load_clip",
    "load_pipeline",
    "tokenizer",
    "weight_files",
    "weights_fingerprint",
]


def load_clip(name: str = "mini") -> CLIP:
    """A CLIP: fp32, in evaluation mode, no gradients. It takes pictures in [0, 1] less MEAN, over STD.

    Args:
        name: "mini" (image tower: ModifiedResNet) or "mini_vit" (VisionTransformer, class token, 4 x 4 patches of 8 x 8
            pixels). Text tower and logit scale are the same.
    """
    from air_plugin.mini.models import read_clip, read_vit

    clip = read_clip(WEIGHTS / "clip.safetensors")
    return read_vit(WEIGHTS / "vit.safetensors", clip) if name == "mini_vit" else clip


def tokenizer() -> SimpleTokenizer:
    """OpenAI's byte-pair encoding: a text or a list of texts -> (N, 32) int64."""
    from air_plugin.mini.models import build_tokenizer

    return build_tokenizer()


def load_pipeline(dtype: torch.dtype | None = None) -> StableDiffusionPipeline:
    """The diffusion model, fp32 unless `dtype` is given; made for 32 x 32 pixels, 12 steps and guidance 3."""
    from air_plugin.mini.models import build_pipeline, read_unet, read_vae

    pipe = build_pipeline(read_vae(WEIGHTS), read_unet(WEIGHTS / "unet.safetensors"), load_clip())
    if dtype is not None and dtype != pipe.unet.dtype:
        pipe.to(dtype)
    return pipe


def weight_files(name: str = "mini") -> list[Path]:
    """The files that decide what "mini" or "mini_vit" computes, sorted."""
    return [WEIGHTS / file for file in sorted(FILES[name])]


def weights_fingerprint(name: str = "mini") -> str:
    """SHA-256 over the names and bytes of a model's weights and their settings."""
    digest = hashlib.sha256()
    for path in weight_files(name):
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
