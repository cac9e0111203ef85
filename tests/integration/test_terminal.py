"""What a person sees at the terminal: warnings of parallel runs, Ctrl-C, odd encodings, folders that cannot be used."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from runs import ROOT, SHORT, arguments, figures, script

import prepare
import train
from air_plugin.cli import main as air
from trainers.self_training import SelfTraining

pytestmark = pytest.mark.public_reports
Finished = Callable[..., Path]


def obey_ctrl_c() -> None:
    """What runs in the background of a shell ignores SIGINT, and so would a process that a test starts there."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(*words: str, **environment: str) -> subprocess.Popen[bytes]:
    """A script as from a terminal: it and its workers are one group of processes."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "run.py"), *words],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=obey_ctrl_c,
    )


def members(group: int) -> list[int]:
    """The processes of a group that have not ended."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(folder.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="processes are counted in /proc")
def test_an_interrupted_script_ends_its_workers(data: Path, tmp_path: Path) -> None:
    """20: a terminal sends Ctrl-C to the whole group of processes."""
    places = {"DATA": str(data), "OUTPUT": str(tmp_path), "SEEDS": "3 4", "JOBS": "2"}
    process = start("--trainers", "CPL", "digits", "mini", "OPTIM.MAX_EPOCH", "100000", **places)
    try:
        end = time.monotonic() + 120
        while len(list(tmp_path.glob("digits/CPL/*/seed*/rounds/1.safetensors"))) < 2 and time.monotonic() < end:
            time.sleep(0.05)
        assert len(members(process.pid)) >= 3
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)  # nothing of a failed test goes on
        raise
    assert process.returncode == 130
    assert errors.decode().splitlines() == [
        "interrupted: run the same command again: completed runs are skipped, interrupted ones resume"
    ]
    end = time.monotonic() + 20
    while members(process.pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert members(process.pid) == []


def test_an_interrupted_run_goes_on_from_there(
    finished: Finished,
    data: Path,
    cache: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """20: train.py; its result is that of a run that was not interrupted."""
    whole, run_epoch = finished("UPL"), SelfTraining.run_epoch

    def until(self: SelfTraining) -> None:
        if self.epoch == 1:
            raise KeyboardInterrupt
        run_epoch(self)

    line = arguments("UPL", data, tmp_path, "AIR.CACHE", cache)
    with monkeypatch.context() as patch:
        patch.setattr(SelfTraining, "run_epoch", until)
        assert train.main(line) == 130
    assert capsys.readouterr().err.count("\n") == 1 and not list(tmp_path.rglob("*.tmp"))
    assert train.main(line) == 0 and figures(tmp_path) == figures(whole)


@pytest.mark.parametrize("command", ["prepare", "air", "script"])
def test_every_command_can_be_interrupted(
    command: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """20: exit code 130 and one line, wherever it happens."""

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    if command == "prepare":
        monkeypatch.setattr(prepare, "fetch", interrupt)
        code, errors = prepare.main(["digits", "--root", str(tmp_path)]), capsys.readouterr().err
    elif command == "air":
        monkeypatch.setattr("air_plugin.report.formats.report", interrupt)
        code, errors = air(["report", str(tmp_path)]), capsys.readouterr().err
    else:
        monkeypatch.setattr(train, "build", interrupt)
        done = script("scripts/zeroshot/main.sh", "digits", DATA=str(data), OUTPUT=str(tmp_path), SEEDS="1 2")
        code, errors = done.returncode, done.stderr
        assert "accuracy" not in done.stdout  # no table of what is unfinished
    assert code == 130 and errors.count("\n") == 1 and errors.startswith("interrupted: ")


def own_folder(data: Path, folder: Path) -> Path:
    """Three classes and 24 images of a person's own, one of which is cut off."""
    (folder / "train").mkdir(parents=True)
    (folder / "classes.txt").write_text("one\ntwo\nthree\n")
    for path in sorted((data / "digits" / "images").glob("*.png"))[:24]:
        shutil.copy(path, folder / "train")
    (folder / "train" / "notes.txt").write_text("not an image")
    return folder


def test_warnings_of_parallel_runs_are_shown_once(data: Path, tmp_path: Path) -> None:
    """9: two runs find the same file that is no image; one line says so, with a run's name."""
    folder = own_folder(data, tmp_path / "own")
    places = {"DATA": str(folder), "OUTPUT": str(tmp_path / "out"), "SEEDS": "1 2", "JOBS": "2"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/run.py"), "--trainers", "ZeroshotCLIP", "folder", "mini"],
        env={**os.environ, **places},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if "1 .txt files" in line]
    in_workers = [line for line in warnings if line.endswith(")")]
    assert (
        len(in_workers) == 1 and in_workers[0].startswith("warning: ") and "(folder / ZeroshotCLIP / " in in_workers[0]
    )
    assert len(warnings) <= 2  # the script itself lists the folder, too, before the runs


def test_bytes_and_letters_that_a_console_lacks(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """17: a data root whose name is no UTF-8 and classes in another script, on a console of 7 bits."""
    from air_plugin.report.predictions import Predictions

    root = own_folder(data, tmp_path / os.fsdecode(b"gr\xfcn"))
    (root / "classes.txt").write_text("\u3044\u3061\n\u306b\n=\u4e09 $1\n", encoding="utf-8")
    output = tmp_path / "\u51fa\u529b"
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/run.py"), "--trainers", "CPL,AiR", "folder", "mini", *SHORT],
        env={**os.environ, "PYTHONIOENCODING": "ascii", "DATA": str(root), "OUTPUT": str(output), "SEEDS": "5"},
        capture_output=True,
    )
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
    (path,) = output.glob("folder/AiR/*/seed5/predictions.json")
    found = Predictions.load(path)
    assert Path(found.root) == root and (root / found.images[0]).is_file() and found.classnames[1] == "\u306b"
    assert (path.parent / "gallery.png").is_file()
    assert "\u51fa\u529b" in (path.parent / "log.txt").read_text("utf-8")
    assert air(["report", str(output), "--format", "html"]) == 0
    assert (output / "report.html").is_file() and capsys.readouterr().err == ""


def test_a_gallery_that_fails_costs_no_result(
    data: Path, tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """15: the result is written, and a warning says what is missing."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("font broken")

    monkeypatch.setattr("air_plugin.auxiliary.gallery.plot_gallery", fail)
    assert train.main(arguments("AiR", data, tmp_path, "AIR.CACHE", cache)) == 0
    assert (tmp_path / "result.json").is_file() and not (tmp_path / "gallery.png").exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ") and "gallery.png was not made" in line and "font broken" in line


@pytest.mark.parametrize("place", ["OUTPUT", "DATA"])
def test_folders_that_cannot_be_used_are_one_line(
    place: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16: a file in the place of a folder, before any run begins."""

    def work(*_: object, **__: object) -> None:
        raise AssertionError("a run began")

    monkeypatch.setattr(train, "build", work)
    (tmp_path / "file").write_text("kept")
    places = {"DATA": str(data), "OUTPUT": str(tmp_path / "out"), place: str(tmp_path / "file" / "below")}
    done = script("scripts/cpl/main.sh", "digits", SEEDS="1", **places)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")
    assert str(tmp_path / "file" / "below") in done.stderr


def test_an_output_folder_of_train_that_is_a_file_is_one_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """16: train.py checks it by itself."""
    (tmp_path / "file").write_text("kept")
    assert train.main(arguments("UPL", data, tmp_path / "file")) == 2
    assert capsys.readouterr().err.startswith(f"error: cannot write {tmp_path / 'file'}: it is a file; ")


def harmful_images(folder: Path) -> dict[str, Path]:
    """Files with an image's name that are none: a pipe, a strip of pixels, a text, half a file."""
    folder.mkdir(exist_ok=True)
    bad = {name: folder / f"{name}.png" for name in ("pipe", "strip", "text", "half", "empty")}
    os.mkfifo(bad["pipe"])
    Image.new("L", (1, 4000)).save(bad["strip"])
    bad["text"].write_text("a bird")
    Image.effect_noise((64, 64), 9).save(bad["half"])
    bad["half"].write_bytes(bad["half"].read_bytes()[:900])
    bad["empty"].touch()
    return bad


def test_predictions_skip_every_harmful_file_with_one_warning(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """19: no traceback, no waiting; a pipe is no regular file, so it is left out with those that are no images."""
    bundle = finished("ZeroshotCLIP") / "bundle"
    bad = harmful_images(tmp_path / "photos")
    Image.effect_noise((32, 32), 90).save(tmp_path / "photos" / "good.png")
    assert air(["predict", str(bundle), str(tmp_path / "photos")]) == 0
    out, err = capsys.readouterr()
    assert [line.split("\t")[0] for line in out.splitlines()] == [str(tmp_path / "photos" / "good.png")]
    lines = err.splitlines()
    assert len(lines) == len(bad) and all(line.startswith("warning: ") for line in lines)
    for name, path in bad.items():
        assert len([line for line in lines if ("special files" if name == "pipe" else str(path)) in line]) == 1
    assert air(["predict", str(bundle), str(bad["pipe"])]) == 2
    assert str(bad["pipe"]) in capsys.readouterr().err


@pytest.mark.parametrize("name", ["strip", "text", "half", "empty"])
def test_training_names_a_harmful_file(
    name: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """19: in one line, before training."""
    root = own_folder(data, tmp_path / "own")
    bad = harmful_images(tmp_path / "bad")[name]
    shutil.move(bad, root / "train" / bad.name)
    line = arguments("UPL", root, tmp_path / "out")
    line[line.index("--dataset-config-file") + 1] = str(ROOT / "configs/datasets/folder.yaml")
    assert train.main(line) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert str(root / "train" / bad.name) in error
