"""How the embedded models are built: ordinary open_clip, diffusers and transformers classes, small sizes."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from air_plugin.utils.files import to_json

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from open_clip import CLIP
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTextModel, CLIPTokenizer

IMAGE_SIZE = 32
CONTEXT_LENGTH = 32
VOCABULARY = 49408
EMBED_DIM = 128
TEXT_WIDTH = 128
TEXT_HEADS = 4
TEXT_LAYERS = 3
VIT_WIDTH = 128
VIT_LAYERS = 6
VIT_PATCH = 8  # pixels
TABLE_SEED = 2504  # of the token table's initial value
START, END = 49406, 49407


def build_clip(*, vocabulary: int = VOCABULARY, vit: bool = False) -> CLIP:
    """An image tower and a three-layer text tower, untrained. Training uses a smaller `vocabulary`.

    Args:
        vocabulary: rows of the token table.
        vit: a VisionTransformer (16 patches of 8 x 8 pixels and a class token) as the image tower, otherwise a
            ModifiedResNet.
    """
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    vision = CLIPVisionCfg(layers=(1, 1, 1, 1), width=16, head_width=32, image_size=IMAGE_SIZE)
    if vit:
        vision = CLIPVisionCfg(
            layers=VIT_LAYERS, width=VIT_WIDTH, head_width=32, patch_size=VIT_PATCH, image_size=IMAGE_SIZE
        )
    text = CLIPTextCfg(
        context_length=CONTEXT_LENGTH, vocab_size=vocabulary, width=TEXT_WIDTH, heads=TEXT_HEADS, layers=TEXT_LAYERS
    )
    return CLIP(EMBED_DIM, vision, text, quick_gelu=True)


def initial_table() -> Tensor:
    """The token table before training, (49408, 128): the same on every call."""
    generator = torch.Generator().manual_seed(TABLE_SEED)
    return torch.randn(VOCABULARY, TEXT_WIDTH, generator=generator).mul_(0.02)


def full_table(ids: Tensor, rows: Tensor) -> Tensor:
    """The initial table with the trained `rows` (K, 128) put in at `ids` (K,)."""
    table = initial_table()
    table[ids.long()] = rows.float()
    return table


def build_tokenizer() -> SimpleTokenizer:
    """OpenAI's byte-pair encoding with the context length of this model."""
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer(context_length=CONTEXT_LENGTH)


def build_hf_tokenizer() -> CLIPTokenizer:
    """The same byte-pair encoding for transformers; it pads with token 0, as open_clip does."""
    from transformers import CLIPTokenizer

    source = build_tokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): index for token, index in source.encoder.items()}
    merges = ["#version: 0.2", *(" ".join(pair) for pair in source.bpe_ranks)]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(to_json(vocabulary), encoding="utf-8")
        (Path(folder) / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
        return CLIPTokenizer.from_pretrained(
            folder,
            model_max_length=CONTEXT_LENGTH,
            bos_token="<|startoftext|>",
            eos_token="<|endoftext|>",
            unk_token="<|endoftext|>",
            pad_token="!",
        )


def text_encoder_of(clip: CLIP) -> CLIPTextModel:
    """The text tower of the CLIP as transformers' CLIPTextModel: the same hidden states for the same tokens."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=TEXT_WIDTH,
        intermediate_size=TEXT_WIDTH * 4,
        projection_dim=EMBED_DIM,
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=TEXT_HEADS,
        max_position_embeddings=CONTEXT_LENGTH,
        hidden_act="quick_gelu",
        bos_token_id=START,
        eos_token_id=END,
        pad_token_id=0,
    )
    with torch.device("meta"):
        model = CLIPTextModel(config)
    # transformers 4 keeps the tower under "text_model.", transformers 5 has it at the top.
    prefix = "text_model." if any(name.startswith("text_model.") for name in model.state_dict()) else ""
    weights = {prefix + name: value for name, value in convert_text_weights(clip.state_dict()).items()}
    model.load_state_dict(weights, strict=True, assign=True)
    # It is not in the state dict, so it has no storage yet.
    tower: Any = model.text_model if prefix else model
    tower.embeddings.position_ids = torch.arange(CONTEXT_LENGTH)[None]
    return model.eval().requires_grad_(False)


def convert_text_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of the text tower from open_clip's to transformers' names (without prefix)."""
    weights = {
        "embeddings.token_embedding.weight": state["token_embedding.weight"],
        "embeddings.position_embedding.weight": state["positional_embedding"],
        "final_layer_norm.weight": state["ln_final.weight"],
        "final_layer_norm.bias": state["ln_final.bias"],
    }
    for layer in range(TEXT_LAYERS):
        old, new = f"transformer.resblocks.{layer}.", f"encoder.layers.{layer}."
        for kind in ("weight", "bias"):
            for name, part in zip("qkv", state[f"{old}attn.in_proj_{kind}"].chunk(3), strict=True):
                weights[f"{new}self_attn.{name}_proj.{kind}"] = part
            weights[f"{new}self_attn.out_proj.{kind}"] = state[f"{old}attn.out_proj.{kind}"]
            weights[f"{new}layer_norm1.{kind}"] = state[f"{old}ln_1.{kind}"]
            weights[f"{new}layer_norm2.{kind}"] = state[f"{old}ln_2.{kind}"]
            weights[f"{new}mlp.fc1.{kind}"] = state[f"{old}mlp.c_fc.{kind}"]
            weights[f"{new}mlp.fc2.{kind}"] = state[f"{old}mlp.c_proj.{kind}"]
    return {name: value.detach().clone() for name, value in weights.items()}


def build_vae(*, scaling_factor: float = 1.0) -> AutoencoderKL:
    """An untrained autoencoder: 32 x 32 x 3 pictures, 8 x 8 x 4 latents."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=IMAGE_SIZE,
        scaling_factor=scaling_factor,
        force_upcast=False,
    )


def build_unet() -> UNet2DConditionModel:
    """An untrained U-Net of two levels; attention to the text at 4 x 4 only, which makes a step 1.5 times faster."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(64, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


NOISE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "steps_offset": 1,  # unused with trailing spacing, but the pipeline warns about anything else
}


