"""Generators of every kind from local folders, and what is refused."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from small_generators import ARCHITECTURES, make_pipeline, save_lcm_lora, save_pipeline
from small_models import make_generator, make_spelling_tokenizer

from air_plugin.diffusion import pipeline as module
from air_plugin.diffusion.pipeline import _fingerprint, encode_prompts, load_generator, require_size
from air_plugin.utils.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("generators") / "tiny"
    make_generator(prediction="v_prediction").pipeline.save_pretrained(path, safe_serialization=True)
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("architectures")
    made = {name: save_pipeline(name, root / name) for name in ARCHITECTURES}
    return {**made, "checked": save_pipeline("sd15", root / "checked", safety_checker=True)}


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def message_of(**arguments: Any) -> str:
    """The line that people see where a generator is refused."""
    name = arguments.pop("name")
    with pytest.raises(UserError) as raised:
        load_generator(str(name), **arguments)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# What is loaded


@pytest.mark.parametrize(
    ("architecture", "kind", "prediction"),
    [
        ("sd15", "StableDiffusionPipeline", "epsilon"),
        ("sd21", "StableDiffusionPipeline", "v_prediction"),
        ("sdxl", "StableDiffusionXLPipeline", "epsilon"),
        ("sd_turbo", "StableDiffusionPipeline", "epsilon"),
    ],
)
def test_every_architecture_loads_frozen_with_its_own_kind_of_prediction(
    folders: dict[str, Path], architecture: str, kind: str, prediction: str, no_network: None
):
    generator = load_generator(str(folders[architecture]))
    pipeline = generator.pipeline
    assert type(pipeline).__name__ == kind
    assert generator.fingerprint == _fingerprint(make_pipeline(architecture))
    assert type(pipeline.scheduler).__name__ == "DPMSolverMultistepScheduler"
    assert pipeline.scheduler.config.prediction_type == prediction
    modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    assert len(modules) == (4 if architecture == "sdxl" else 3)
    for part in modules:
        assert not part.training and not any(value.requires_grad for value in part.parameters())


def test_other_schedulers_are_replaced_and_their_settings_kept(folder: Path, tmp_path: Path):
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.scheduler = PNDMScheduler.from_config(pipeline.scheduler.config, beta_end=0.02, skip_prk_steps=True)
    pipeline.save_pretrained(tmp_path / "pndm", safe_serialization=True)
    scheduler = load_generator(str(tmp_path / "pndm")).pipeline.scheduler
    assert type(scheduler).__name__ == "DPMSolverMultistepScheduler" and scheduler.config.beta_end == 0.02


@pytest.mark.parametrize(
    ("scheduler", "kind", "spacing"),
    [
        ("dpm", "DPMSolverMultistepScheduler", "trailing"),
        ("ddim", "DDIMScheduler", "trailing"),
        ("euler", "EulerDiscreteScheduler", "trailing"),
        ("lcm", "LCMScheduler", "trailing"),
        ("own", "EulerDiscreteScheduler", "trailing"),
    ],
)
def test_the_scheduler_is_chosen_and_keeps_the_spacing_of_the_steps(
    folders: dict[str, Path], scheduler: Any, kind: str, spacing: str
):
    made = load_generator(str(folders["sd_turbo"]), scheduler=scheduler).pipeline.scheduler
    assert type(made).__name__ == kind and made.config.timestep_spacing == spacing
    made.set_timesteps(1)
    assert made.timesteps.tolist() == [999]  # one step begins at pure noise


def test_the_same_weights_train_alike_and_draw_differently_under_other_schedulers(folders: dict[str, Path]):
    dpm, lcm = (load_generator(str(folders["sd15"]), scheduler=name) for name in ("dpm", "lcm"))
    assert dpm.fingerprint == lcm.fingerprint and dpm.training == lcm.training and dpm.sampling != lcm.sampling
    turbo, second = (load_generator(str(folders[name])) for name in ("sd_turbo", "sd21"))
    assert turbo.fingerprint == second.fingerprint and turbo.training != second.training
    json.dumps([dpm.training, dpm.sampling])


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision(folder: Path, precision: str):
    generator = load_generator(str(folder), precision=precision)
    assert generator.pipeline.unet.dtype == {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    assert generator.fingerprint != make_generator().fingerprint


def test_a_variant_of_the_weight_files(tmp_path: Path):
    make_pipeline("sdxl").save_pretrained(tmp_path, safe_serialization=True, variant="fp16")
    assert (tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    assert load_generator(str(tmp_path), variant="fp16").fingerprint == _fingerprint(make_pipeline("sdxl"))
    assert "cannot be loaded" in message_of(name=tmp_path)


def test_both_towers_are_in_the_fingerprint():
    pipeline = make_pipeline("sdxl")
    before = _fingerprint(pipeline)
    next(pipeline.text_encoder_2.parameters()).data += 1
    assert _fingerprint(pipeline) != before


def test_a_hub_name_is_loaded_at_the_pinned_revision(monkeypatch: pytest.MonkeyPatch):
    import diffusers

    seen = []

    def load_config(name: str, **options: Any) -> dict:
        seen.append(options)
        return {"_class_name": "StableDiffusionPipeline"}

    def from_pretrained(name: str, **options: Any) -> Any:
        seen.append(options)
        assert options["use_safetensors"] is True and "trust_remote_code" not in options
        return make_pipeline("sd15")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "load_config", load_config)
    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "from_pretrained", from_pretrained)
    for key in ("AIR_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(key, raising=False)
    load_generator("owner/model", revision="abc")
    load_generator("owner/model")
    assert [options["revision"] for options in seen] == ["abc", "abc", None, None]
    assert not any(options["local_files_only"] for options in seen)


# The inputs of the U-Net


def test_prompts_become_the_states_of_the_text_encoder(folder: Path):
    pipeline = load_generator(str(folder)).pipeline
    texts = encode_prompts(pipeline, ["a dog", "sea"])
    tokens = make_spelling_tokenizer()(["a dog", "sea"], padding="max_length", max_length=32, return_tensors="pt")
    assert texts.states.shape == (2, 32, 16) and texts.pooled is None and texts.added(16) is None
    assert torch.allclose(texts.states, pipeline.text_encoder(tokens.input_ids)[0], atol=1e-5)


@torch.no_grad()
def test_sdxl_hears_both_towers_the_pooled_text_and_the_size(folders: dict[str, Path]):
    pipeline = load_generator(str(folders["sdxl"])).pipeline
    texts = encode_prompts(pipeline, ["a dog", "sea"])
    tokens = make_spelling_tokenizer()(["a dog", "sea"], padding="max_length", max_length=32, return_tensors="pt")
    first = pipeline.text_encoder(tokens.input_ids, output_hidden_states=True)
    second = pipeline.text_encoder_2(tokens.input_ids, output_hidden_states=True)
    expected = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=2)
    assert torch.allclose(texts.states, expected, atol=1e-5)
    assert texts.pooled is not None and torch.allclose(texts.pooled, second.text_embeds, atol=1e-5)
    assert (texts.pooled[0] - texts.pooled[1]).abs().max() > 0.01
    one = texts[torch.tensor([1, 1, 0])]
    assert one.pooled is not None and torch.equal(one.pooled, texts.pooled[[1, 1, 0]])
    added = one.added(24)
    assert added is not None and added["time_ids"].tolist() == [[24, 24, 0, 0, 24, 24]] * 3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_tells_the_unet_what_drawing_tells_it(
    folders: dict[str, Path], architecture: str, monkeypatch: pytest.MonkeyPatch
):
    """The pipeline's own call is the reference."""
    pipeline, seen = load_generator(str(folders[architecture])).pipeline, []
    forward = pipeline.unet.forward
    monkeypatch.setattr(pipeline.unet, "forward", lambda *a, **named: seen.append(named) or forward(*a, **named))
    pipeline(prompt=["a dog", "sea"], height=24, width=24, num_inference_steps=1, guidance_scale=1.0)
    texts = encode_prompts(pipeline, ["a dog", "sea"])
    assert torch.equal(seen[0]["encoder_hidden_states"], texts.states)
    generated, added = seen[0].get("added_cond_kwargs"), texts.added(24)
    if architecture != "sdxl":
        assert added is None and generated is None
    else:
        assert added is not None and torch.equal(generated["text_embeds"], added["text_embeds"])
        assert torch.equal(generated["time_ids"].float(), added["time_ids"].float())


