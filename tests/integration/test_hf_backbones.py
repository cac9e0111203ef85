"""Whole runs on dual encoders of transformers: trained, bundled, and used by `air predict`."""

from __future__ import annotations

from pathlib import Path

import pytest
from hf_folders import write_folder
from runs import arguments

import train
from air_plugin.cli import main
from air_plugin.inference.bundle import load_bundle


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_air_runs_on_a_folder_of_transformers(
    kind: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write_folder(tmp_path / kind, kind)
    name = f"hf:{tmp_path / kind}"
    options = ["MODEL.BACKBONE.NAME", name, "OPTIM.MAX_EPOCH", "1", "AIR.LORA.ENABLED", "False"]
    options += ["TRAINER.PROMPT.N_CTX", "4", "TRAINER.PROMPT.CTX_INIT", ""]
    assert train.main(arguments("AiR", data, tmp_path / "run", *options)) == 0
    bundle = load_bundle(tmp_path / "run" / "bundle")
    assert bundle.backbone.name == name
    capsys.readouterr()
    picture = next((data / "digits").rglob("*.png"))
    assert main(["predict", str(tmp_path / "run" / "bundle"), str(picture)]) == 0
    assert capsys.readouterr().out.startswith(str(picture))
