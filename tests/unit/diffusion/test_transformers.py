"""Transformer generators (Stable Diffusion 3, 3.5, FLUX.1, Sana): adapted, interrupted, read by plain diffusers."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_pipeline import plan
from safetensors.torch import load_file
from small_generators import TRANSFORMERS, make_pipeline, save_pipeline, side_of
from small_models import write_pictures

from air_plugin.config import LoraSettings
from air_plugin.diffusion import generate as generation
from air_plugin.diffusion import lora as module
from air_plugin.diffusion.families import FAMILIES, UNET, family_of
from air_plugin.diffusion.flow import flow_loss, sample_levels
from air_plugin.diffusion.flux import pack, positions, unpack
from air_plugin.diffusion.generate import generate
from air_plugin.diffusion.lora import WEIGHTS, adapter_loaded, train_lora
from air_plugin.diffusion.pipeline import Generator, _fingerprint, encode_prompts, load_generator, require_size
from air_plugin.diffusion.sampling import encode_once
from air_plugin.utils.errors import UserError
from air_plugin.utils.images import load_rgb
from air_plugin.utils.store import Store

TARGETS = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj")
SETTINGS = LoraSettings(rank=2, targets=TARGETS, steps=4, lr=0.05, batch=3, checkpoint=2)
CAPTIONS = ["a dog", "a sea", "a dog", "a cat"]
NAMES = ["dog", "sea", "cat", "fox"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("transformers")
    return {name: save_pipeline(name, root / name) for name in TRANSFORMERS}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_pictures(tmp_path_factory.mktemp("pictures"), len(CAPTIONS))


def load(folder: Path) -> Generator:
    return load_generator(str(folder), scheduler="own")


def train(generator: Generator, pictures: list[str], store: Store) -> Path:
    sana = type(generator.pipeline).__name__ == "SanaPipeline"
    settings = replace(SETTINGS, targets=("to_q", "to_v", "to_out.0")) if sana else SETTINGS
    size = 32 if sana else 16
    return train_lora(generator, pictures, CAPTIONS, settings=settings, size=size, seed=0, store=store)[0]


def options_of(pipeline: Any) -> dict[str, Any]:
    """What a user gives to diffusers' own call."""
    if type(pipeline).__name__ == "SanaPipeline":
        return {"use_resolution_binning": False}
    return {"max_sequence_length": family_of(pipeline).longest_text(pipeline)}


def pixels(report: Any) -> list[bytes]:
    return [path.read_bytes() for path in report.paths]