@pytest.mark.parametrize(("size", "good"), [(16, True), (2, True), (18, True), (17, False), (1, False)])
def test_the_size_is_a_multiple_of_the_autoencoders_factor(size: int, good: bool):
    pipeline = make_pipeline("sd15")
    assert pipeline.vae_scale_factor == 2
    if good:
        require_size(pipeline, size)
    else:
        with pytest.raises(UserError, match=rf"AIR\.SIZE is {size}; .* multiple of 2, for instance \d*[02468]$"):
            require_size(pipeline, size)


# The safety checker


def test_the_safety_checker_is_left_out_unless_it_is_asked_for(folders: dict[str, Path]):
    plain = load_generator(str(folders["checked"]))
    checked = load_generator(str(folders["checked"]), safety_checker=True)
    assert plain.pipeline.safety_checker is None
    assert type(checked.pipeline.safety_checker).__name__ == "StableDiffusionSafetyChecker"
    assert not any(value.requires_grad for value in checked.pipeline.safety_checker.parameters())
    assert plain.fingerprint == checked.fingerprint and plain.sampling != checked.sampling


@pytest.mark.parametrize("name", ["sd15", "sdxl", "mini"])
def test_a_safety_checker_that_is_not_there_is_said(folders: dict[str, Path], name: str):
    assert "AIR.SAFETY_CHECKER" in message_of(name=folders.get(name, name), safety_checker=True)


