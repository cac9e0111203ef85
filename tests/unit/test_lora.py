"""The adapter: its loss, its captions, and a training that interruptions do not change."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_models import make_generator
from torch import Tensor

from air_plugin.config import LoraSettings
from air_plugin.diffusion import lora as module
from air_plugin.diffusion.lora import WEIGHTS, adapter_loaded, choose_captions, denoising_loss, train_lora
from air_plugin.diffusion.pipeline import Generator, _fingerprint, encode_prompts
from air_plugin.errors import UserError
from air_plugin.images import load_rgb
from air_plugin.store import Store

ALL_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
CAPTIONS = ["a dog", "a cat", "a dog", "a sea", "a cat", "a dog", "a sea"]


def lora_settings(**changes: Any) -> LoraSettings:
    settings: dict[str, Any] = {
        "enabled": True, "rank": 2, "targets": ALL_TARGETS, "steps": 5, "lr": 0.05, "batch": 3,
        "captions": "confident", "per_class": 2, "generic": "a photo.", "checkpoint": 2,
    }  # fmt: skip
    return LoraSettings(**{**settings, **changes})


def train(generator: Generator, pictures: list[str], store: Store, *, seed: int = 0, **changes: Any):
    settings = lora_settings(**changes)
    return train_lora(generator, pictures, CAPTIONS, settings=settings, size=16, seed=seed, store=store)


def draw(pipeline: Any) -> Tensor:
    return pipeline(
        prompt=["a dog", "a sea"], height=16, width=16, num_inference_steps=2, guidance_scale=3.0, output_type="pt",
        generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
    ).images  # fmt: skip


# denoising_loss


class FixedUnet:
    """Predicts what it is told to and notes what it is shown."""

    dtype = torch.float32

    def __init__(self, prediction: Tensor) -> None:
        self.prediction = prediction

    def __call__(self, noisy: Tensor, steps: Tensor, *, encoder_hidden_states: Tensor) -> SimpleNamespace:
        self.noisy, self.steps, self.states = noisy, steps, encoder_hidden_states
        return SimpleNamespace(sample=self.prediction)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_denoising_loss_by_hand(kind: str):
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_start=0.001, beta_end=0.02, beta_schedule="linear", prediction_type=kind)
    rng = torch.Generator().manual_seed(0)
    latents, noise, prediction = (torch.randn(3, 2, 2, 2, generator=rng) for _ in range(3))
    steps, states = torch.tensor([0, 400, 999]), torch.randn(3, 4, 5, generator=rng)
    unet = FixedUnet(prediction)
    loss = denoising_loss(unet, scheduler, latents, states=states, noise=noise, steps=steps)

    total = 0.0
    for image, step in enumerate(steps.tolist()):
        kept = math.prod(1 - (0.001 + 0.019 * t / 999) for t in range(step + 1))  # alpha bar
        for x, eps, said, shown in zip(*(t[image].flatten().tolist() for t in (latents, noise, prediction, unet.noisy)),
                                       strict=True):  # fmt: skip
            assert shown == pytest.approx(math.sqrt(kept) * x + math.sqrt(1 - kept) * eps, abs=1e-5)
            target = eps if kind == "epsilon" else math.sqrt(kept) * eps - math.sqrt(1 - kept) * x
            total += (said - target) ** 2
    assert loss.item() == pytest.approx(total / 24, rel=1e-4)
    assert torch.equal(unet.steps, steps) and torch.equal(unet.states, states)


def test_other_predictions_are_refused():
    from diffusers import DDPMScheduler

    zero = torch.zeros(1, 1, 1, 1)
    with pytest.raises(UserError, match="sample"):
        denoising_loss(
            FixedUnet(zero), DDPMScheduler(prediction_type="sample"), zero,
            states=zero[0], noise=zero, steps=torch.tensor([1]),
        )  # fmt: skip


# choose_captions


PROBS = torch.tensor([[0.7, 0.3], [0.9, 0.1], [0.4, 0.6], [0.8, 0.2], [0.45, 0.55]])
NAMES = ["crop_land", "sea"]


def test_confident_captions_are_of_the_most_confident_images_of_each_class():
    settings = lora_settings(captions="confident", per_class=2)
    index, captions = choose_captions(PROBS, NAMES, "a photo of {}.", settings)
    sea, crop = "a photo of sea.", "a photo of crop land."
    assert (index, captions) == ([1, 2, 3, 4], [crop, sea, crop, sea])


def test_all_images_with_their_pseudo_labels():
    index, captions = choose_captions(PROBS, NAMES, "{}", lora_settings(captions="all"))
    assert (index, captions) == ([0, 1, 2, 3, 4], ["crop land", "crop land", "sea", "crop land", "sea"])


def test_one_generic_caption():
    index, captions = choose_captions(PROBS, NAMES, "{}", lora_settings(captions="generic", generic="a photo."))
    assert (index, captions) == ([0, 1, 2, 3, 4], ["a photo."] * 5)


# train_lora


def test_training_lowers_the_loss(tiny_generator: Generator, pictures: list[str], store: Store):
    """Two trainings see the same noise, so their losses differ by what they have learned alone."""
    losses = []
    for rate in (0.02, 1e-12):
        folder, _, _ = train(tiny_generator, pictures, store, steps=25, batch=8, lr=rate)
        losses.append(load_file(folder / "losses.safetensors")["loss"])
    learned = losses[1] - losses[0]
    assert len(learned) == 25 and learned[0].abs() < 1e-5
    assert learned[-12:].mean() > 0.01 and (learned[-12:] > 0).float().mean() > 0.9


def test_latents_are_drawn_from_the_posterior_and_scaled():
    mean, log_variance = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    noise = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(5))
    drawn = module._sample(torch.cat([mean, log_variance], dim=1), 0.18, torch.Generator().manual_seed(5))
    assert torch.allclose(drawn, 0.18 * (mean + log_variance.exp().sqrt() * noise), atol=1e-6)


def test_every_image_is_trained_with_its_own_caption(
    tiny_generator: Generator, pictures: list[str], store: Store, monkeypatch: pytest.MonkeyPatch
):
    pipeline, seen = tiny_generator.pipeline, []
    means = []
    for path in pictures:
        image = load_rgb(path)
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.crop((left, top, left + side, top + side)).resize((16, 16), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1)[None] / 127.5 - 1
        means.append(pipeline.vae.encode(pixels).latent_dist.mean[0] * pipeline.vae.config.scaling_factor)
    words = {caption: encode_prompts(pipeline, [caption])[0] for caption in CAPTIONS}

    def looking(unet: Any, scheduler: Any, latents: Tensor, *, states: Tensor, **others: Any) -> Tensor:
        for latent, state in zip(latents, states, strict=True):
            number = min(range(7), key=lambda i: (latent - means[i]).abs().sum())
            seen.append(number)
            assert (latent - means[number]).abs().mean() < 0.05  # edges differ: ours is cropped before it is resized
            assert torch.allclose(state, words[CAPTIONS[number]], atol=1e-5)
        return denoising_loss(unet, scheduler, latents, states=states, **others)

    monkeypatch.setattr(module, "denoising_loss", looking)
    monkeypatch.setattr(module, "_sample", lambda moments, scaling, rng: moments.chunk(2, dim=1)[0] * scaling)
    train(tiny_generator, pictures, store, steps=10)
    assert set(seen) == set(range(7)) and len(seen) == 30


def test_the_generator_is_afterwards_what_it_was(tiny_generator: Generator, pictures: list[str], store: Store):
    names = [name for name, _ in tiny_generator.pipeline.unet.named_modules()]
    before = draw(tiny_generator.pipeline)
    train(tiny_generator, pictures, store)
    assert _fingerprint(tiny_generator.pipeline) == tiny_generator.fingerprint
    assert [name for name, _ in tiny_generator.pipeline.unet.named_modules()] == names
    assert torch.equal(draw(tiny_generator.pipeline), before)
    assert not any(value.requires_grad for value in tiny_generator.pipeline.unet.parameters())


def test_the_adapter_loads_in_plain_diffusers_and_changes_the_images(pictures: list[str], store: Store):
    folder, _, _ = train(make_generator(), pictures, store)
    assert (folder / WEIGHTS).name == "pytorch_lora_weights.safetensors"
    fresh = make_generator().pipeline
    plain = draw(fresh)
    fresh.load_lora_weights(folder)
    adapted = draw(fresh)
    assert (adapted - plain).abs().max() > 0.01
    ours = make_generator().pipeline
    with adapter_loaded(ours, folder):
        assert torch.allclose(draw(ours), adapted, atol=1e-6)
    assert torch.equal(draw(ours), plain)
    with adapter_loaded(ours, None):
        assert torch.equal(draw(ours), plain)


def test_every_target_is_in_the_file_and_is_loaded(pictures: list[str], store: Store):
    """diffusers passes over names that it does not know without an error, so each layer is looked at."""
    folder, _, _ = train(make_generator(), pictures, store)
    saved = load_file(folder / WEIGHTS)
    pipeline = make_generator().pipeline
    layers = [
        name for name, layer in pipeline.unet.named_modules()
        if any(name.endswith(f".{target}") for target in ALL_TARGETS) and ".attentions." in name
    ]  # fmt: skip
    assert len(saved) == 2 * len(layers) and len(layers) >= 2 * len(ALL_TARGETS)
    assert all(value.dtype == torch.float32 for value in saved.values())
    pipeline.load_lora_weights(folder)
    state = pipeline.unet.state_dict()
    for layer in layers:
        (up,) = [value for name, value in state.items() if name.startswith(f"{layer}.lora_B")]
        assert up.abs().max() > 0, layer  # begins as zero, so this came from the file
        assert any(value.shape == up.shape and torch.equal(value, up) for value in saved.values())


def test_an_adapter_trained_and_used_on_one_pipeline(
    tiny_generator: Generator, pictures: list[str], store: Store
):
    folder, _, _ = train(tiny_generator, pictures, store)
    fresh = make_generator().pipeline
    with adapter_loaded(fresh, folder), adapter_loaded(tiny_generator.pipeline, folder):
        assert torch.equal(draw(tiny_generator.pipeline), draw(fresh))


@pytest.mark.parametrize("crash_at", [1, 2, 3, 4])
def test_a_resumed_training_equals_an_undisturbed_one(
    pictures: list[str], tmp_path: Path, crash_at: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    whole, _, _ = train(make_generator(), pictures, Store(tmp_path / "whole"))
    loss, calls = module.denoising_loss, []

    def crashing(*arguments: Any, **named: Any) -> Tensor:
        if len(calls) == crash_at:
            raise KeyboardInterrupt
        calls.append(1)
        return loss(*arguments, **named)

    generator = make_generator()
    monkeypatch.setattr(module, "denoising_loss", crashing)
    with pytest.raises(KeyboardInterrupt):
        train(generator, pictures, Store(tmp_path / "cut"))
    assert _fingerprint(generator.pipeline) == generator.fingerprint  # no adapter stays behind
    monkeypatch.setattr(module, "denoising_loss", loss)
    capsys.readouterr()
    folder, _, cached = train(generator, pictures, Store(tmp_path / "cut"))
    assert not cached
    said = capsys.readouterr().out
    assert f"goes on from step {crash_at // 2 * 2}" in said if crash_at >= 2 else said == ""
    for name in (WEIGHTS, "losses.safetensors"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    assert not (folder / "checkpoint.safetensors").exists()


def test_a_damaged_checkpoint_costs_the_steps_before_it_and_no_more(pictures: list[str], tmp_path: Path, monkeypatch):
    whole, _, _ = train(make_generator(), pictures, Store(tmp_path / "whole"))
    saved = module._save_checkpoint
    monkeypatch.setattr(module, "_save_checkpoint", lambda *arguments: saved(*arguments) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(make_generator(), pictures, Store(tmp_path / "cut"))
    monkeypatch.undo()
    (checkpoint,) = (tmp_path / "cut").rglob("checkpoint.safetensors")
    checkpoint.write_bytes(checkpoint.read_bytes()[:-10])
    folder, _, _ = train(make_generator(), pictures, Store(tmp_path / "cut"))
    assert (folder / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()


def test_second_time_comes_from_the_store(
    tiny_generator: Generator, pictures: list[str], store: Store, monkeypatch: pytest.MonkeyPatch
):
    folder, key, cached = train(tiny_generator, pictures, store)
    assert not cached
    monkeypatch.setattr(module, "_train", lambda *_, **__: pytest.fail("trained again"))
    assert train(tiny_generator, pictures, store) == (folder, key, True)
    assert train(tiny_generator, pictures, store, checkpoint=5, per_class=9) == (folder, key, True)


@pytest.mark.parametrize(
    "change", [{"rank": 3}, {"steps": 6}, {"lr": 0.1}, {"batch": 2}, {"seed": 1}, {"targets": ("to_q",)}]
)
def test_whatever_decides_the_adapter_is_in_its_key(
    tiny_generator: Generator, pictures: list[str], store: Store, change: dict, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "_train", lambda *_, **__: None)
    _, key, _ = train(tiny_generator, pictures, store)
    assert train(tiny_generator, pictures, store, **change)[1] != key
    assert train(tiny_generator, pictures[::-1], store)[1] != key


def test_global_randomness_is_neither_used_nor_changed(pictures: list[str], tmp_path: Path):
    folders = []
    for number in range(2):
        torch.manual_seed(number)
        state = torch.random.get_rng_state()
        folders.append(train(make_generator(), pictures, Store(tmp_path / str(number)))[0])
        assert torch.equal(torch.random.get_rng_state(), state)
    assert (folders[0] / WEIGHTS).read_bytes() == (folders[1] / WEIGHTS).read_bytes()


def test_other_seeds_give_other_adapters(tiny_generator: Generator, pictures: list[str], store: Store):
    one, two = (train(tiny_generator, pictures, store, seed=seed)[0] for seed in (0, 1))
    assert (one / WEIGHTS).read_bytes() != (two / WEIGHTS).read_bytes()


def test_a_loss_that_is_not_finite_is_an_error_for_people(
    tiny_generator: Generator, pictures: list[str], store: Store
):
    with pytest.raises(UserError, match=r"AIR\.LORA\.LR"):
        train(tiny_generator, pictures, store, lr=1e30)
    assert _fingerprint(tiny_generator.pipeline) == tiny_generator.fingerprint


@pytest.mark.parametrize("targets", [("to_nothing",), ("to_q", "to_nothing")])
def test_targets_that_are_not_there_are_an_error_for_people(
    tiny_generator: Generator, pictures: list[str], store: Store, targets: tuple[str, ...]
):
    with pytest.raises(UserError, match=r"AIR\.LORA\.TARGETS.*to_nothing"):
        train(tiny_generator, pictures, store, targets=targets)


def test_an_unreadable_picture_is_named(tiny_generator: Generator, pictures: list[str], store: Store):
    Path(pictures[3]).write_text("no image")
    with pytest.raises(UserError, match=r"003\.png"):
        train(tiny_generator, pictures, store)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_trains_an_adapter_in_fp32(pictures: list[str], store: Store, dtype: torch.dtype):
    generator = make_generator()
    generator.pipeline.to(dtype)
    folder, _, _ = train(generator, pictures, store, steps=2)
    saved = load_file(folder / WEIGHTS)
    assert all(value.isfinite().all() and value.dtype == torch.float32 for value in saved.values())
    assert generator.pipeline.unet.dtype == dtype


def test_v_prediction_trains(pictures: list[str], store: Store):
    folder, _, _ = train(make_generator(prediction="v_prediction"), pictures, store)
    assert load_file(folder / "losses.safetensors")["loss"].isfinite().all()
