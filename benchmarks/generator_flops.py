"""Arithmetic and memory of the generators at full size, counted without weights and without a GPU.

    python -m benchmarks.generator_flops             # every part and a LoRA step at 256, 512 and 1024 px
    python -m benchmarks.generator_flops --budget    # time and memory of configs/generators; --images M --classes C

Models of the published architectures run on torch's meta device, where tensors have shapes and no content. torch
counts the floating-point operations of matrix products, convolutions and attention (two for a multiplication with an
addition), and a count of the live tensors gives the most memory. Attention is counted as a kernel that does not keep
the matrix of all pairs, as on GPUs. Nothing here is measured: hours follow from counts, a peak and an assumed
utilisation.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
TOKENS = 77
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")

CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
OPENCLIP_H = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "projection_dim": 512,
}
OPENCLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
FOUR_LEVELS = {
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
}
# The published configurations, in diffusers' names; SD-Turbo is SD 2.1 with another prediction.
UNETS: dict[str, dict[str, Any]] = {
    "sd15": {**FOUR_LEVELS, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd21": {
        **FOUR_LEVELS,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "sdxl": {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
TEXT_TOWERS = {"sd15": (CLIP_L,), "sd21": (OPENCLIP_H,), "sdxl": (CLIP_L, OPENCLIP_G)}
NATIVE = {"sd15": 512, "sd21": 768, "sdxl": 1024}
ARCHITECTURE_OF = {"sd15": "sd15", "lcm_sd15": "sd15", "sd21": "sd21", "sd_turbo": "sd21", "sdxl": "sdxl"}

# Peak of dense bf16 matrix products, TFLOP/s, and memory, from the makers' data sheets.
DEVICES = {"A100 80 GB": 312.0, "H100 SXM": 989.0, "RTX 4090": 165.2}


def build_unet(architecture: str) -> Any:
    """The U-Net of a published architecture on torch's default device, in its default type."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(sample_size=NATIVE[architecture] // 8, layers_per_block=2, **UNETS[architecture])


def build_vae(architecture: str) -> Any:
    """The autoencoder; between architectures only its scaling factor differs."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=0.13025 if architecture == "sdxl" else 0.18215,
    )


def build_text_towers(architecture: str) -> list[Any]:
    """The text towers; SDXL's second one has a projection."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    return [
        (CLIPTextModelWithProjection if number else CLIPTextModel)(
            CLIPTextConfig(vocab_size=49408, max_position_embeddings=TOKENS, **tower)
        )
        for number, tower in enumerate(TEXT_TOWERS[architecture])
    ]