# Few-step adapters


@pytest.mark.parametrize("architecture", ["sd15", "sdxl"])
@pytest.mark.parametrize("as_file", [False, True])
def test_an_lcm_adapter_is_checked_and_not_left_in_the_model(
    folders: dict[str, Path], tmp_path: Path, architecture: str, as_file: bool
):
    adapter = save_lcm_lora(tmp_path, make_pipeline(architecture).unet)
    file = adapter / "pytorch_lora_weights.safetensors"
    generator = load_generator(str(folders[architecture]), lcm_lora=str(file if as_file else adapter), scheduler="lcm")
    assert generator.accelerator == file
    assert generator.fingerprint == _fingerprint(make_pipeline(architecture))
    names = [name for name, _ in generator.pipeline.unet.named_modules()]
    assert names == [name for name, _ in make_pipeline(architecture).unet.named_modules()]
    before = generator.sampling
    save_lcm_lora(tmp_path, make_pipeline(architecture).unet, strength=0.1)
    assert generator.sampling != before  # the file's content decides, not its name


def test_an_lcm_adapter_of_another_architecture_is_refused(folders: dict[str, Path], tmp_path: Path):
    for made, used in (("sdxl", "sd15"), ("sd15", "sdxl"), ("sd15", "sd21")):
        adapter = save_lcm_lora(tmp_path / made, make_pipeline(made).unet)
        assert "is no adapter of this generator" in message_of(name=folders[used], lcm_lora=str(adapter))


def test_what_is_no_lcm_adapter_is_refused(folders: dict[str, Path], tmp_path: Path):
    from safetensors.torch import save_file

    foreign = tmp_path / "foreign.safetensors"
    save_file({f"unet.nowhere.lora_{side}.weight": torch.zeros(2, 2) for side in "AB"}, foreign)
    towers = tmp_path / "towers.safetensors"
    save_file({"lora_te_text_model.lora_down.weight": torch.zeros(2, 2)}, towers)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(foreign.read_bytes()[:20])
    pickled = tmp_path / "pickled.bin"
    torch.save({}, pickled)
    empty = tmp_path / "empty"
    empty.mkdir()
    for path, message in (
        (foreign, "is no adapter"),
        (towers, "more than the U-Net"),
        (cut, "is no adapter"),
        (pickled, "safetensors"),
        (empty, "safetensors"),
        (tmp_path / "none.safetensors", "safetensors"),
    ):
        line = message_of(name=folders["sd15"], lcm_lora=str(path))
        assert line.startswith("AIR.LCM_LORA") and message in line and str(path) in line