def read_clip(path: Path) -> CLIP:
    """A trained CLIP with its whole token table, fp32, in evaluation mode."""
    from safetensors.torch import load_file

    weights = load_file(str(path))
    table = full_table(weights.pop("token_ids"), weights.pop("token_rows"))
    with torch.random.fork_rng(devices=[]):  # initial values are random; the caller's state is kept
        clip = build_clip()
    clip.load_state_dict({**weights, "token_embedding.weight": table})
    return clip.float().eval().requires_grad_(False)


def read_vit(path: Path, clip: CLIP) -> CLIP:
    """A trained VisionTransformer beside the text tower of `clip`, fp32, in evaluation mode.

    Args:
        path: the weights of the image tower alone.
        clip: whose text tower and logit scale are used (copied).
    """
    from safetensors.torch import load_file

    tower = {f"visual.{name}": value for name, value in load_file(str(path)).items()}
    shared = {name: value for name, value in clip.state_dict().items() if not name.startswith("visual.")}
    with torch.random.fork_rng(devices=[]):
        vit = build_clip(vit=True)
    vit.load_state_dict({**tower, **shared})
    return vit.float().eval().requires_grad_(False)


def read_vae(folder: Path) -> AutoencoderKL:
    """A trained autoencoder, fp32, in evaluation mode; `folder` holds vae.safetensors and vae_config.json."""
    from safetensors.torch import load_file

    scaling_factor = json.loads((folder / "vae_config.json").read_text())["scaling_factor"]
    with torch.device("meta"):  # no initial values: they take time and change the caller's random state
        vae = build_vae(scaling_factor=scaling_factor)
    weights = load_file(str(folder / "vae.safetensors"))
    vae.load_state_dict({name: value.float() for name, value in weights.items()}, assign=True)
    return vae.eval().requires_grad_(False)


def read_unet(path: Path) -> UNet2DConditionModel:
    """A trained denoiser, fp32, in evaluation mode."""
    from safetensors.torch import load_file

    with torch.device("meta"):
        unet = build_unet()
    unet.load_state_dict({name: value.float() for name, value in load_file(str(path)).items()}, assign=True)
    return unet.eval().requires_grad_(False)


def build_pipeline(vae: AutoencoderKL, unet: UNet2DConditionModel, clip: CLIP) -> StableDiffusionPipeline:
    """The parts as an ordinary Stable Diffusion pipeline, quiet and without a safety checker."""
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder_of(clip),
        tokenizer=build_hf_tokenizer(),
        unet=unet,
        scheduler=DPMSolverMultistepScheduler(**NOISE, algorithm_type="dpmsolver++"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
