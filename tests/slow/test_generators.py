"""The generators at full size, from their published configurations with random weights, on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.generator_flops import (
    ATTENTION,
    UNETS,
    LiveBytes,
    build_text_towers,
    build_unet,
    build_vae,
    lora_cost,
    lora_parameters,
    meta,
    parameters,
    unet_cost,
    unet_inputs,
    vae_cost,
)

pytestmark = pytest.mark.slow


def materialise(build: Any, *arguments: str) -> Any:
    """The model in fp32 with small random weights, all of them views of the same numbers: SDXL's own take 10 GB."""
    with meta(torch.float32):
        model = build(*arguments)
    largest = max(value.numel() for value in model.parameters())
    noise = 0.02 * torch.randn(largest, generator=torch.Generator().manual_seed(0))
    for name, layer in model.named_modules():
        for kind, value in layer.named_parameters(recurse=False):
            if value.ndim > 1:
                content = noise[: value.numel()].view(value.shape)
            else:
                content = torch.full(value.shape, float("norm" in name and kind == "weight"))
            setattr(layer, kind, torch.nn.Parameter(content, requires_grad=False))
    return model.eval()


@pytest.mark.parametrize(
    ("architecture", "unet", "vae", "text"),
    [
        ("sd15", 859_520_964, 83_653_863, 123_060_480),
        ("sd21", 865_910_724, 83_653_863, 340_387_840),
        ("sdxl", 2_567_463_684, 83_653_863, 123_060_480 + 694_659_840),
    ],
)
def test_numbers_of_parameters_are_the_published_ones(architecture: str, unet: int, vae: int, text: int):
    assert parameters(architecture) == {"unet": unet, "vae": vae, "text": text}


@pytest.mark.parametrize(("size", "step", "decoding"), [(256, 0.180, 0.62), (512, 0.803, 2.51)])
def test_the_counted_flops_of_sd15(size: int, step: float, decoding: float):
    """Against figures that were counted independently of this code."""
    assert unet_cost("sd15", size).flops / 1e12 == pytest.approx(step, abs=0.0006)
    assert vae_cost("sd15", size).flops / 1e12 == pytest.approx(decoding, abs=0.006)


@pytest.mark.parametrize("architecture", UNETS)
@torch.no_grad()
def test_a_denoising_step_at_256_pixels(architecture: str):
    unet = materialise(build_unet, architecture)
    inputs = unet_inputs(architecture, batch=1, size=256, generator=torch.Generator().manual_seed(1))
    predicted = unet(**inputs).sample
    assert predicted.shape == (1, 4, 32, 32) and predicted.isfinite().all() and predicted.std() > 0
    other = unet(**{**inputs, "encoder_hidden_states": -inputs["encoder_hidden_states"]}).sample
    assert not torch.equal(other, predicted)  # the text has an influence
    layers = [name for name, layer in unet.named_modules() if name.endswith(tuple(f".{part}" for part in ATTENTION))]
    assert len(layers) == {"sd15": 128, "sd21": 128, "sdxl": 560}[architecture]
    assert lora_parameters(architecture, 16) / sum(p.numel() for p in unet.parameters()) < 0.01


@torch.no_grad()
def test_the_autoencoder_at_256_pixels():
    vae = materialise(build_vae, "sd15")
    latent = vae.encode(torch.zeros(1, 3, 256, 256)).latent_dist
    assert latent.mean.shape == (1, 4, 32, 32)
    assert vae.decode(latent.mean).sample.shape == (1, 3, 256, 256)


@pytest.mark.parametrize("architecture", UNETS)
@torch.no_grad()
def test_the_text_towers_give_what_the_unet_attends_to(architecture: str):
    widths = 0
    with meta():
        towers = build_text_towers(architecture)
        for tower in towers:
            states = tower(torch.zeros(1, 77, dtype=torch.long), output_hidden_states=True).hidden_states[-2]
            widths += states.shape[2]
    assert widths == UNETS[architecture]["cross_attention_dim"]
    if architecture == "sdxl":
        assert towers[1].config.projection_dim + 6 * 256 == UNETS["sdxl"]["projection_class_embeddings_input_dim"]


def test_live_bytes_by_hand():
    with LiveBytes() as live:
        first = torch.empty(1000, device="meta")
        second = first + 1
        assert live.now == 8000
        del first
        view = second.view(10, 100)
        del second
        assert live.now == 4000  # the view holds it
        third = view * 2
        del view
        assert (live.now, live.peak) == (4000, 8000)
        del third
        assert live.now == 0
        weight, value = (torch.empty(100, 100, device="meta", requires_grad=asked) for asked in (True, False))
        total = (value @ weight).exp().sum()
        assert live.now == 40000 + 40000 + 40000 + 4  # of the product nothing is kept, of the exponential its result
        total.backward()
        assert live.now == 40000 + 40000 + 4 + 40000  # the gradient


def test_attention_keeps_no_matrix_of_all_pairs():
    """From 512 to 1024 pixels activations grow by four; a matrix of all pairs would grow by sixteen."""
    small, large = (lora_cost("sd15", size, 1).peak - lora_cost("sd15", 64, 1).peak for size in (512, 1024))
    assert 3.8 < large / small < 4.3