@pytest.mark.parametrize("architecture", TRANSFORMERS)
def test_killed_and_resumed_is_bit_identical_and_plain_diffusers_makes_the_same_images(
    architecture: str, folders: dict[str, Path], pictures: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    size = side_of(architecture)
    jobs = [replace(job, size=size) for job in plan(NAMES, images=2)]
    whole = load(folders[architecture])
    adapter = train(whole, pictures, Store(tmp_path / "whole"))
    with adapter_loaded(whole.pipeline, adapter):
        expected = generate(whole.pipeline, jobs, tmp_path / "images", batch_size=3)
    assert len(expected.paths) == 8

    with monkeypatch.context() as patch:
        saved = module._save_checkpoint
        patch.setattr(module, "_save_checkpoint", lambda *arguments: saved(*arguments) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(load(folders[architecture]), pictures, Store(tmp_path / "cut"))
    resumed = train(load(folders[architecture]), pictures, Store(tmp_path / "cut"))
    for name in (WEIGHTS, "losses.safetensors"):
        assert (resumed / name).read_bytes() == (adapter / name).read_bytes()

    start, calls = generation.start_batch, []

    def crashing(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return start(*arguments)

    again = load(folders[architecture])  # another process: nothing is encoded yet
    with monkeypatch.context() as patch, adapter_loaded(again.pipeline, resumed):
        patch.setattr(generation, "start_batch", crashing)
        with pytest.raises(KeyboardInterrupt):
            generate(again.pipeline, jobs, tmp_path / "cut_images", batch_size=3)
    again = load(folders[architecture])
    with adapter_loaded(again.pipeline, resumed):
        finished = generate(again.pipeline, jobs, tmp_path / "cut_images", batch_size=3)
    assert 0 < finished.generated < 8 and pixels(finished) == pixels(expected)

    plain = make_pipeline(architecture)
    arguments = {
        "prompt": jobs[0].prompt,
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "height": size,
        "width": size,
        "output_type": "np",
        **options_of(plain),
    }

    def image() -> torch.Tensor:
        made = plain(**arguments, generator=torch.Generator().manual_seed(jobs[0].seed)).images[0]
        return torch.from_numpy(made * 255)

    ours = torch.from_numpy(np.asarray(load_rgb(expected.paths[0]), dtype=np.float32))
    before = image()
    plain.load_lora_weights(adapter)
    assert (image() - ours).abs().max() <= 1 and (before - ours).abs().max() > 3


@pytest.mark.parametrize("architecture", TRANSFORMERS)
def test_training_gives_the_transformer_what_generation_gives_it(architecture: str, monkeypatch: pytest.MonkeyPatch):
    """The pipeline's own call is the reference: the same latents, level and text make the same inputs."""
    pipeline, seen = make_pipeline(architecture), []
    family = family_of(pipeline)
    forward = pipeline.transformer.forward

    def called(*positional: Any, **named: Any) -> Any:
        seen.append(named | dict(zip(("hidden_states",), positional, strict=False)))
        return forward(*positional, **named)

    monkeypatch.setattr(pipeline.transformer, "forward", called)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    flux, size = architecture.startswith("flux"), side_of(architecture)
    pipeline(
        prompt=["a dog", "a sea"],
        height=size,
        width=size,
        num_inference_steps=1,
        guidance_scale=1.0,
        latents=pack(latents) if flux else latents,
        **options_of(pipeline),
    )
    texts = encode_prompts(pipeline, ["a dog", "a sea"])
    level = seen[0]["timestep"] / (1 if flux else 1000)
    family.loss(
        pipeline.transformer,
        pipeline.scheduler,
        torch.zeros_like(latents),
        states=texts.states,
        noise=latents / level[0],
        steps=level,
        added=family.added(texts, size),
    )
    for name, value in seen[0].items():
        if isinstance(value, torch.Tensor):
            assert torch.allclose(value.float(), seen[1][name].float(), atol=1e-5), name
        elif name == "guidance":
            assert value is None and seen[1][name] is None
    further = "encoder_attention_mask" if architecture == "sana" else "pooled_projections"
    assert {"hidden_states", "timestep", "encoder_hidden_states", further} <= seen[0].keys()


def test_the_flow_loss_by_hand():
    rng = torch.Generator().manual_seed(0)
    latents, noise, prediction = (torch.randn(2, 1, 2, 2, generator=rng) for _ in range(3))
    levels, shown = torch.tensor([0.25, 1.0]), []
    loss = flow_loss(lambda noisy: shown.append(noisy) or prediction, latents, noise=noise, levels=levels)
    total = 0.0
    for image, s in enumerate(levels.tolist()):
        for x, e, u, z in zip(
            *(t[image].flatten().tolist() for t in (latents, noise, prediction, shown[0])), strict=True
        ):
            assert z == pytest.approx((1 - s) * x + s * e, abs=1e-6)
            total += (u - (e - x)) ** 2
    assert loss.item() == pytest.approx(total / 8, rel=1e-5)


def test_noise_levels_are_logit_normal_and_shifted():
    plain, shifted = (sample_levels(4001, shift, torch.Generator().manual_seed(0)) for shift in (1.0, 3.0))
    assert plain.median().item() == pytest.approx(0.5, abs=0.02) and plain.min() > 0 and plain.max() < 1
    assert torch.logit(plain).std().item() == pytest.approx(1, abs=0.05)
    assert torch.allclose(shifted, 3 * plain / (1 + 2 * plain)) and shifted.median().item() == pytest.approx(
        0.75, abs=0.02
    )


def test_the_shift_is_the_schedulers_and_depends_on_the_size_where_it_does():
    for architecture, expected in (("sd3", 3.0), ("flux_schnell", 1.0), ("sana", 3.0)):
        pipeline = make_pipeline(architecture)
        assert family_of(pipeline).shift(pipeline, 16) == family_of(pipeline).shift(pipeline, 64) == expected
    dev = make_pipeline("flux_dev")
    assert family_of(dev).shift(dev, 64) == pytest.approx(math.exp(0.5))  # 256 tokens of 4 x 4 pixels
    assert family_of(dev).shift(dev, 256) == pytest.approx(math.exp(1.15))  # 4,096


def test_tokens_are_those_of_diffusers():
    from diffusers import FluxPipeline

    latents = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    tokens = pack(latents)
    assert torch.equal(tokens, FluxPipeline._pack_latents(latents, 2, 3, 4, 6))
    assert torch.equal(unpack(tokens, 4, 6), latents)
    theirs = FluxPipeline._prepare_latent_image_ids(2, 2, 3, torch.device("cpu"), torch.float32)
    assert torch.equal(positions(2, 3, torch.device("cpu")).float(), theirs)


def test_text_encoders_are_there_only_while_they_encode_and_each_text_is_encoded_once(folders: dict[str, Path]):
    pipeline = load(folders["sd3"]).pipeline
    assert pipeline.text_encoder is pipeline.text_encoder_3 is None
    family, texts = family_of(pipeline), []
    encode_one = family.encode_one
    try:
        family.encode_one = lambda pipeline, text: texts.append(text) or encode_one(pipeline, text)
        first = encode_prompts(pipeline, ["a dog", "a sea"])
        rows = encode_once(pipeline, ["a sea", "a cat"], guidance=3.0)
    finally:
        del family.encode_one
    assert texts == ["a dog", "a sea", "a cat", None] and pipeline.text_encoder is pipeline.text_encoder_3 is None
    assert torch.equal(rows.prompts["prompt_embeds"][0], first.states[1]) and len(rows.empty) == 2


@pytest.mark.parametrize("architecture", TRANSFORMERS)
def test_what_is_loaded_and_saved(architecture: str, folders: dict[str, Path], pictures: list[str], tmp_path: Path):
    generator = load(folders[architecture])
    assert generator.fingerprint == _fingerprint(make_pipeline(architecture))
    assert family_of(generator.pipeline) is not UNET
    folder = train(generator, pictures, Store(tmp_path))
    assert all(name.startswith("transformer.") for name in load_file(folder / WEIGHTS))
    step = 32 if architecture == "sana" else 4
    with pytest.raises(UserError, match=rf"AIR\.SIZE is 18; .* multiple of {step}"):
        require_size(generator.pipeline, 18)


def test_what_does_not_fit_is_refused_in_one_line(folders: dict[str, Path]):
    for options, message in (
        ({}, "AIR.SCHEDULER is dpm, but .* StableDiffusion3Pipeline, which needs own"),
        ({"scheduler": "own", "lcm_lora": "some/adapter"}, "AIR.LCM_LORA is for generators with a U-Net"),
        ({"scheduler": "own", "safety_checker": True}, "comes without one"),
    ):
        with pytest.raises(UserError, match=message) as raised:
            load_generator(str(folders["sd3"]), **options)  # type: ignore[arg-type]
        assert "\n" not in str(raised.value)


def test_every_pipeline_belongs_to_one_family():
    kinds = [kind for family in FAMILIES for kind in family.pipelines]
    assert len(kinds) == len(set(kinds)) == 5 and all(family_of(kind).pipelines.count(kind) == 1 for kind in kinds)