# What is refused


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mni", {}, "mini, a hub name"),
        ("mini", {"precision": "fp15"}, "fp15"),
        ("mini", {"scheduler": "dmp"}, "did you mean dpm"),
        ("{empty}", {}, "cannot be loaded"),
    ],
)
def test_what_is_no_generator_is_an_error_for_people(name: str, options: dict, message: str, tmp_path: Path):
    assert message in message_of(name=name.format(empty=tmp_path), **options)


@pytest.mark.parametrize("architecture", ["sd15", "sdxl"])
@pytest.mark.parametrize(
    "damage", ["no index", "no json", "a list", "unet missing", "unet cut short", "tower missing", "other shape"]
)
def test_a_damaged_folder_is_named(folders: dict[str, Path], tmp_path: Path, architecture: str, damage: str):
    copy = tmp_path / "copy"
    shutil.copytree(folders[architecture], copy)
    index, unet = copy / "model_index.json", copy / "unet" / "diffusion_pytorch_model.safetensors"
    if damage == "no index":
        index.unlink()
    elif damage == "no json":
        index.write_text("{")
    elif damage == "a list":
        index.write_text("[]")
    elif damage == "unet missing":
        unet.unlink()
    elif damage == "unet cut short":
        unet.write_bytes(unet.read_bytes()[:-100])
    elif damage == "tower missing":
        shutil.rmtree(copy / "text_encoder")
    else:
        config = copy / "unet" / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "in_channels": 9}))
    assert str(copy) in message_of(name=copy)


def test_pickles_are_refused(folder: Path, tmp_path: Path):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.save_pretrained(tmp_path / "pickled", safe_serialization=True)
    unet = tmp_path / "pickled" / "unet"
    torch.save(pipeline.unet.state_dict(), unet / "diffusion_pytorch_model.bin")
    (unet / "diffusion_pytorch_model.safetensors").unlink()
    assert "cannot be loaded" in message_of(name=tmp_path / "pickled")


@pytest.mark.parametrize("kind", ["KolorsPipeline", "StableDiffusionInpaintPipeline", ["pipeline", "Own"], None])
def test_other_kinds_of_pipeline_are_refused(folder: Path, tmp_path: Path, kind: Any):
    index = json.loads((folder / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "_class_name": kind}))
    line = message_of(name=tmp_path)
    assert "StableDiffusionXLPipeline" in line and (kind is None or str(kind) in line)


def test_code_that_comes_with_a_model_is_not_run(folder: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "unet" / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass UNet2DConditionModel: pass\n")
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, "unet": ["own", "UNet2DConditionModel"]}))
    line = message_of(name=copy)
    assert "unet" in line and "not run" in line and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("key", ["AIR_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_says_what_to_fetch_and_never_touches_the_network(
    key: str, no_network: None, monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path], tmp_path: Path
):
    for name in ("AIR_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(key, "1")
    line = message_of(name="nobody/has-this-generator", revision="abc")
    assert "hf download nobody/has-this-generator --revision abc" in line
    assert "AIR.LCM_LORA" in message_of(name=folders["sd15"], lcm_lora="nobody/has-this-adapter")
    assert load_generator(str(folders["sd15"])).fingerprint


def test_the_known_schedulers_are_those_of_the_config():
    import diffusers

    from air_plugin.config import Sampler

    assert set(Sampler.__args__) == {*module.SCHEDULERS, "own"}
    assert all(hasattr(diffusers, name) for name in module.SCHEDULERS.values())
