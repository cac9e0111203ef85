"""Generators from local folders, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_models import make_generator, make_spelling_tokenizer

from air_plugin.diffusion.pipeline import encode_prompts, load_generator
from air_plugin.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("generators") / "tiny"
    make_generator(prediction="v_prediction").pipeline.save_pretrained(path, safe_serialization=True)
    return path


def test_a_local_folder_loads_frozen_with_its_own_kind_of_prediction(folder: Path):
    generator = load_generator(str(folder))
    pipeline = generator.pipeline
    assert generator.fingerprint == make_generator().fingerprint
    assert type(pipeline.scheduler).__name__ == "DPMSolverMultistepScheduler"
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        assert not part.training and not any(value.requires_grad for value in part.parameters())


def test_other_schedulers_are_replaced_and_their_settings_kept(folder: Path, tmp_path: Path):
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.scheduler = PNDMScheduler.from_config(pipeline.scheduler.config, beta_end=0.02, skip_prk_steps=True)
    pipeline.save_pretrained(tmp_path / "pndm", safe_serialization=True)
    scheduler = load_generator(str(tmp_path / "pndm")).pipeline.scheduler
    assert type(scheduler).__name__ == "DPMSolverMultistepScheduler" and scheduler.config.beta_end == 0.02


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision(folder: Path, precision: str):
    generator = load_generator(str(folder), precision=precision)
    assert generator.pipeline.unet.dtype == {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    assert generator.fingerprint != make_generator().fingerprint


def test_prompts_become_the_states_of_the_text_encoder(folder: Path):
    pipeline = load_generator(str(folder)).pipeline
    states = encode_prompts(pipeline, ["a dog", "sea"])
    tokens = make_spelling_tokenizer()(["a dog", "sea"], padding="max_length", max_length=32, return_tensors="pt")
    assert states.shape == (2, 32, 16)
    assert torch.allclose(states, pipeline.text_encoder(tokens.input_ids)[0], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "precision", "said"),
    [("mni", "fp32", "mini, a hub name"), ("mini", "fp15", "fp15"), ("{empty}", "fp32", "cannot be loaded")],
)
def test_what_is_no_generator_is_an_error_for_people(name: str, precision: str, said: str, tmp_path: Path):
    with pytest.raises(UserError, match=said) as raised:
        load_generator(name.format(empty=tmp_path), precision=precision)
    assert "\n" not in str(raised.value)


def test_pickles_are_refused(folder: Path, tmp_path: Path):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.save_pretrained(tmp_path / "pickled", safe_serialization=True)
    unet = tmp_path / "pickled" / "unet"
    torch.save(pipeline.unet.state_dict(), unet / "diffusion_pytorch_model.bin")
    (unet / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        load_generator(str(tmp_path / "pickled"))


def test_models_that_want_more_than_a_prompt_are_refused(folder: Path, tmp_path: Path):
    """As SDXL does."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.unet = UNet2DConditionModel.from_config(
        pipeline.unet.config, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
    )  # fmt: skip
    pipeline.save_pretrained(tmp_path / "other", safe_serialization=True)
    with pytest.raises(UserError, match="Stable Diffusion 1/2"):
        load_generator(str(tmp_path / "other"))
