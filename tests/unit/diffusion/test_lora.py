"""The adapter: its loss, and a training that interruptions do not change."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_generators import make_pipeline, save_lcm_lora, save_pipeline
from small_models import make_generator
from torch import Tensor

from air_plugin.config import LoraSettings
from air_plugin.diffusion import lora as module
from air_plugin.diffusion import lora_step
from air_plugin.diffusion.lora import WEIGHTS, adapter_loaded, train_lora
from air_plugin.diffusion.lora_step import denoising_loss, sample_latents
from air_plugin.diffusion.pipeline import Generator, _fingerprint, encode_prompts, load_generator
from air_plugin.utils.errors import UserError
from air_plugin.utils.images import load_rgb
from air_plugin.utils.store import Store

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # the default of AIR.LORA.TARGETS
ALL_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
CAPTIONS = ["a dog", "a cat", "a dog", "a sea", "a cat", "a dog", "a sea"]


def lora_settings(**changes: Any) -> LoraSettings:
    settings: dict[str, Any] = {
        "enabled": True,
        "rank": 2,
        "targets": ALL_TARGETS,
        "steps": 5,
        "lr": 0.05,
        "batch": 3,
        "captions": "confident",
        "per_class": 2,
        "generic": "a photo.",
        "checkpoint": 2,
    }
    return LoraSettings(**{**settings, **changes})


def train(generator: Generator, pictures: list[str], store: Store, *, seed: int = 0, **changes: Any):
    settings = lora_settings(**changes)
    return train_lora(generator, pictures, CAPTIONS, settings=settings, size=16, seed=seed, store=store)


def make_images(pipeline: Any) -> Tensor:
    return pipeline(
        prompt=["a dog", "a sea"],
        height=16,
        width=16,
        num_inference_steps=2,
        guidance_scale=3.0,
        output_type="pt",
        generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
    ).images


# denoising_loss


class FixedUnet:
    """Predicts what it is told to and notes what it is shown."""

    dtype = torch.float32

    def __init__(self, prediction: Tensor) -> None:
        self.prediction = prediction

    def __call__(
        self, noisy: Tensor, steps: Tensor, *, encoder_hidden_states: Tensor, added_cond_kwargs: dict | None
    ) -> SimpleNamespace:
        self.noisy, self.steps, self.states, self.added = noisy, steps, encoder_hidden_states, added_cond_kwargs
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
        for x, eps, predicted, shown in zip(
            *(t[image].flatten().tolist() for t in (latents, noise, prediction, unet.noisy)), strict=True
        ):
            assert shown == pytest.approx(math.sqrt(kept) * x + math.sqrt(1 - kept) * eps, abs=1e-5)
            target = eps if kind == "epsilon" else math.sqrt(kept) * eps - math.sqrt(1 - kept) * x
            total += (predicted - target) ** 2
    assert loss.item() == pytest.approx(total / 24, rel=1e-4)
    assert torch.equal(unet.steps, steps) and torch.equal(unet.states, states) and unet.added is None


def test_what_sdxl_is_told_besides_reaches_the_unet_in_its_type():
    from diffusers import DDPMScheduler

    unet, zero = FixedUnet(torch.zeros(2, 1, 1, 1)), torch.zeros(2, 1, 1, 1)
    unet.dtype = torch.bfloat16
    added = {"text_embeds": torch.randn(2, 3), "time_ids": torch.tensor([[1024, 1000, 0, 3, 1024, 1001]] * 2)}
    denoising_loss(
        unet, DDPMScheduler(), zero, states=zero[:, :, 0], noise=zero, steps=torch.tensor([1, 2]), added=added
    )
    assert torch.equal(unet.added["text_embeds"], added["text_embeds"].bfloat16())
    assert unet.added["time_ids"].tolist() == added["time_ids"].tolist()  # bf16 would make 1000 of 1001


def test_other_predictions_are_refused():
    from diffusers import DDPMScheduler

    zero = torch.zeros(1, 1, 1, 1)
    with pytest.raises(UserError, match="sample"):
        denoising_loss(
            FixedUnet(zero),
            DDPMScheduler(prediction_type="sample"),
            zero,
            states=zero[0],
            noise=zero,
            steps=torch.tensor([1]),
        )


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
    generated = sample_latents(torch.cat([mean, log_variance], dim=1), 0.18, torch.Generator().manual_seed(5))
    assert torch.allclose(generated, 0.18 * (mean + log_variance.exp().sqrt() * noise), atol=1e-6)


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
    words = {caption: encode_prompts(pipeline, [caption]).states[0] for caption in CAPTIONS}

    def looking(unet: Any, scheduler: Any, latents: Tensor, *, states: Tensor, **others: Any) -> Tensor:
        for latent, state in zip(latents, states, strict=True):
            number = min(range(7), key=lambda i: (latent - means[i]).abs().sum())
            seen.append(number)
            assert (latent - means[number]).abs().mean() < 0.05  # edges differ: ours is cropped before it is resized
            assert torch.allclose(state, words[CAPTIONS[number]], atol=1e-5)
        return denoising_loss(unet, scheduler, latents, states=states, **others)

    monkeypatch.setattr(lora_step, "denoising_loss", looking)
    monkeypatch.setattr(lora_step, "sample_latents", lambda moments, scaling, rng: moments.chunk(2, dim=1)[0] * scaling)
    train(tiny_generator, pictures, store, steps=10)
    assert set(seen) == set(range(7)) and len(seen) == 30


def test_the_generator_is_afterwards_what_it_was(tiny_generator: Generator, pictures: list[str], store: Store):
    names = [name for name, _ in tiny_generator.pipeline.unet.named_modules()]
    before = make_images(tiny_generator.pipeline)
    train(tiny_generator, pictures, store)
    assert _fingerprint(tiny_generator.pipeline) == tiny_generator.fingerprint
    assert [name for name, _ in tiny_generator.pipeline.unet.named_modules()] == names
    assert torch.equal(make_images(tiny_generator.pipeline), before)
    assert not any(value.requires_grad for value in tiny_generator.pipeline.unet.parameters())


def test_the_adapter_loads_in_plain_diffusers_and_changes_the_images(pictures: list[str], store: Store):
    folder, _, _ = train(make_generator(), pictures, store)
    assert (folder / WEIGHTS).name == "pytorch_lora_weights.safetensors"
    fresh = make_generator().pipeline
    plain = make_images(fresh)
    fresh.load_lora_weights(folder)
    adapted = make_images(fresh)
    assert (adapted - plain).abs().max() > 0.01
    ours = make_generator().pipeline
    with adapter_loaded(ours, folder):
        assert torch.allclose(make_images(ours), adapted, atol=1e-6)
    assert torch.equal(make_images(ours), plain)
    with adapter_loaded(ours, None):
        assert torch.equal(make_images(ours), plain)


def test_every_target_is_in_the_file_and_is_loaded(pictures: list[str], store: Store):
    """diffusers passes over names that it does not know without an error, so each layer is looked at."""
    folder, _, _ = train(make_generator(), pictures, store)
    saved = load_file(folder / WEIGHTS)
    pipeline = make_generator().pipeline
    layers = [
        name
        for name, layer in pipeline.unet.named_modules()
        if any(name.endswith(f".{target}") for target in ALL_TARGETS) and ".attentions." in name
    ]
    assert len(saved) == 2 * len(layers) and len(layers) >= 2 * len(ALL_TARGETS)
    assert all(value.dtype == torch.float32 for value in saved.values())
    pipeline.load_lora_weights(folder)
    state = pipeline.unet.state_dict()
    for layer in layers:
        (up,) = [value for name, value in state.items() if name.startswith(f"{layer}.lora_B")]
        assert up.abs().max() > 0, layer  # begins as zero, so this came from the file
        assert any(value.shape == up.shape and torch.equal(value, up) for value in saved.values())


def test_an_adapter_trained_and_used_on_one_pipeline(tiny_generator: Generator, pictures: list[str], store: Store):
    folder, _, _ = train(tiny_generator, pictures, store)
    fresh = make_generator().pipeline
    with adapter_loaded(fresh, folder), adapter_loaded(tiny_generator.pipeline, folder):
        assert torch.equal(make_images(tiny_generator.pipeline), make_images(fresh))


@pytest.mark.parametrize("crash_at", [1, 2, 3, 4])
def test_a_resumed_training_equals_an_undisturbed_one(
    pictures: list[str],
    tmp_path: Path,
    crash_at: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    caplog.set_level(logging.INFO, logger="air_plugin")
    whole, _, _ = train(make_generator(), pictures, Store(tmp_path / "whole"))
    loss, calls = lora_step.denoising_loss, []

    def crashing(*arguments: Any, **named: Any) -> Tensor:
        if len(calls) == crash_at:
            raise KeyboardInterrupt
        calls.append(1)
        return loss(*arguments, **named)

    generator = make_generator()
    monkeypatch.setattr(lora_step, "denoising_loss", crashing)
    with pytest.raises(KeyboardInterrupt):
        train(generator, pictures, Store(tmp_path / "cut"))
    assert _fingerprint(generator.pipeline) == generator.fingerprint  # no adapter stays behind
    monkeypatch.setattr(lora_step, "denoising_loss", loss)
    caplog.clear()
    folder, _, cached = train(generator, pictures, Store(tmp_path / "cut"))
    assert not cached
    notes = caplog.text
    assert f"resumes at step {crash_at // 2 * 2}" in notes if crash_at >= 2 else notes == ""
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


def test_a_loss_that_is_not_finite_is_an_error_for_people(tiny_generator: Generator, pictures: list[str], store: Store):
    with pytest.raises(UserError, match=r"AIR\.LORA\.LR"):
        train(tiny_generator, pictures, store, lr=1e30)
    assert _fingerprint(tiny_generator.pipeline) == tiny_generator.fingerprint


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("nothing",), r"'nothing'; known: .*ff\.net\.2.*to_q"),
        (("to_q", "nothing"), "'nothing'"),
        (("to_q", "to_w"), r"'to_w'; did you mean .*to_[kqv]"),
        (("to_out",), r"'to_out'; did you mean .*to_out\.0"),  # a list of layers, not a layer
        (("norm1",), "'norm1'"),  # there, but nothing that a low-rank adapter fits
    ],
)
def test_targets_that_are_not_there_are_an_error_for_people(
    tiny_generator: Generator, pictures: list[str], store: Store, targets: tuple[str, ...], message: str
):
    with pytest.raises(UserError, match=f"AIR.LORA.TARGETS.*{message}") as raised:
        train(tiny_generator, pictures, store, targets=targets)
    assert "\n" not in str(raised.value)
    assert _fingerprint(tiny_generator.pipeline) == tiny_generator.fingerprint


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


# Every architecture


@pytest.fixture(params=["sd15", "sd21", "sdxl"])  # SD-Turbo is the second one with another scheduler
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


def generator_of(architecture: str) -> Generator:
    pipeline = make_pipeline(architecture)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    return Generator(pipeline, _fingerprint(pipeline))


def test_the_default_targets_are_all_attention_layers_of_every_architecture(
    architecture: str, pictures: list[str], store: Store
):
    generator = generator_of(architecture)
    folder, _, _ = train(generator, pictures, store, steps=1, targets=ATTENTION)
    names = [name for name, _ in generator.pipeline.unet.named_modules() if name.endswith((".to_q", ".to_k"))]
    trained = {name.split(".lora_")[0].removeprefix("unet.") for name in load_file(folder / WEIGHTS)}
    assert len(names) >= 8 and set(names) <= trained and len(trained) == 2 * len(names)


def test_steps_on_one_batch_lower_its_loss_and_change_the_adapter_alone(
    architecture: str, pictures: list[str], store: Store, monkeypatch: pytest.MonkeyPatch
):
    """Every step sees the same images, noise and time steps, so that the loss has nothing to fall by but training."""
    generator = generator_of(architecture)
    monkeypatch.setattr(lora_step, "stable_seed", lambda *_: 5)
    folder, _, _ = train(generator, pictures, store, steps=15, lr=0.02)
    losses = load_file(folder / "losses.safetensors")["loss"]
    assert losses[-1] < 0.97 * losses[0] and losses[-5:].mean() < losses[:5].mean()
    assert _fingerprint(generator.pipeline) == generator.fingerprint
    assert any(value.abs().max() > 0 for name, value in load_file(folder / WEIGHTS).items() if "lora_B" in name)


def test_saved_and_loaded_in_plain_diffusers_it_draws_the_same(architecture: str, pictures: list[str], store: Store):
    generator = generator_of(architecture)
    folder, _, _ = train(generator, pictures, store)
    plain = make_images(generator.pipeline)
    with adapter_loaded(generator.pipeline, folder):
        adapted = make_images(generator.pipeline)
    assert (adapted - plain).abs().max() > 0.01
    assert torch.equal(make_images(generator.pipeline), plain)
    fresh = make_pipeline(architecture)
    fresh.load_lora_weights(folder)
    assert torch.allclose(make_images(fresh), adapted, atol=1e-5)


def test_every_architecture_goes_on_where_it_was_cut(
    architecture: str, pictures: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole, _, _ = train(generator_of(architecture), pictures, Store(tmp_path / "whole"))
    saved = module._save_checkpoint
    monkeypatch.setattr(module, "_save_checkpoint", lambda *arguments: saved(*arguments) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(generator_of(architecture), pictures, Store(tmp_path / "cut"))
    monkeypatch.undo()
    folder, _, _ = train(generator_of(architecture), pictures, Store(tmp_path / "cut"))
    for name in (WEIGHTS, "losses.safetensors"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_of_every_architecture(architecture: str, pictures: list[str], store: Store, dtype: torch.dtype):
    generator = generator_of(architecture)
    generator.pipeline.to(dtype)
    folder, _, _ = train(generator, pictures, store, steps=2)
    assert load_file(folder / "losses.safetensors")["loss"].isfinite().all()
    assert all(value.dtype == torch.float32 for value in load_file(folder / WEIGHTS).values())


def test_every_image_of_sdxl_is_trained_with_its_own_pooled_text_and_the_size(
    pictures: list[str], store: Store, monkeypatch: pytest.MonkeyPatch
):
    generator, seen = generator_of("sdxl"), set()
    texts = {caption: encode_prompts(generator.pipeline, [caption]) for caption in CAPTIONS}

    def looking(unet: Any, scheduler: Any, latents: Tensor, *, states: Tensor, added: dict, **others: Any) -> Tensor:
        for row, state in enumerate(states):
            (caption,) = [name for name, text in texts.items() if torch.allclose(text.states[0], state, atol=1e-5)]
            assert torch.allclose(added["text_embeds"][row], texts[caption].pooled[0], atol=1e-5)
            seen.add(caption)
        assert added["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * len(states)
        return denoising_loss(unet, scheduler, latents, states=states, added=added, **others)

    monkeypatch.setattr(lora_step, "denoising_loss", looking)
    train(generator, pictures, store)
    assert seen == set(CAPTIONS)


def test_an_autoencoder_that_overflows_in_half_precision_encodes_in_fp32(pictures: list[str]):
    pipeline = generator_of("sdxl").pipeline.to(torch.float16)
    rounded = module._encode_images(pipeline, pictures, 16)
    pipeline.vae.register_to_config(force_upcast=True)
    moments = module._encode_images(pipeline, pictures, 16)
    assert pipeline.vae.dtype == torch.float16
    exact = module._encode_images(generator_of("sdxl").pipeline, pictures, 16)
    halved = make_pipeline("sdxl")
    halved.vae.half().float()
    halved = module._encode_images(halved, pictures, 16)
    assert torch.allclose(moments, halved, atol=1e-6)
    assert (rounded - halved).abs().max() > 1e-5 and (moments - exact).abs().max() < 0.01


# Few-step models


def test_an_lcms_adapter_of_the_images_is_trained_without_it(
    pictures: list[str], tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
):
    path = str(save_pipeline("sd15", tmp_path / "sd15"))
    lcm = str(save_lcm_lora(tmp_path / "lcm", make_pipeline("sd15").unet))
    plain, few = load_generator(path), load_generator(path, lcm_lora=lcm, scheduler="lcm")
    assert few.sampling != plain.sampling
    folder, key, _ = train(plain, pictures, store)
    assert train(few, pictures, store) == (folder, key, True)
    again, _, _ = train(few, pictures, Store(tmp_path / "other"))
    assert (again / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


def test_both_adapters_are_added_while_drawing(pictures: list[str], tmp_path: Path, store: Store):
    """The reference adds both products to the weights by hand."""
    generator = generator_of("sd15")
    plain = make_images(generator.pipeline)
    folder, _, _ = train(generator, pictures, store)
    lcm = save_lcm_lora(tmp_path / "lcm", generator.pipeline.unet) / WEIGHTS
    by_hand = make_pipeline("sd15")
    ours, theirs = load_file(folder / WEIGHTS), load_file(lcm)
    for name, layer in by_hand.unet.named_modules():
        key = f"lora_unet_{name.replace('.', '_')}"
        pairs = []
        if f"{key}.alpha" in theirs:
            up, down = theirs[f"{key}.lora_up.weight"], theirs[f"{key}.lora_down.weight"]
            pairs.append((up, down, theirs[f"{key}.alpha"] / len(down)))
        if f"unet.{name}.lora_A.weight" in ours:
            pairs.append((ours[f"unet.{name}.lora_B.weight"], ours[f"unet.{name}.lora_A.weight"], 1.0))
        for up, down, scale in pairs:
            layer.weight.data += (scale * up.flatten(1) @ down.flatten(1)).reshape(layer.weight.shape)
    generated = {}
    for name, target, accelerator in (("both", folder, lcm), ("target", folder, None), ("lcm", None, lcm)):
        with adapter_loaded(generator.pipeline, target, accelerator=accelerator):
            generated[name] = make_images(generator.pipeline)
    assert torch.allclose(generated["both"], make_images(by_hand), atol=1e-4)
    for alone in ("target", "lcm"):
        assert (generated["both"] - generated[alone]).abs().max() > 0.01
    assert _fingerprint(generator.pipeline) == generator.fingerprint
    assert torch.equal(make_images(generator.pipeline), plain)
