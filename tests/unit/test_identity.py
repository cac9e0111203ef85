"""Which run a folder holds: contents of images, lists, names and weights count, and other ones are named in words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import layouts
import pytest
from layouts import Layout
from shared import copy_to_change

import train
from air_plugin.utils.extras import EXTRAS
from scripts.compose import ROOT, settings_of
from scripts.identity import INPUTS, claim, forget_data, inputs_of, weight_files

pytestmark = pytest.mark.public_reports


def arguments(root: Path, output: Path, dataset: str, *options: str, trainer: str = "CPL") -> list[str]:
    line = ["--root", str(root), "--output-dir", str(output), "--trainer", trainer]
    line += ["--dataset-config-file", str(ROOT / f"configs/datasets/{dataset}.yaml")]
    line += ["--config-file", str(ROOT / f"configs/trainers/{trainer}/mini.yaml")]
    return [*line, "AIR.CACHE", str(output.parent / "cache"), *options]


def config(*args: Any, **more: str) -> Any:
    return train.set_up(train.parse(arguments(*args, **more)))[0]


class Job:
    """A run that was made once and is complete; `again` asks for it once more."""

    def __init__(self, root: Path, output: Path, dataset: str, *options: str, **more: str) -> None:
        self.cfg = config(root, output, dataset, *options, **more)
        self.output = output
        claim(output, settings_of(self.cfg), inputs_of(self.cfg))
        (output / "result.json").write_text('{"a": 1}')

    def again(self, capsys: pytest.CaptureFixture[str], **changes: str) -> tuple[int, str, str]:
        forget_data()
        capsys.readouterr()
        cfg = self.cfg.clone()
        for key, value in changes.items():
            cfg.DATASET[key] = value
        code = train.contained(lambda: train.run(cfg, "mini"))
        told = capsys.readouterr()
        return code, told.out, told.err


def refusal(job: Job, capsys: pytest.CaptureFixture[str], **changes: str) -> str:
    """What the one line of an error says has changed."""
    code, out, err = job.again(capsys, **changes)
    lines = [line for line in err.splitlines() if not line.startswith("warning: ")]
    begin, end = f"error: {job.output} holds a run of other data or models (", "); remove it or choose another"
    assert code == 2 and len(lines) == 1 and lines[0].startswith(begin) and end in lines[0], (code, out, err)
    return lines[0].removeprefix(begin).partition(end)[0]


def is_complete(job: Job, capsys: pytest.CaptureFixture[str], **changes: str) -> bool:
    code, out, err = job.again(capsys, **changes)
    return code == 0 and out == f"{job.output}: complete, nothing to do\n" and "error" not in err


@pytest.fixture
def pets(tmp_path: Path) -> Layout:
    layout = layouts.oxford_pets(tmp_path / "data")
    layout.write_zhou()
    return layout


@pytest.fixture
def job(pets: Layout, tmp_path: Path) -> Job:
    return Job(tmp_path / "data", tmp_path / "out" / "seed1", "oxford_pets")


def test_the_same_data_elsewhere_is_the_same_run(pets: Layout, job: Job, tmp_path: Path, capsys):
    assert is_complete(job, capsys)
    copy_to_change(tmp_path / "data", tmp_path / "moved")
    assert is_complete(job, capsys, ROOT=str(tmp_path / "moved"))


def test_images_that_change_in_place_are_other_images(pets: Layout, job: Job, tmp_path: Path, capsys):
    """Items 1 and 2: names, sizes and the times of change stay as they were."""
    changed = sorted(pets.items)[40:43]
    for path in changed:
        file = pets.images / path
        before = file.stat()
        file.write_bytes(file.read_bytes()[:-9] + b"\1" * 9)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert refusal(job, capsys) == f"the images changed: 3 of {len(pets.items)}, first oxford_pets/images/{changed[0]}"
    elsewhere = copy_to_change(tmp_path / "data", tmp_path / "moved", f"oxford_pets/images/{changed[0]}")
    assert refusal(job, capsys, ROOT=str(elsewhere)).startswith("the images changed: 3 of ")


def test_a_persons_images_count_by_content(tmp_path: Path, capsys):
    """Item 2: names and sizes alone counted. Hidden files are no part of the data."""
    root = tmp_path / "mine"
    layouts.put(root, "train/a.jpg", "train/in/b.jpg", "test/owl/c.jpg", "test/owl/e.jpg", "test/hen/d.jpg")
    (root / "classes.txt").write_text("owl\nhen\n")
    job = Job(root, tmp_path / "out" / "seed1", "folder")
    layouts.put(root, "train/._a.jpg", "test/.owl/x.jpg")
    assert is_complete(job, capsys)
    file = root / "train/in/b.jpg"
    whole = file.read_bytes()
    file.write_bytes(whole[:-5] + whole[-4:] + b"\0")
    assert refusal(job, capsys) == "the images changed: 1 of 5, first train/in/b.jpg"
    file.write_bytes(whole)
    (root / "test/owl/c.jpg").rename(root / "test/hen/c.jpg")
    moved = "1 image is new, first test/hen/c.jpg; 1 image is gone, first test/owl/c.jpg"
    assert refusal(job, capsys) == moved
    (root / "test/hen/c.jpg").rename(root / "test/owl/c.jpg")
    (root / "classes.txt").write_text("hen\nowl\n")
    said = refusal(job, capsys)
    assert "labels of 3 images changed, first test/hen/d.jpg" in said and "2 class names changed, first 'owl'" in said


def test_labels_lists_and_names_are_told_in_words(pets: Layout, job: Job, capsys):
    """Item 1: every change of a split file, by itself."""
    file = pets.folder / pets.split_file
    whole = json.loads(file.read_text())

    def write(change: Callable[[dict[str, list]], Any]) -> None:
        split = json.loads(json.dumps(whole))
        change(split)
        file.write_text(json.dumps(split))

    def swap_labels(split: dict[str, list]) -> None:
        one, other = split["test"][0], split["test"][-1]
        one[1:], other[1:] = other[1:], one[1:]

    write(swap_labels)
    firsts = sorted(whole["test"][n][0] for n in (0, -1))
    assert refusal(job, capsys) == f"labels of 2 images changed, first oxford_pets/images/{firsts[0]}"
    write(lambda split: split["train"].append(split["val"].pop(7)))
    moved = f"1 image is in another list (train, val, test), first oxford_pets/images/{whole['val'][7][0]}"
    assert refusal(job, capsys) == moved
    write(lambda split: split["train"].pop(2))
    assert refusal(job, capsys) == f"1 image is gone, first oxford_pets/images/{whole['train'][2][0]}"

    def rename(split: dict[str, list]) -> None:
        for item in (item for items in split.values() for item in items if item[1] == 4):
            item[2] = "tabby"

    write(rename)
    old = next(name for _, label, name in whole["test"] if label == 4)
    assert refusal(job, capsys) == f"1 class name changed, first '{old}' -> 'tabby'"
    file.unlink()  # a split is made here then
    assert "in another list (train, val, test)" in refusal(job, capsys)
    file.write_text(json.dumps(whole))
    assert is_complete(job, capsys)


def test_without_the_details_the_kind_is_told(pets: Layout, job: Job, tmp_path: Path, capsys):
    """Item 1, where the cache was removed."""
    (pets.images / min(pets.items)).write_bytes(layouts.picture(9))
    for path in (tmp_path / "out" / "cache" / "inputs").iterdir():
        path.unlink()
    assert refusal(job, capsys) == "the images changed"


def test_a_folder_without_the_data_set_is_an_error_although_the_run_is_complete(job: Job, tmp_path: Path, capsys):
    """Item 1: the old table was shown, with exit code 0."""
    (tmp_path / "empty").mkdir()
    code, out, err = job.again(capsys, ROOT=str(tmp_path / "empty"))
    assert code == 2 and err.startswith(f"error: oxford_pets: {tmp_path / 'empty' / 'oxford_pets'} is missing")
    assert "complete" not in out and err.count("\n") == 1


def test_another_seed_of_other_data_is_refused_before_any_work(pets: Layout, job: Job, tmp_path: Path, capsys):
    """Item 1: seeds are averaged."""
    layouts.oxford_pets(tmp_path / "more", per_class=8).write_zhou()
    other = config(tmp_path / "more", job.output.with_name("seed2"), "oxford_pets")
    assert train.contained(lambda: train.run(other, "mini")) == 2
    assert f"error: {job.output} holds a run of other data" in capsys.readouterr().err
    assert not (job.output.with_name("seed2") / INPUTS).exists()


@pytest.mark.parametrize("kind", ["backbone", "generator"])
def test_other_weights_at_the_same_path_are_another_model(kind: str, digits_root: Path, tmp_path: Path, capsys):
    """Item 1: the path alone counted."""
    weights = tmp_path / "model" / "part" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"weights")
    key, value = {
        "backbone": ("MODEL.BACKBONE.NAME", f"ViT-B-32:{weights}"),
        "generator": ("AIR.GENERATOR", str(tmp_path / "model")),
    }[kind]
    job = Job(digits_root, tmp_path / "out" / "seed1", "digits", key, value, trainer="AiR")
    assert is_complete(job, capsys)
    weights.write_bytes(b"WEIGHTS")
    assert refusal(job, capsys) == f"the weights of the {kind} changed"


def test_another_commit_of_a_hub_generator_is_another_model(
    digits_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    """Item 1: without AIR.REVISION a name stands for whatever was fetched last. What was never fetched is no fault."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    job = Job(digits_root, tmp_path / "out" / "seed1", "digits", "AIR.GENERATOR", "owner/model", trainer="AiR")
    reference = tmp_path / "hub" / "models--owner--model" / "refs" / "main"
    reference.parent.mkdir(parents=True)
    reference.write_text("0123abcd")
    assert is_complete(job, capsys) and is_complete(job, capsys)
    reference.write_text("4567cdef")
    assert refusal(job, capsys) == "the weights of the generator changed"


