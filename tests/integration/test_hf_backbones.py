"""Whole runs on dual encoders of transformers: trained, bundled, used by `air predict`; and models that are none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hf_folders import write_folder
from runs import arguments

import train
from air_plugin.cli import main
from air_plugin.inference.bundle import load_bundle
from air_plugin.utils.files import to_json

# Short texts: the small towers take few tokens, and their tokenizers know letters more than words.
PROMPT = ["TRAINER.PROMPT.N_CTX", "4", "TRAINER.PROMPT.CTX_INIT", "", "DATASET.TEMPLATE", "digit {}."]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hf")
    for kind in ("clip", "siglip2", "siglip2_naflex", "blip2"):
        write_folder(root / kind, kind)
    return root


@pytest.mark.parametrize("kind", ["clip", "siglip2", "siglip2_naflex", "blip2"])
def test_air_predict_gives_what_the_trainer_gave(
    kind: str,
    folders: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folders)
    options = ["MODEL.BACKBONE.NAME", f"hf:{kind}", "OPTIM.MAX_EPOCH", "1", "AIR.LORA.ENABLED", "False", *PROMPT]
    assert train.main(arguments("AiR", data, tmp_path / "run", *options)) == 0
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)  # a bundle is used from anywhere
    expected = json.loads((tmp_path / "run" / "predictions.json").read_text())
    paths = [str(Path(expected["root"]) / image) for image in expected["images"]]
    for head, found in expected["heads"].items():
        assert main(["predict", "run/bundle", str(data / "digits" / "images"), "--head", head]) == 0
        lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
        given = {path: (label, float(share)) for path, label, share in lines}
        names = [expected["classnames"][number] for number in found["predicted"]]
        assert [given[path][0] for path in paths] == names
        assert [given[path][1] for path in paths] == pytest.approx(found["confidence"], abs=2e-5)
        assert len(set(found["confidence"])) > 100  # it reads the images


@pytest.mark.parametrize(
    "options",
    [
        ["AIR.AUXILIARY", "gaussian", "AIR.REFINE", "em", "AIR.LAMBDA", "auto", "AIR.FILTER_TOP", "5"],
        ["TRAINER.TRANSDUCTION.METHOD", "stata", "TRAINER.TRANSDUCTION.ANCHORS", "text"],
        ["TRAINER.TRANSDUCTION.METHOD", "zlap", "TRAINER.TRANSDUCTION.ANCHORS", "text"],
    ],
    ids=["em", "stata", "zlap"],
)
def test_methods_take_images_of_several_vectors(
    options: list[str], folders: Path, data: Path, cache: str, tmp_path: Path
) -> None:
    options = [*options, "MODEL.BACKBONE.NAME", f"hf:{folders / 'blip2'}", "AIR.LORA.ENABLED", "False"]
    assert train.main(arguments("ZeroshotAiR", data, tmp_path / "run", "AIR.CACHE", cache, *options)) == 0
    bundle = load_bundle(tmp_path / "run" / "bundle")
    assert bundle.auxiliary is not None and bundle.text.shape == (1, 10, 24)
    assert bundle.auxiliary.weight.shape == (10, 5 * 24)


def spoil(folder: Path, kind: str) -> None:
    """Make a folder one that cannot be used."""
    from transformers import BertConfig, Blip2Config, BlipConfig

    configs = {
        "bert": BertConfig(),
        "blip": BlipConfig(),
        "captions": Blip2Config(architectures=["Blip2ForConditionalGeneration"]),
    }
    if kind in configs:
        shutil.rmtree(folder)
        configs[kind].save_pretrained(folder)
    elif kind == "tokens":
        for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
            (folder / name).unlink(missing_ok=True)
    elif kind == "shapes":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(to_json({**config, "projection_dim": 16}))
    elif kind == "damaged":
        (folder / "model.safetensors").write_bytes(b"none")
    elif kind == "empty":
        shutil.rmtree(folder)
        folder.mkdir()
    elif kind == "code":
        (folder / "config.json").write_text(to_json({"model_type": "new", "auto_map": {"AutoConfig": "new.Config"}}))
    else:
        (folder / kind).unlink()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("bert", "is a model of type bert, which is no dual encoder of images and texts; take for instance a CLIP"),
        ("blip", "is a model of type blip, whose features are no plain vectors"),
        ("captions", "a BLIP-2 (Blip2ForConditionalGeneration) without the head that compares images and texts"),
        ("empty", "cannot be loaded: Unrecognized model in"),
        ("model.safetensors", "no file named model.safetensors found"),
        ("damaged", "cannot be loaded: Error while deserializing header"),
        ("shapes", "its files lack weights of its configuration, or have them in other shapes: text_projection.weight"),
        ("tokens", "has a tokenizer that knows no words; its files are missing or damaged"),
        ("preprocessor_config.json", "cannot be loaded: Can't load image processor"),
        ("code", "needs the code of its repository, which is never run here"),
    ],
)
def test_a_folder_that_cannot_be_used_is_one_line(
    kind: str, message: str, folders: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folders / "clip", folder)
    spoil(folder, kind)
    capfd.readouterr()
    assert train.main(arguments("AiR", data, tmp_path / "run", "MODEL.BACKBONE.NAME", f"hf:{folder}")) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: backbone 'hf:{folder}'") and message in line
