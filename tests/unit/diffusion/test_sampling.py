"""One batch of a pipeline: prompts encoded once, the text's keys computed once, and nothing changes by a bit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_pipeline import NAMES, FakePipeline, plan
from PIL import Image
from small_generators import ARCHITECTURES, make_pipeline
from small_models import air_settings
from torch import Tensor

from air_plugin.diffusion import generate as module
from air_plugin.diffusion import sampling
from air_plugin.diffusion.generate import generate
from air_plugin.diffusion.jobs import ImageJob
from air_plugin.diffusion.lora import add_adapter
from air_plugin.diffusion.pipeline import _make_scheduler
from air_plugin.diffusion.sampling import Batch, encode_once, text_keys_reused


@torch.no_grad()
def plainly(pipeline: Any, jobs: Sequence[ImageJob], size: int) -> list[np.ndarray]:
    """The images as diffusers makes them: prompts encoded in every batch, pixels rounded by NumPy."""
    images = []
    for start in range(0, len(jobs), size):
        batch = jobs[start : start + size]
        output = pipeline(
            prompt=[job.prompt for job in batch],
            num_inference_steps=batch[0].steps,
            guidance_scale=batch[0].guidance,
            height=batch[0].size,
            width=batch[0].size,
            generator=[torch.Generator("cpu").manual_seed(job.seed) for job in batch],
            output_type="pt",
        )
        values = output.images.float().clamp(0, 1).permute(0, 2, 3, 1).numpy()
        images += list(np.round(values * 255).astype(np.uint8))
    return images


@pytest.mark.parametrize("guidance", [0.0, 3.0])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_images_are_those_of_the_plain_pipeline_bit_by_bit(architecture: str, guidance: float, tmp_path: Path):
    pipeline = make_pipeline(architecture)
    pipeline.scheduler = _make_scheduler("DPMSolverMultistepScheduler", pipeline.scheduler)
    with torch.no_grad():
        for value in add_adapter(pipeline.unet, air_settings().lora, 0).values():
            value.copy_(0.3 * torch.randn(value.shape, generator=torch.Generator().manual_seed(5)))
    jobs = plan(guidance=guidance, steps=3)
    report = generate(pipeline, jobs, tmp_path, batch_size=4)
    for path, expected in zip(report.paths, plainly(pipeline, jobs, 4), strict=True):
        assert np.array_equal(np.asarray(Image.open(path)), expected)


def test_images_of_the_embedded_generator_are_those_of_the_plain_pipeline(tmp_path: Path):
    """With the settings and the batch of the digits; another composition of prompts changes no bit of their states."""
    from air_plugin.mini import load_pipeline

    pipeline = load_pipeline(torch.float32)
    jobs = plan(["zero", "one", "seven"], images=8, template="a photo of the digit {}.", size=32, guidance=2.0)
    report = generate(pipeline, jobs, tmp_path, batch_size=16)
    for path, expected in zip(report.paths, plainly(pipeline, jobs, 16), strict=True):
        assert np.array_equal(np.asarray(Image.open(path)), expected)


@pytest.mark.parametrize(("guidance", "guided"), [(1.0, False), (1.5, True)])
def test_a_prompt_is_encoded_once(tmp_path: Path, guidance: float, guided: bool):
    pipeline, jobs = FakePipeline(), plan(images=5, guidance=guidance)
    generate(pipeline, jobs, tmp_path, batch_size=4)
    assert pipeline.encoded == [job.prompt for job in jobs[: len(NAMES)]]
    assert pipeline.prompts == [job.prompt for job in jobs]
    assert set(pipeline.guided) == {guided}
    generate(pipeline, jobs, tmp_path, batch_size=4)
    assert len(pipeline.encoded) == len(NAMES)  # not at all where every image is there


def test_prompts_are_encoded_in_chunks_and_the_empty_one_once(monkeypatch: pytest.MonkeyPatch):
    pipeline = make_pipeline("sdxl")
    pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    prompts = ["a", "bb", "a", "ccc", "dddd", "bb"]
    whole = encode_once(pipeline, prompts, guidance=3.0)
    monkeypatch.setattr(sampling, "CHUNK", 3)
    chunked = encode_once(pipeline, prompts, guidance=3.0)
    reference = pipeline.encode_prompt(prompt=["ccc", "a"], device="cpu", do_classifier_free_guidance=True)
    names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    for encoded in (whole, chunked):
        arguments = encoded.arguments(["ccc", "a"])
        assert sorted(arguments) == sorted(names)
        for name, expected in zip(names, reference, strict=True):
            assert arguments[name].shape == expected.shape
            assert torch.allclose(arguments[name], expected, atol=1e-6) and expected.abs().max() > 0.1
    assert all(len(value) == 1 for value in chunked.empty.values())
    assert sorted(encode_once(pipeline, prompts, guidance=1.0).arguments(["a"])) == [names[2], names[0]]


def test_the_empty_prompt_is_encoded_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sampling, "CHUNK", 2)
    pipeline, encode = FakePipeline(), FakePipeline.encode_prompt
    guided: list[bool] = []

    def noting(self: FakePipeline, *, do_classifier_free_guidance: bool, **named: Any) -> Any:
        guided.append(do_classifier_free_guidance)
        return encode(self, do_classifier_free_guidance=do_classifier_free_guidance, **named)

    monkeypatch.setattr(FakePipeline, "encode_prompt", noting)
    encode_once(pipeline, ["a", "b", "c", "d", "e"], guidance=2.0)
    assert guided == [True, False, False]


def counted(layer: torch.nn.Module) -> list[Tensor]:
    """The inputs of a layer from now on."""
    inputs: list[Tensor] = []
    layer.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    return inputs


def test_keys_of_the_text_are_computed_once_a_batch(tmp_path: Path):
    pipeline = make_pipeline("sd15")
    pipeline.scheduler = _make_scheduler("DPMSolverMultistepScheduler", pipeline.scheduler)
    add_adapter(pipeline.unet, air_settings().lora, 0)
    layers = {name: layer for name, layer in pipeline.unet.named_modules() if name.endswith(("to_k", "to_v"))}
    calls = {name: counted(layer.base_layer) for name, layer in layers.items()}
    generate(pipeline, plan(steps=4), tmp_path, batch_size=3)
    assert {name: len(inputs) for name, inputs in calls.items()} == {
        name: 2 if "attn2" in name else 2 * 4 for name in layers
    }
    assert any("attn2" in name for name in layers)
    assert not any("forward" in vars(layer) for layer in layers.values())  # as it was before


def test_another_text_is_computed_anew_and_forgotten_ones_are_freed():
    unet = make_pipeline("sd15").unet
    name, layer = next((name, layer) for name, layer in unet.named_modules() if name.endswith("attn2.to_k"))
    one, other = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
    with text_keys_reused(unet) as forget:
        first = layer(one)
        assert layer(one) is first and torch.equal(layer(other), torch.nn.functional.linear(other, layer.weight))
        assert torch.equal(layer(one), first)
        forget()
        assert layer.forward.input is None and layer.forward.output is None, name
    with pytest.raises(RuntimeError, match="stop"), text_keys_reused(unet):
        raise RuntimeError("stop")
    assert "forward" not in vars(layer)


class Event:
    """CUDA's event: the copy is there after `synchronize`."""

    def __init__(self, pixels: Tensor, content: Tensor) -> None:
        self.pixels, self.content = pixels, content

    def synchronize(self) -> None:
        self.pixels.copy_(self.content)


