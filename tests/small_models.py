"""Small random models and pictures for the tests."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from air_plugin.clip.backbone import Backbone
from air_plugin.config import AirSettings, add_air_config
from air_plugin.diffusion.pipeline import Generator, _fingerprint

SIDE = 16  # of the pictures that the models take and generate


def make_clip(*, seed: int = 0) -> Any:
    """A random open_clip.CLIP of width 32 that tells its inputs apart."""
    import open_clip

    vision = open_clip.CLIPVisionCfg(layers=1, width=32, head_width=16, patch_size=8, image_size=SIDE)
    text = open_clip.CLIPTextCfg(context_length=77, vocab_size=49408, width=32, heads=2, layers=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = open_clip.CLIP(24, vision, text, quick_gelu=True)
        # The usual initial values are so small that all texts have almost the same features.
        for value in (model.token_embedding.weight, model.positional_embedding, model.text_projection):
            torch.nn.init.normal_(value, std=0.5)
    return model.eval().requires_grad_(False)


def make_backbone(*, seed: int = 0) -> Backbone:
    """A backbone around `make_clip`, with OpenAI's tokens."""
    import open_clip

    preprocess = open_clip.image_transform(SIDE, is_train=False)
    return Backbone("tiny", make_clip(seed=seed), preprocess, open_clip.SimpleTokenizer(), SIDE, 77)


def make_generator(*, prediction: str = "epsilon") -> Generator:
    """A random StableDiffusionPipeline of 45 thousand parameters, for 16 x 16 pictures and 8 x 8 latents."""
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    tokenizer = make_spelling_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet, vae, text_encoder = _make_unet(), _make_vae(), _make_text_encoder(tokenizer)
    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction, steps_offset=1
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    for part in (unet, vae, text_encoder):
        part.requires_grad_(False).eval()
    return Generator(pipeline, _fingerprint(pipeline))


def _make_unet() -> Any:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=SIDE // 2,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=2,
    )
    for name, value in unet.named_parameters():
        if "attn2.to_v" in name:
            value.data *= 20  # so that prompts can be seen in the pictures
    return unet


def _make_vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=SIDE,
        scaling_factor=0.5,
        force_upcast=False,
    )


def _make_text_encoder(tokenizer: Any) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = CLIPTextModel(config)
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    return model


def make_spelling_tokenizer() -> Any:
    """A CLIPTokenizer that knows letters only, within a word and at its end."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(33, 127)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
        (Path(folder) / "merges.txt").write_text("#version: 0.2\n")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=32)


def write_pictures(folder: Path, count: int, *, seed: int = 0) -> list[str]:
    """Paths of new PNG files, 20 x 18, of large squares in random colours."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    rng = torch.Generator().manual_seed(seed)
    paths = [str(folder / f"{number:03d}.png") for number in range(count)]
    for path in paths:
        squares = torch.randint(256, (3, 3, 3), generator=rng, dtype=torch.uint8).numpy()
        Image.fromarray(squares).resize((20, 18), Image.Resampling.NEAREST).save(path)
    return paths


def air_settings(**changes: Any) -> AirSettings:
    """Settings of a short run on the small models; changes by key of the section AIR."""
    from yacs.config import CfgNode

    cfg = CfgNode({"DATASET": {}, "TRAINER": {}, "SEED": 0})
    add_air_config(cfg)
    options: dict[str, Any] = {"M": 4, "K": 2, "SIZE": SIDE, "STEPS": 1, "BATCH": 5, "LORA.STEPS": 2, "LORA.RANK": 2}
    for key, value in {**options, **changes}.items():
        cfg.merge_from_list([f"AIR.{key}", value])
    return AirSettings.from_cfg(cfg)
