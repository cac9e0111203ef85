"""Weights in 8 bits: against the definition, under LoRA, in whole generators."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_pipeline import plan
from safetensors.torch import load_file
from small_generators import save_pipeline, side_of
from small_models import write_pictures

from air_plugin.config import LoraSettings
from air_plugin.diffusion.families import denoiser_of
from air_plugin.diffusion.generate import generate
from air_plugin.diffusion.int8 import Int8Linear, quantize
from air_plugin.diffusion.lora import WEIGHTS, adapter_loaded, train_lora
from air_plugin.diffusion.pipeline import load_generator
from air_plugin.utils.images import load_rgb
from air_plugin.utils.store import Store


def make_layer(dtype: torch.dtype = torch.float32) -> torch.nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = torch.nn.Linear(7, 5).to(dtype)
    layer.weight.data[2] = 0  # a row without a scale
    return layer.requires_grad_(False)


def test_the_weights_are_the_definitions():
    layer = make_layer()
    made = Int8Linear(layer)
    for row, (weights, found) in enumerate(zip(layer.weight.tolist(), made.weight.tolist(), strict=True)):
        scale = max(abs(w) for w in weights) / 127
        assert found == [round(w / scale) if scale else 0 for w in weights]
        if scale:
            assert made.scale[row].item() == pytest.approx(scale, rel=1e-6)
    assert made.weight.dtype == torch.int8 and made.bias is layer.bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_gradient_are_those_of_the_rounded_weights(dtype: torch.dtype):
    made = Int8Linear(make_layer(dtype))
    plain = make_layer(dtype)
    plain.weight.data = made.weight.to(dtype) * made.scale
    x = torch.randn(3, 4, 7, generator=torch.Generator().manual_seed(1)).to(dtype)
    outputs, gradients, near = [], [], 1e-5 if dtype == torch.float32 else 2e-2
    for layer in (made, plain):
        y = x.clone().requires_grad_(True)
        output = layer(y)
        output.square().sum().backward()
        outputs.append(output.detach())
        gradients.append(y.grad)
    for first, second in (outputs, gradients):
        assert first.dtype == dtype and torch.allclose(first, second, rtol=near, atol=near)
    assert outputs[0].std() > 0


def test_only_layers_of_blocks_are_replaced_and_no_layer_twice():
    block = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 4))
    model = torch.nn.Module()
    model.first, model.blocks = torch.nn.Linear(4, 4), torch.nn.ModuleList([torch.nn.ModuleList([block])])
    assert quantize(model) == 2 and quantize(model) == 0
    assert type(model.first) is torch.nn.Linear and isinstance(block[0], Int8Linear)


def bytes_of(model: Any) -> int:
    return sum(value.nbytes for value in model.state_dict().values())


@pytest.mark.parametrize("architecture", ["sd35", "flux_dev", "sana", "sdxl"])
def test_a_generator_in_8_bits_is_adapted_and_generates(architecture: str, tmp_path: Path):
    folder, size = save_pipeline(architecture, tmp_path / "generator"), side_of(architecture)
    pictures = write_pictures(tmp_path / "pictures", 4)
    flow = architecture != "sdxl"
    options: dict[str, Any] = {"scheduler": "own", "precision": "bf16"} if flow else {"precision": "bf16"}
    whole = load_generator(str(folder), **options)
    small = load_generator(str(folder), int8=True, **options)
    assert small.fingerprint != whole.fingerprint and denoiser_of(small.pipeline).dtype == torch.bfloat16
    assert bytes_of(denoiser_of(small.pipeline)) < 0.9 * bytes_of(denoiser_of(whole.pipeline))
    targets = ("to_q", "to_v") if architecture in ("sana", "sdxl") else ("attn.to_q", "attn.add_v_proj")
    settings = LoraSettings(rank=2, targets=targets, steps=3, lr=0.05, batch=2, checkpoint=2)
    jobs = [replace(job, size=size) for job in plan(["dog", "sea"], images=1)]
    images = []
    for name, generator in (("small", small), ("whole", whole)):
        report = generate(generator.pipeline, jobs, tmp_path / name, batch_size=2)
        images.append(torch.stack([torch.tensor(list(load_rgb(path).tobytes())) for path in report.paths]).float())
    assert (images[0] - images[1]).abs().mean() < 12 < images[1].std()  # other images, but of the same scene
    adapter, _, _ = train_lora(
        small, pictures, ["a dog"] * 4, settings=settings, size=size, seed=0, store=Store(tmp_path / "store")
    )
    assert any(value.abs().max() > 0 for name, value in load_file(adapter / WEIGHTS).items() if "lora_B" in name)
    with adapter_loaded(small.pipeline, adapter):
        adapted = generate(small.pipeline, jobs, tmp_path / "adapted", batch_size=2)
    before = [(tmp_path / "small" / path.name).read_bytes() for path in adapted.paths]
    assert all(path.read_bytes() != image for path, image in zip(adapted.paths, before, strict=True))
    whole.pipeline.load_lora_weights(adapter)  # plain weights take the adapter, too
