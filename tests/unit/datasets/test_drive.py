"""Files on Google Drive: when they are fetched, how they are verified, and what a failure costs. gdown is a fake."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from datasets.download import fetch
from datasets.drive import to_fetch_from_drive
from datasets.sources import DRIVE, ByHand, Source, split_by_zhou
from datasets.splits import MADE

SPLIT = split_by_zhou("EuroSAT", "1Ip7")
FRAMES = ByHand("frames", DRIVE.format("9frames"), "frames")
CONTENT = json.dumps({"train": [], "val": [], "test": []}).encode()


class Drive:
    """Serves `files` by their names on Google Drive; an error is raised, None is what gdown returns on failure."""

    def __init__(self) -> None:
        self.files: dict[str, Any] = {"1Ip7": CONTENT}
        self.asked: list[str] = []

    def download(self, *, id: str, output: str, quiet: bool) -> str | None:
        assert quiet
        self.asked.append(id)
        data = self.files[id]
        if isinstance(data, Exception):
            raise data
        if data is None:
            return None
        Path(output).write_bytes(data)
        return output


@pytest.fixture
def drive(monkeypatch: pytest.MonkeyPatch) -> Drive:
    for name in ("AIR_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    found = Drive()
    monkeypatch.setitem(sys.modules, "gdown", SimpleNamespace(download=found.download))  # type: ignore[arg-type]
    return found


def zipped(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(name.replace("__", "/"), data)
    return buffer.getvalue()


def test_coops_split_comes_before_the_first_use(drive: Drive, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "eurosat"
    assert fetch("eurosat", Source(optional=[SPLIT], licence="MIT"), folder) == []
    assert (folder / SPLIT.puts).read_bytes() == CONTENT
    (line,) = capsys.readouterr().out.splitlines()
    assert line == f"eurosat: {SPLIT.puts}, size unknown, from Google Drive ({SPLIT.where}), licence: MIT"
    fetch("eurosat", Source(optional=[SPLIT]), folder)
    assert drive.asked == ["1Ip7"]


def test_a_split_that_was_made_here_stays_the_one_in_use(drive: Drive, tmp_path: Path):
    """Else the runs before would have been made with other images."""
    (tmp_path / MADE).write_text("{}")
    fetch("eurosat", Source(optional=[SPLIT]), tmp_path)
    assert drive.asked == [] and not (tmp_path / SPLIT.puts).exists()


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (None, "Google Drive gives no file"),
        (b"<html>too many", "what came is no JSON"),
        (RuntimeError("Cannot retrieve the public link"), "Cannot retrieve the public link"),
        (ConnectionError("no route"), "no route"),
    ],
)
def test_without_it_the_rest_goes_on(
    drive: Drive, given: Any, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    drive.files["1Ip7"] = given
    assert fetch("eurosat", Source(optional=[SPLIT]), tmp_path / "eurosat") == []
    assert f"eurosat: {SPLIT.puts} was not fetched: {reason}" in capsys.readouterr().out
    assert not (tmp_path / "eurosat" / SPLIT.puts).exists() and not list(tmp_path.rglob("*.part"))


def test_a_full_disk_is_an_error(drive: Drive, tmp_path: Path):
    drive.files["1Ip7"] = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="No space"):
        fetch("eurosat", Source(optional=[SPLIT]), tmp_path / "eurosat")


def test_a_checksum_is_verified(drive: Drive, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    right = hashlib.md5(CONTENT, usedforsecurity=False).hexdigest()
    for folder, digest in (("a", right), ("b", "0" * 32)):
        item = ByHand(SPLIT.what, SPLIT.where, SPLIT.puts, f"md5:{digest}")
        fetch(folder, Source(optional=[item]), tmp_path / folder)
    assert (tmp_path / "a" / SPLIT.puts).exists() and not (tmp_path / "b" / SPLIT.puts).exists()
    assert f"it has the md5 {right} instead of {'0' * 32}" in capsys.readouterr().out


def test_a_folder_comes_as_an_archive(drive: Drive, tmp_path: Path):
    drive.files["9frames"] = zipped(frames__a__1=b"x")
    assert fetch("ucf101", Source(needed=[FRAMES]), tmp_path / "ucf101") == []
    assert (tmp_path / "ucf101/frames/a/1").read_bytes() == b"x"


def test_an_archive_without_the_folder_stays_by_hand(drive: Drive, tmp_path: Path):
    drive.files["9frames"] = zipped(other__1=b"x")
    assert fetch("ucf101", Source(needed=[FRAMES]), tmp_path / "ucf101") == [FRAMES]
    assert not (tmp_path / "ucf101/frames").exists()


def test_nothing_is_fetched_in_vain(drive: Drive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Where something else must be fetched by hand, without a network, and without gdown."""
    elsewhere = ByHand("images", "https://image-net.org", "images")
    assert to_fetch_from_drive(Source(needed=[FRAMES, elsewhere]), tmp_path) == []
    assert to_fetch_from_drive(Source(needed=[FRAMES]), tmp_path) == [FRAMES]
    with monkeypatch.context() as patch:
        patch.setenv("AIR_OFFLINE", "1")
        assert to_fetch_from_drive(Source(needed=[FRAMES]), tmp_path) == []
    monkeypatch.setitem(sys.modules, "gdown", None)
    assert to_fetch_from_drive(Source(needed=[FRAMES]), tmp_path) == []


def test_what_lies_on_google_drive_is_known_by_its_address():
    assert SPLIT.drive == "1Ip7" and FRAMES.drive == "9frames"
    assert ByHand("", "https://kaggle.com/x", "x").drive == "" and ByHand("", DRIVE.format("a"), "").drive == ""
