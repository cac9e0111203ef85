"""Files are written whole, where they can be written, and their cells are no formulas."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from air_plugin.utils import files
from air_plugin.utils.errors import UserError
from air_plugin.utils.files import csv_text, require_writable, write_atomically

pytestmark = pytest.mark.public_reports


def test_a_name_of_the_full_length_is_written(tmp_path: Path) -> None:
    """16: the temporary file beside it has a shorter name."""
    path = tmp_path / ("n" * 255)
    require_writable(path, "--csv")
    assert not path.exists()
    write_atomically(path, b"x")
    assert path.read_bytes() == b"x" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "folder", "reason"),
    [
        ("file/below.csv", False, "Not a directory"),
        ("file/deep/er", True, "Not a directory"),
        ("file", True, "it is a file"),
        ("folder", False, "it is a folder"),
        ("n" * 256, False, "File name too long"),
        ("/".join(["d" * 200] * 21), True, "File name too long"),
        ("/proc/out.csv", False, "No such file or directory"),
        ("/proc/out/deep", True, "No such file or directory"),
    ],
)
def test_what_cannot_be_written_is_one_line(name: str, folder: bool, reason: str, tmp_path: Path) -> None:
    """16: checked before the work; nothing is left behind."""
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError) as caught:
        require_writable(tmp_path / name, "--somewhere", folder=folder)
    text = str(caught.value)
    assert text == f"cannot write {tmp_path / name}: {reason}; choose another --somewhere"
    assert (tmp_path / "file").read_text() == "kept"
    assert not list((tmp_path / "folder").iterdir())


def test_a_read_only_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """16: the superuser ignores mode bits, so the refusal is made up."""

    def refuse(path: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(files.Path, "touch", refuse)
    with pytest.raises(UserError, match="Read-only file system"):
        require_writable(tmp_path / "store", "--store", folder=True)


def test_an_existing_file_may_be_replaced_and_is_not_touched(tmp_path: Path) -> None:
    """16: the check is no write; missing parents are made."""
    (tmp_path / "table.csv").write_text("old")
    require_writable(tmp_path / "table.csv", "--csv")
    require_writable(tmp_path / "new" / "er" / "table.csv", "--csv")
    assert (tmp_path / "table.csv").read_text() == "old" and (tmp_path / "new" / "er").is_dir()


@pytest.mark.parametrize("text", ["=HYPERLINK(1)", "+1", "-cat", "@SUM(A1)", "\t=2", " =2", "\uff1d2"])
def test_no_cell_is_a_formula(text: str) -> None:
    """15: names of classes and files in tables for spreadsheets."""
    assert csv_text(text) == f"'{text}"


@pytest.mark.parametrize("text", ["", "cat", "a=b", "3-toed sloth", "'quoted"])
def test_other_cells_stay_as_they_are(text: str) -> None:
    """15: only what begins like a formula has a quote in front."""
    assert csv_text(text) == text