def test_weights_are_found_where_models_are_loaded_from(tmp_path: Path):
    (tmp_path / "a").mkdir()
    for name in ("a/one.safetensors", "index.json", ".hidden"):
        (tmp_path / name).touch()
    assert weight_files(str(tmp_path)) == [tmp_path / "a/one.safetensors", tmp_path / "index.json"]
    assert weight_files(f"ViT-B/32:{tmp_path / 'index.json'}") == [tmp_path / "index.json"]
    assert weight_files("ViT-B/32") == weight_files("owner/model") == weight_files("") == []
    assert {path.suffix for path in weight_files("mini")} >= {".safetensors"}


def test_a_run_from_before_inputs_were_recorded_is_taken_once(digits_root: Path, tmp_path: Path, capsys):
    """Item 1: complete runs of earlier versions stay complete, and later changes are seen."""
    data = copy_to_change(digits_root, tmp_path / "data", "digits/images/0100.png")
    job = Job(data, tmp_path / "out" / "seed1", "digits")
    (job.output / INPUTS).unlink()
    mark = job.output / "settings.json"
    mark.write_text(json.dumps({**json.loads(mark.read_text()), "DATASET.CONTENTS": "0123456789abcdef"}))
    assert is_complete(job, capsys) and is_complete(job, capsys)
    (data / "digits/images/0100.png").write_bytes((data / "digits/images/0101.png").read_bytes())
    assert refusal(job, capsys) == "the images changed: 1 of 1,797, first digits/images/0100.png"


