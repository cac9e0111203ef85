"""What `auto` means on which machine, and the settings of a fit."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from air_plugin.config import AirSettings, flatten, merge_file, own_config
from air_plugin.estimator import choice
from air_plugin.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
SD = "stable-diffusion-v1-5/stable-diffusion-v1-5"


@pytest.mark.parametrize(
    ("backbone", "generator", "device", "lacks", "expected"),
    [
        ("auto", "auto", "cuda", (), ("ViT-B/32", "auto")),
        ("auto", "auto", "cpu", (), ("mini", "mini")),
        ("auto", "auto", "cuda", ("generator",), ("mini", "mini")),
        ("auto", "auto", "cuda:1", ("backbone",), ("mini", "mini")),
        ("ViT-L/14", "auto", "cuda", (), ("ViT-L/14", "auto")),
        ("ViT-L/14", "auto", "cpu", (), ("ViT-L/14", "mini")),
        ("mini", "auto", "cuda", (), ("mini", "mini")),
        ("auto", "mini", "cuda", (), ("mini", "mini")),
        ("auto", "some/model", "cuda", (), ("ViT-B/32", "some/model")),
        ("ViT-B/16", "some/model", "cpu", (), ("ViT-B/16", "some/model")),
    ],
)
def test_what_auto_means(
    backbone: str,
    generator: str,
    device: str,
    lacks: tuple[str, ...],
    expected: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    for part in ("generator", "backbone"):
        monkeypatch.setattr(choice, f"missing_{part}", lambda part=part: f"no {part} here" if part in lacks else "")
    assert choice.choose(backbone, generator, device) == expected
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    fallen = "auto" in (backbone, generator) and (device == "cpu" or bool(lacks))
    assert len(lines) == fallen
    if fallen:
        why = f"no {lacks[0]} here" if lacks else "there is no GPU"
        assert why in lines[0] and "not for photos" in lines[0] and "\n" not in lines[0]


@pytest.mark.parametrize("part", ["generator", "backbone"])
def test_files_of_the_hub_are_asked_for(part: str, monkeypatch: pytest.MonkeyPatch):
    import huggingface_hub

    asked = []

    def answers(repository: str, file: str, **_: str) -> None:
        asked.append((repository, file))

    def is_silent(*_: str, **__: str) -> None:
        raise LocalEntryNotFoundError("no file")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", answers)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repository, file: None)
    find = getattr(choice, f"missing_{part}")
    assert find() == "" and len(asked) == 1
    assert asked[0] == (SD, "model_index.json") or part == "backbone"
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", is_silent)
    if part == "backbone":
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repository, file: f"/cache/{file}")
        assert find() == ""
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repository, file: None)
    assert re.fullmatch(r"\S+/\S+ is not in the hub's cache, and the hub does not answer", find())


def test_the_settings_are_those_of_the_configs():
    for generator, files in (
        ("mini", ["generators/mini.yaml", "presets/plus.yaml"]),
        ("auto", ["generators/sd15.yaml", "presets/plus.yaml"]),
    ):
        cfg = own_config(3)
        for file in files:
            merge_file(cfg, ROOT / "configs" / file)
        cfg.AIR.GENERATION_PER_SEED = True
        expected = AirSettings.from_cfg(cfg)
        assert AirSettings.from_cfg(choice.settings_of("mini", generator, seed=3)) == expected
        assert (expected.seed, expected.primary, expected.refine, expected.weight) == (3, "fused", "em", None)


def test_the_callers_settings_come_last():
    cfg = choice.settings_of(
        "b", "some/model", seed=1, device="cpu", template="my {}.", options={"AIR.M": 7, "AIR.K": "3"}
    )
    assert (cfg.AIR.M, cfg.AIR.K, cfg.AIR.GENERATOR, cfg.AIR.REVISION) == (7, 3, "some/model", "")
    assert (cfg.AIR.PRECISION, cfg.MODEL.BACKBONE.NAME, AirSettings.from_cfg(cfg).prompt) == ("fp32", "b", "my {}.")
    on_card = choice.settings_of("b", "auto", seed=1, device="cuda")
    assert (on_card.AIR.PRECISION, on_card.AIR.GENERATOR) == ("bf16", SD)
    assert flatten(choice.settings_of("mini", "mini", seed=1))["AIR.THREADS"] == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"AIR.LAMDA": 1}, "did you mean AIR.LAMBDA"),
        ({"AIR.M": 0}, "AIR.M is 0"),
        (["AIR.M", 3], "it must be a mapping"),
    ],
)
def test_other_settings_are_refused(options, said: str):
    with pytest.raises(UserError, match=said):
        choice.settings_of("mini", "mini", seed=1, options=options)


def test_the_cache_is_the_persons(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert choice.user_cache() == tmp_path / "air_plugin"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/somebody")
    assert choice.user_cache() == Path("/somebody/.cache/air_plugin")
