"""Arithmetic and memory of the transformer generators at full size, counted as in benchmarks.generator_flops.

    python -m benchmarks.transformer_flops             # every model at 512 and 1024 px; --sizes 512
    python -m benchmarks.transformer_flops --int8 --batch 1   # memory with 8-bit weights and single images

Models of the published architectures run on torch's meta device. Text is counted apart, since a text is encoded once
and its towers then leave the card. A step of LoRA is that of a card: the adapter computes in bf16, and the optimiser
has fp32 master weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from air_plugin.diffusion.int8 import quantize
from benchmarks.generator_flops import CLIP_L, GIB, OPENCLIP_G, ROOT, TOKENS, Cost, count, meta, read

T5_TOKENS = 256
GEMMA_TOKENS = 500  # 300 and the instruction, about
MASTER = 12  # bytes a parameter: fp32 weights and AdamW's two moments


@dataclass(frozen=True)
class Model:
    """A published model.

    config: of configs/generators, for steps, guidance and targets. tokens: of the text, in the transformer.
    channels, factor: of the latents, and pixels a latent.
    """

    config: str
    tokens: int
    channels: int
    factor: int


MODELS = {
    "sd35_medium": Model("sd35_medium", TOKENS + T5_TOKENS, 16, 8),
    "flux_schnell": Model("flux_schnell", T5_TOKENS, 16, 8),
    "flux_dev": Model("flux_schnell", 512, 16, 8),
    "sana": Model("sana", 300, 32, 32),
}


def build_transformer(name: str) -> Any:
    """The transformer, with random weights on torch's default device."""
    import diffusers

    if name == "sana":
        return diffusers.SanaTransformer2DModel(sample_size=16)  # diffusers' defaults are those of Sana 1.6B
    if name.startswith("flux"):
        return diffusers.FluxTransformer2DModel(guidance_embeds=name == "flux_dev")  # of FLUX.1
    return diffusers.SD3Transformer2DModel(
        sample_size=128,
        num_layers=24,
        num_attention_heads=24,
        attention_head_dim=64,
        joint_attention_dim=4096,
        caption_projection_dim=1536,
        pooled_projection_dim=2048,
        pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)),
        qk_norm="rms_norm",
    )


def build_vae(name: str) -> Any:
    """The autoencoder: Sana's shrinks sides 32 times, the others have 16 channels."""
    import diffusers

    if name == "sana":
        kinds = (*("ResBlock",) * 3, *("EfficientViTBlock",) * 3)
        return diffusers.AutoencoderDC(
            encoder_block_types=kinds,
            decoder_block_types=kinds,
            downsample_block_type="conv",
            upsample_block_type="interpolate",
        )
    return diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=16,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def build_text_towers(name: str) -> list[tuple[Any, int]]:
    """The text towers, each with its number of tokens."""
    import transformers

    if name == "sana":
        gemma = transformers.Gemma2Config(
            hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, head_dim=256, query_pre_attn_scalar=256
        )
        return [(transformers.Gemma2Model(gemma), GEMMA_TOKENS)]
    t5 = transformers.T5Config(
        vocab_size=32128, d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
    )
    towers = (CLIP_L,) if name.startswith("flux") else (CLIP_L, OPENCLIP_G)
    clips = [
        transformers.CLIPTextModelWithProjection(
            transformers.CLIPTextConfig(vocab_size=49408, max_position_embeddings=TOKENS, **tower)
        )
        for tower in towers
    ]
    return [*((clip, TOKENS) for clip in clips), (transformers.T5EncoderModel(t5), T5_TOKENS)]