def test_the_identity_does_not_depend_on_what_settings_sample(digits_root: Path, tmp_path: Path):
    few = ["DATASET.NUM_SHOTS", "2", "DATASET.SUBSAMPLE_CLASSES", "base", "DATASET.NUM_MISSING_CLASSES", "3"]
    some = [["DATASET.PARADIGM", paradigm] for paradigm in ("ssl", "trzsl")]
    made = [inputs_of(config(digits_root, tmp_path / "run", "digits", *more)).digests for more in ([], few, *some)]
    assert made[0] == made[1] == made[2] == made[3]


def test_labelled_images_of_a_persons_folder_count(tmp_path: Path, capsys):
    root = tmp_path / "mine"
    layouts.put(root, "train/a.jpg", "train/owl/1.jpg", "train/owl/2.jpg", "train/hen/1.jpg", "train/hen/2.jpg")
    (root / "classes.txt").write_text("owl\nhen\n")
    job = Job(root, tmp_path / "out" / "seed1", "folder", "DATASET.PARADIGM", "ssl")
    assert is_complete(job, capsys)
    (root / "train/a.jpg").rename(root / "train/owl/3.jpg")  # it has a label now
    assert refusal(job, capsys) == "1 image is new, first train/owl/3.jpg; 1 image is gone, first train/a.jpg"
    (root / "train/owl/3.jpg").rename(root / "train/a.jpg")
    code, out, err = job.again(capsys, PARADIGM="trzsl")
    assert code == 2 and not out and "DATASET.PARADIGM 'ssl' -> 'trzsl'" in err


def test_no_torch_is_needed_to_see_that_a_run_is_complete(digits_root: Path, tmp_path: Path):
    """Item 1: a second run of a completed command stays quick."""
    job = Job(digits_root, tmp_path / "out" / "seed1", "digits", trainer="AiR")
    line = arguments(digits_root, job.output, "digits", trainer="AiR")
    code = "import sys, train; code = train.main(sys.argv[1:]); sys.exit(code or 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *line], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, f"{job.output}: complete, nothing to do\n"), done.stderr


def test_a_package_that_writing_the_data_needs_is_named_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setitem(EXTRAS["train"], "no_such_package", "no-such-package")
    (tmp_path / "data").mkdir()
    assert train.main(arguments(tmp_path / "data", tmp_path / "run", "digits")) == 2
    assert "pip install no-such-package" in capsys.readouterr().err and not list((tmp_path / "data").iterdir())