def unet_inputs(
    architecture: str, *, batch: int, size: int, generator: torch.Generator | None = None
) -> dict[str, Any]:
    """The inputs of a denoising step; random where there is a random generator."""

    def values(*shape: int) -> torch.Tensor:
        return torch.empty(shape) if generator is None else torch.randn(shape, generator=generator)

    inputs: dict[str, Any] = {
        "sample": values(batch, 4, size // 8, size // 8),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": values(batch, TOKENS, UNETS[architecture]["cross_attention_dim"]),
    }
    if architecture == "sdxl":
        ids = torch.tensor([[size, size, 0, 0, size, size]]).expand(batch, -1)
        inputs["added_cond_kwargs"] = {"text_embeds": values(batch, 1280), "time_ids": ids}
    return inputs


@contextmanager
def as_on_a_gpu(*, mixed: bool = False) -> Iterator[None]:
    """Attention without the matrix of all pairs; `mixed`: norms return fp32, as under autocast."""
    functional: Any = torch.nn.functional
    names = ("scaled_dot_product_attention", "group_norm", "layer_norm", "linear", "conv2d")
    before = {name: getattr(functional, name) for name in names}

    def attention(query: Any, key: Any, value: Any, attn_mask: Any = None, **named: Any) -> Any:
        if attn_mask is not None or named.get("is_causal"):  # the text towers'
            return before["scaled_dot_product_attention"](query, key, value, attn_mask=attn_mask, **named)
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]

    def norm(name: str) -> Callable[..., Any]:
        def call(value: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
            weight, bias = (None if part is None else part.float() for part in (weight, bias))
            return before[name](value.float(), shape, weight, bias, eps)

        return call

    def product(name: str) -> Callable[..., Any]:
        return lambda value, weight, *rest, **named: before[name](value.to(weight.dtype), weight, *rest, **named)

    functional.scaled_dot_product_attention = attention
    if mixed:
        functional.group_norm, functional.layer_norm = norm("group_norm"), norm("layer_norm")
        functional.linear, functional.conv2d = product("linear"), product("conv2d")
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(functional, name, function)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made within it and are alive, and their peak.

    A storage counts once, however many tensors look at it, and until nobody holds it: autograd counts as somebody.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        result = function(*arguments, **(named or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((arguments, named)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.known and key not in given:
                    self.known.add(key)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._gone, key, storage.nbytes())
        return result

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@dataclass(frozen=True)
class Cost:
    """FLOPs, and the highest number of bytes, weights included."""

    flops: int
    peak: int


def count(model: Any, work: Callable[[], Any], *, mixed: bool = False) -> Cost:
    """Run `work` on the meta device and count; `model` is in memory already."""
    weights = sum(value.untyped_storage().nbytes() for value in model.parameters())
    with as_on_a_gpu(mixed=mixed), FlopCounterMode(display=False) as flops, LiveBytes() as live:
        work()
    return Cost(flops.get_total_flops(), weights + live.peak)


@contextmanager
def meta(dtype: torch.dtype = torch.bfloat16) -> Iterator[None]:
    """New tensors are on the meta device, and bf16."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(before)


@cache
def parameters(architecture: str) -> dict[str, int]:
    """Parameters of the parts."""
    with meta():
        parts = {
            "unet": [build_unet(architecture)],
            "vae": [build_vae(architecture)],
            "text": build_text_towers(architecture),
        }
    return {name: sum(v.numel() for m in models for v in m.parameters()) for name, models in parts.items()}


@cache
def unet_cost(architecture: str, size: int, batch: int = 1) -> Cost:
    """One denoising step."""
    with meta(), torch.no_grad():
        unet, inputs = build_unet(architecture), unet_inputs(architecture, batch=batch, size=size)
        return count(unet, lambda: unet(**inputs))


@cache
def vae_cost(architecture: str, size: int, batch: int = 1, *, encode: bool = False) -> Cost:
    """Decoding latents into images, or encoding images."""
    with meta(), torch.no_grad():
        vae = build_vae(architecture)
        if encode:
            return count(vae, lambda: vae.encode(torch.empty(batch, 3, size, size)))
        return count(vae, lambda: vae.decode(torch.empty(batch, 4, size // 8, size // 8)))


@cache
def text_cost(architecture: str) -> int:
    """FLOPs of a prompt of 77 tokens through all towers."""
    with meta(), torch.no_grad():
        towers = build_text_towers(architecture)
        tokens = torch.zeros(1, TOKENS, dtype=torch.long)
        return sum(count(tower, partial(tower, tokens)).flops for tower in towers)


@cache
def lora_cost(architecture: str, size: int, batch: int, rank: int = 16) -> Cost:
    """A training step: forward, backward through the frozen weights, and AdamW's two moments of the adapter in fp32."""
    from peft import LoraConfig

    with meta():
        unet, inputs = build_unet(architecture), unet_inputs(architecture, batch=batch, size=size)
        unet.requires_grad_(False)
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(ATTENTION)))
        trained = [value for value in unet.parameters() if value.requires_grad]
        for value in trained:
            value.data = value.data.float()

        cost = count(unet, lambda: unet(**inputs).sample.float().square().mean().backward(), mixed=True)
    return Cost(cost.flops, cost.peak + 2 * sum(4 * value.numel() for value in trained))


def lora_parameters(architecture: str, rank: int) -> int:
    """Of the adapter on all attention layers."""
    with meta():
        unet = build_unet(architecture)
    layers = [layer for name, layer in unet.named_modules() if name.endswith(tuple(f".{t}" for t in ATTENTION))]
    return sum(rank * (layer.in_features + layer.out_features) for layer in layers)


def image_flops(architecture: str, *, size: int, steps: int, guidance: float) -> int:
    """An image: text once (twice with guidance), every step (twice with guidance), decoding."""
    passes = 2 if guidance > 1 else 1
    steps_cost = passes * steps * unet_cost(architecture, size).flops
    return passes * text_cost(architecture) + steps_cost + vae_cost(architecture, size).flops


def generation_peak(architecture: str, *, size: int, batch: int, guidance: float) -> int:
    """Bytes: all weights, plus the larger of a step and the decoding."""
    weights = parameters(architecture)
    step = unet_cost(architecture, size, batch * (2 if guidance > 1 else 1)).peak - 2 * weights["unet"]
    decoding = vae_cost(architecture, size, batch).peak - 2 * weights["vae"]
    return 2 * sum(weights.values()) + max(step, decoding)


def training_peak(architecture: str, *, size: int, batch: int, rank: int) -> int:
    """Bytes of a LoRA step, with the text towers and the autoencoder in memory."""
    weights = parameters(architecture)
    return 2 * (weights["vae"] + weights["text"]) + lora_cost(architecture, size, batch, rank).peak


def print_parts(sizes: Sequence[int]) -> None:
    """Parameters and FLOPs of every part."""
    from tabulate import tabulate

    rows = []
    for name in UNETS:
        million = {part: number / 1e6 for part, number in parameters(name).items()}
        for size in sizes:
            rows.append(
                [
                    name,
                    size,
                    million["unet"],
                    million["vae"],
                    million["text"],
                    unet_cost(name, size).flops / 1e12,
                    vae_cost(name, size).flops / 1e12,
                    vae_cost(name, size, encode=True).flops / 1e12,
                    text_cost(name) / 1e9,
                    lora_cost(name, size, 1).flops / 1e12,
                ]
            )
    heads = [
        "",
        "px",
        "U-Net M",
        "VAE M",
        "text M",
        "U-Net TFLOP",
        "decode TFLOP",
        "encode TFLOP",
        "text GFLOP",
        "LoRA TFLOP",
    ]
    print(tabulate(rows, heads, tablefmt="github", floatfmt=".3f"))


def print_budget(options: argparse.Namespace) -> None:
    """Hours and memory of the shipped configs, from counts, peak and utilisation."""
    from tabulate import tabulate

    print(f"{options.classes} classes, M = {options.images}, utilisation {options.utilisation:.0%} of the bf16 peak")
    rows = []
    paths = (ROOT / "configs" / "generators").glob("*.yaml")
    for path in sorted(path for path in paths if path.stem in ARCHITECTURE_OF):  # not mini
        for size in options.sizes or [0]:
            rows.append(budget_row(path, size, options))
    heads = [
        "config",
        "px",
        "steps",
        "TFLOP/image",
        "PFLOP generation",
        "GiB generation",
        "PFLOP LoRA",
        "GiB LoRA",
        *(f"{name}: LoRA + generation" for name in DEVICES),
    ]
    print(tabulate(rows, heads, tablefmt="github", floatfmt=".1f"))


def budget_row(path: Path, size: int, options: argparse.Namespace) -> list[Any]:
    """A line of the table for a config, at its own size where `size` is 0."""
    air = read(path)
    name, size = ARCHITECTURE_OF[path.stem], size or air.SIZE
    image = image_flops(name, size=size, steps=air.STEPS, guidance=air.GUIDANCE)
    generation = options.images * options.classes * image
    pictures = options.classes * air.LORA.PER_CLASS
    step = lora_cost(name, size, air.LORA.BATCH, air.LORA.RANK).flops
    training = air.LORA.STEPS * step + pictures * vae_cost(name, size, encode=True).flops
    memory = [
        generation_peak(name, size=size, batch=air.BATCH, guidance=air.GUIDANCE),
        training_peak(name, size=size, batch=air.LORA.BATCH, rank=air.LORA.RANK),
    ]
    times = [
        f"{duration(training / speed)} + {duration(generation / speed)}"
        for speed in (peak * 1e12 * options.utilisation for peak in DEVICES.values())
    ]
    return [
        path.stem,
        size,
        air.STEPS,
        image / 1e12,
        generation / 1e15,
        memory[0] / GIB,
        training / 1e15,
        memory[1] / GIB,
        *times,
    ]


def read(path: Path) -> Any:
    """The AIR part of a config file over the defaults."""
    from yacs.config import CfgNode

    from air_plugin.config import add_air_config, merge_file

    cfg = CfgNode({"DATASET": {}, "TRAINER": {}, "SEED": 0})
    add_air_config(cfg)
    merge_file(cfg, path, sections=("AIR",))
    return cfg.AIR


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever is short."""
    for unit, length, limit in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, float("inf"))):
        if seconds < limit:
            return f"{seconds / length:.0f} {unit}" if unit != "h" else f"{seconds / length:.1f} {unit}"
    raise ValueError(seconds)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.budget:
        print_budget(options)
    else:
        print_parts(options.sizes or [256, 512, 1024])
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", help="sides in pixels, multiples of 64")
    parser.add_argument("--budget", action="store_true", help="time and memory of configs/generators")
    parser.add_argument("--images", type=int, default=120, help="M, images a class")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--utilisation", type=float, default=0.25, help="share of the peak that is assumed")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