def inputs_of(name: str, *, batch: int, size: int) -> dict[str, Any]:
    """The inputs of a step."""
    model, side = MODELS[name], size // MODELS[name].factor
    inputs: dict[str, Any] = {"timestep": torch.full((batch,), 500.0)}
    if name == "sana":
        mask = torch.ones(batch, model.tokens)
        text = torch.empty(batch, model.tokens, 2304)
        inputs |= {"encoder_hidden_states": text, "encoder_attention_mask": mask}
    else:
        pooled = torch.empty(batch, 768 if name.startswith("flux") else 2048)
        inputs |= {"encoder_hidden_states": torch.empty(batch, model.tokens, 4096), "pooled_projections": pooled}
    if not name.startswith("flux"):
        return inputs | {"hidden_states": torch.empty(batch, model.channels, side, side)}
    tokens = (side // 2) ** 2
    inputs |= {"hidden_states": torch.empty(batch, tokens, 4 * model.channels), "img_ids": torch.zeros(tokens, 3)}
    guidance = torch.ones(batch) if name == "flux_dev" else None
    return inputs | {"txt_ids": torch.zeros(model.tokens, 3), "guidance": guidance}


@cache
def parameters(name: str) -> dict[str, int]:
    """Parameters of the parts."""
    with meta():
        parts = {
            "transformer": [build_transformer(name)],
            "vae": [build_vae(name)],
            "text": [tower for tower, _ in build_text_towers(name)],
        }
    return {part: sum(v.numel() for m in models for v in m.parameters()) for part, models in parts.items()}


def counted(model: Any, work: Callable[[], Any]) -> Cost:
    """`count`, with the model's buffers: tables of positions, scales of 8-bit weights."""
    cost = count(model, work)
    return Cost(cost.flops, cost.peak + sum(value.untyped_storage().nbytes() for value in model.buffers()))


@cache
def step_cost(name: str, size: int, batch: int = 1, *, int8: bool = False) -> Cost:
    """One step of generation."""
    with meta(), torch.no_grad():
        model, inputs = build_transformer(name), inputs_of(name, batch=batch, size=size)
        if int8:
            quantize(model)
        return counted(model, lambda: model(**inputs))


@cache
def vae_cost(name: str, size: int, batch: int = 1, *, encode: bool = False) -> Cost:
    """Decoding latents into images, or encoding images."""
    with meta(), torch.no_grad():
        vae, side = build_vae(name), size // MODELS[name].factor
        if encode:
            return count(vae, lambda: vae.encode(torch.empty(batch, 3, size, size)))
        return count(vae, lambda: vae.decode(torch.empty(batch, MODELS[name].channels, side, side)))


@cache
def text_cost(name: str) -> int:
    """FLOPs of a text through all towers."""
    with meta(), torch.no_grad():
        towers = build_text_towers(name)
        inputs = [torch.zeros(1, tokens, dtype=torch.long) for _, tokens in towers]
        return sum(count(t, partial(t, ids)).flops for (t, _), ids in zip(towers, inputs, strict=True))


@cache
def lora_cost(name: str, size: int, batch: int, rank: int, targets: tuple[str, ...], *, int8: bool = False) -> Cost:
    """A training step: forward, and backward through the frozen weights."""
    from peft import LoraConfig

    with meta():
        model, inputs = build_transformer(name), inputs_of(name, batch=batch, size=size)
        if int8:
            quantize(model)
        model.requires_grad_(False)
        model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets)))
        trained = [value for value in model.parameters() if value.requires_grad]
        cost = counted(model, lambda: model(**inputs).sample.float().square().mean().backward())
    return Cost(cost.flops, cost.peak + MASTER * sum(value.numel() for value in trained))


def row_of(name: str, size: int, *, int8: bool, batch: int) -> list[Any]:
    """A line of the table: counts for one image, memory with `batch` images at once, 0: the config's numbers."""
    air = read(ROOT / "configs" / "generators" / f"{MODELS[name].config}.yaml")
    million = {part: number / 1e6 for part, number in parameters(name).items()}
    passes = 2 if air.GUIDANCE > 1 else 1
    steps = 28 if name == "flux_dev" else air.STEPS
    step, decoding = step_cost(name, size), vae_cost(name, size)
    options = {"rank": air.LORA.RANK, "targets": tuple(air.LORA.TARGETS), "int8": int8}
    vae = 2 * parameters(name)["vae"]
    generation = [
        step_cost(name, size, (batch or air.BATCH) * passes, int8=int8).peak + vae,
        vae_cost(name, size, batch or air.BATCH).peak + step_cost(name, size, int8=int8).peak,
    ]
    return [
        name,
        size,
        million["transformer"],
        million["vae"],
        million["text"],
        text_cost(name) / 1e12,
        step.flops / 1e12,
        decoding.flops / 1e12,
        (passes * steps * step.flops + decoding.flops) / 1e12,
        lora_cost(name, size, 1, **options).flops / 1e12,
        (lora_cost(name, size, batch or air.LORA.BATCH, **options).peak + vae) / GIB,
        max(generation) / GIB,
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    from tabulate import tabulate

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024], help="sides in pixels, multiples of 32")
    parser.add_argument("--int8", action="store_true", help="memory with 8-bit weights")
    parser.add_argument("--batch", type=int, default=0, help="images at once, in LoRA and generation; 0: the config's")
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    options = parser.parse_args(arguments)
    rows = [
        row_of(name, size, int8=options.int8, batch=options.batch) for name in options.models for size in options.sizes
    ]
    heads = ["", "px", "transformer M", "VAE M", "text M", "text TFLOP", "step TFLOP", "decode TFLOP", "image TFLOP"]
    heads += ["LoRA TFLOP", "GiB LoRA", "GiB generation"]
    print(tabulate(rows, heads, tablefmt="github", floatfmt=".2f"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