def test_pixels_are_read_after_the_copy():
    content = torch.arange(2 * 4 * 4 * 3, dtype=torch.uint8).view(2, 4, 4, 3)
    pixels = torch.zeros_like(content)
    first, second = Batch(pixels, torch.tensor([True, False]), Event(pixels, content)).read()
    assert first is None and second is not None and np.array_equal(second, content[1].numpy())


@pytest.mark.parametrize("fits", [10**6, 2])
def test_a_batch_ahead_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fits: int):
    """As on a GPU, where a batch is started before the images of the last one are read; some images fail."""
    jobs = plan(images=6)
    bad = {jobs[1].seed, jobs[7].seed, jobs[7].seed_of_attempt(1), jobs[17].seed}

    def make(name: str, ahead: int) -> tuple[FakePipeline, list[bytes]]:
        monkeypatch.setattr(module, "_batches_ahead", lambda device: ahead)
        pipeline = FakePipeline(lambda seed, image: image * 0 if seed in bad else image, fits=fits)
        report = generate(pipeline, jobs, tmp_path / name, batch_size=4)
        assert (report.generated, report.failed) == (18, 4)
        return pipeline, [path.read_bytes() for path in report.paths]

    (plain, expected), (ahead, found) = make("plain", 0), make("ahead", 1)
    assert found == expected and sorted(ahead.seeds) == sorted(plain.seeds)
    assert ahead.seeds != plain.seeds  # the second batch was started before the first one was known to have failed
