"""From a run to what somebody does with it: predictions, ONNX, and the stages by themselves, with no Dassl at all."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from runs import ROOT
from shared import copy_to_change

from air_plugin.auxiliary.classifier import AuxiliaryClassifier
from air_plugin.cli import main
from air_plugin.inference.bundle import load_bundle

RUNS = {
    "AiR": ("AiR", ["AIR.LORA.ENABLED", "False", "OPTIM.MAX_EPOCH", "1", "TRAINER.PROMPT.ENSEMBLE", "2"]),
    "zero-shot": ("ZeroshotCLIP", []),
    "refined": ("ZeroshotCLIP", ["TRAINER.TRANSDUCTION.METHOD", "transclip"]),
}


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def without_dassl(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on an import of Dassl fails, also where it was imported before."""
    for name in [name for name in sys.modules if name.split(".")[0] == "dassl"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "dassl", None)


@pytest.fixture
def air(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """`air` where Dassl cannot be imported."""
    without_dassl(monkeypatch)

    def run(*words: str) -> Done:
        capsys.readouterr()
        code = main([*words])
        return Done(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def runs(finished: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with short runs on the digits, by their names in RUNS."""
    folder = tmp_path_factory.mktemp("runs")
    for name, (trainer, options) in RUNS.items():
        (folder / name).symlink_to(finished(trainer, *options))
    return folder


@pytest.fixture(scope="module")
def photos(runs: Path) -> Path:
    """1,000 images without any list: the 797 test digits and others, in folders, one of which is cut off."""
    said = predictions(runs, "AiR")
    tested = {Path(said["root"]) / image for image in said["images"]}
    files = sorted(Path(said["root"]).rglob("*.png"))
    others = [path for path in files if path not in tested][: 1000 - len(tested)]
    for number, path in enumerate([*sorted(tested), *others]):
        target = runs / "photos" / f"{number % 3} \u00fc" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if path == others[7]:
            target.write_bytes(path.read_bytes()[:-30])
            (runs / "cut.txt").write_text(str(target))
        else:
            os.link(path, target)
    return runs / "photos"


def predictions(runs: Path, name: str) -> dict[str, Any]:
    return json.loads((runs / name / "predictions.json").read_text())


def assert_equal(found: dict[str, tuple[str, float]], said: dict[str, Any], head: str) -> None:
    """Labels and probabilities by file name against a run's predictions.json."""
    for image, index, confidence in zip(
        said["images"], said["heads"][head]["predicted"], said["heads"][head]["confidence"], strict=True
    ):
        label, probability = found[Path(image).name]
        assert label == said["classnames"][index], image
        assert probability == pytest.approx(confidence, abs=1e-5), image


def assert_classified(done: Done, runs: Path, name: str, head: str) -> None:
    """What `air predict` prints of all photos is what the trainer predicted."""
    assert done.returncode == 0, done.stderr
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert len(rows) == 999 and {len(row) for row in rows} == {3}
    assert done.stderr.count("\n") == 1 and (runs / "cut.txt").read_text() in done.stderr
    found = {Path(path).name: (label, float(probability)) for path, label, probability in rows}
    assert len(found) == 999
    assert_equal(found, predictions(runs, name), head)


@pytest.mark.parametrize(("name", "head"), [("AiR", "fused"), ("zero-shot", "")])
def test_a_folder_is_classified_as_the_trainer_did(
    air: Callable[..., Done], runs: Path, photos: Path, name: str, head: str
):
    done = air("predict", str(runs / name / "bundle"), str(photos), *(["--head", head] if head else []))
    assert_classified(done, runs, name, head or "text")


@pytest.mark.full
def test_a_process_of_its_own_does_the_same(runs: Path, photos: Path):
    code = "import sys; sys.modules['dassl'] = None; from air_plugin.cli import main; sys.exit(main(sys.argv[1:]))"
    line = [sys.executable, "-c", code, "predict", str(runs / "AiR" / "bundle"), str(photos)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert_classified(Done(done.returncode, done.stdout, done.stderr), runs, "AiR", "text")


def test_the_block_itself_works(monkeypatch: pytest.MonkeyPatch):
    without_dassl(monkeypatch)
    with pytest.raises(ImportError):
        import dassl.engine  # noqa: F401


def test_python_needs_three_lines(runs: Path):
    said = predictions(runs, "AiR")
    bundle = load_bundle(runs / "AiR" / "bundle")
    found = {
        one.path.name: (one.label, one.probability)
        for one in bundle.predict([Path(said["root"]) / image for image in said["images"]])
    }
    assert_equal(found, said, bundle.primary)
    assert bundle.skipped == {}


def test_a_bundle_says_what_it_is_of(runs: Path):
    said = json.loads((runs / "AiR" / "bundle" / "bundle.json").read_text())
    assert said["classes"] == predictions(runs, "AiR")["classnames"] and said["primary"] == "text"
    assert said["card"]["trainer"] == "AiR" and said["card"]["transduction"] == "none"
    card = said["auxiliary"]["card"]
    assert (card["generator"], card["lora"], card["seed"]) == ("mini", None, 1)
    assert card["backbone_fingerprint"] == said["backbone"]["fingerprint"]
    assert load_bundle(runs / "AiR" / "bundle").text.shape == (2, 10, 128)  # the ensemble's members


def test_a_refined_run_leaves_the_heads_before_that(air: Callable[..., Done], runs: Path, photos: Path):
    some = next(photos.rglob("*.png"))
    done = air("predict", str(runs / "refined" / "bundle"), str(some), "--top", "10")
    assert done.returncode == 0 and done.stderr.count("\n") == 1 and "transclip" in done.stderr
    plain = air("predict", str(runs / "zero-shot" / "bundle"), str(some), "--top", "10")
    assert done.stdout == plain.stdout and plain.stderr == ""


def test_an_exported_bundle_is_the_same_classifier(air: Callable[..., Done], runs: Path, photos: Path, tmp_path: Path):
    import onnxruntime

    from air_plugin.utils.images import load_rgb

    done = air("export", str(runs / "AiR" / "bundle"), str(tmp_path / "digits.onnx"))
    assert (done.returncode, done.stdout) == (0, f"wrote {tmp_path / 'digits.onnx'}\n"), done.stderr
    bundle = load_bundle(runs / "AiR" / "bundle")
    said = predictions(runs, "AiR")
    pixels = torch.stack(
        [bundle.backbone.preprocess(load_rgb(Path(said["root"]) / image)) for image in said["images"][:50]]
    )
    session = onnxruntime.InferenceSession(tmp_path / "digits.onnx", providers=["CPUExecutionProvider"])
    for head in ("text", "fused"):
        (probs,) = session.run([head], {"pixels": pixels.numpy()})
        assert probs.argmax(axis=1).tolist() == said["heads"][head]["predicted"][:50]
        assert probs.max(axis=1).tolist() == pytest.approx(said["heads"][head]["confidence"][:50], abs=1.5e-4)


def test_the_stages_need_a_folder_and_names_and_no_dassl(air: Callable[..., Done], runs: Path, tmp_path: Path):
    said = predictions(runs, "AiR")
    (tmp_path / "images").mkdir()
    for image in said["images"][:40]:
        shutil.copy(Path(said["root"]) / image, tmp_path / "images")
    names = said["classnames"]
    (tmp_path / "classes.txt").write_text("\n".join([*names, "template: a photo of the digit {}."]))
    options = ["AIR.M", "2", "AIR.K", "1", "AIR.STEPS", "1", "AIR.LORA.STEPS", "2", "AIR.LORA.BATCH", "2"]
    line = [str(tmp_path / "images"), "--classes", str(tmp_path / "classes.txt"), "--store", str(tmp_path / "store")]
    told = {}
    for command in ("lora", "generate", "prototypes"):
        done = air(command, *line, "--offline", *options)
        assert done.returncode == 0, done.stderr
        told |= dict(row.split(": ", 1) for row in done.stdout.splitlines())
    assert told["images"].endswith("(20, 0 generated now)")  # the second command had generated them
    backbone = load_bundle(runs / "AiR" / "bundle").backbone
    head = AuxiliaryClassifier.load(told["classifier"], classnames=names, backbone=backbone)
    assert head.card["template"] == "a photo of the digit {}." and head.card["lora"] == Path(told["adapter"]).name
    features = backbone.encode_images(torch.zeros(1, 3, 32, 32))
    assert head.fuse(torch.zeros(1, 10, dtype=torch.float16), features).shape == (1, 10)


@pytest.mark.public_reports
def test_a_table_of_predictions_holds_no_formula(
    air: Callable[..., Done], runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """15: a path that begins like a formula still names its file, a label has a quote in front."""
    bundle = copy_to_change(runs / "zero-shot" / "bundle", tmp_path / "bundle", "bundle.json")
    card = json.loads((bundle / "bundle.json").read_text())
    card["classes"] = [f"={name}" for name in card["classes"]]
    (bundle / "bundle.json").write_text(json.dumps(card))
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 32)).save("=cmd.png")
    assert air("predict", "bundle", "=cmd.png", "--csv", "out.csv").returncode == 0
    (row,) = list(csv.DictReader(io.StringIO(Path("out.csv").read_text())))
    assert row["path"] == "./=cmd.png" and row["label"].startswith("'=")


@pytest.mark.public_reports
@pytest.mark.parametrize("command", ["predict", "export", "report", "prototypes", "lora"])
def test_what_cannot_be_written_is_refused_before_the_work(
    command: str, air: Callable[..., Done], runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16: one line, exit code 2, and no model was loaded."""

    def work(*_: object, **__: object) -> None:
        raise AssertionError("the work began")

    monkeypatch.setattr("air_plugin.inference.bundle.load_bundle", work)
    monkeypatch.setattr("air_plugin.clip.loading.load_backbone", work)
    monkeypatch.setattr("air_plugin.report.formats.collect", work)
    (tmp_path / "file").write_text("kept")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "images" / "a.png")
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    bundle, place = str(runs / "AiR" / "bundle"), str(tmp_path / "file" / "x")
    stage = [str(tmp_path / "images"), "--classes", str(tmp_path / "classes.txt")]
    words = {
        "predict": [bundle, str(tmp_path / "images"), "--csv", place],
        "export": [bundle, place],
        "report": [str(tmp_path), "--out", place],
        "prototypes": [*stage, "--store", str(tmp_path / "store"), "--out", place],
        "lora": [*stage, "--store", place],
    }
    done = air(command, *words[command])
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and f"cannot write {place}: " in done.stderr
    assert (tmp_path / "file").read_text() == "kept"
