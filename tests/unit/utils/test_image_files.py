"""Which files of a folder are images."""

from __future__ import annotations

import io
import logging
import os
from pathlib import Path

import pytest
from PIL import Image

from air_plugin.utils.errors import UserError
from air_plugin.utils.image_files import find_images, is_image_file

pytestmark = pytest.mark.public_reports

PICTURE = Image.new("RGB", (8, 8), "red")


def write(path: Path, form: str = "png") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    PICTURE.save(buffer, form)
    path.write_bytes(buffer.getvalue())
    return path


def names(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in find_images(folder)]


def test_images_at_any_depth_in_order(tmp_path: Path):
    for name in ("b/2.PNG", "b/1.jpeg", "a.tif", "c.gif", "c.jfif", "c.avif"):
        write(tmp_path / name)
    assert names(tmp_path) == ["a.tif", "b/1.jpeg", "b/2.PNG", "c.avif", "c.gif", "c.jfif"]


@pytest.mark.parametrize("form", ["png", "jpeg", "webp", "tiff", "bmp", "gif", "avif"])
def test_a_file_whose_name_does_not_tell_is_known_by_its_content(form: str, tmp_path: Path):
    assert is_image_file(write(tmp_path / "IMG_0001", form))
    assert is_image_file(write(tmp_path / "photo.part7", form))


@pytest.mark.parametrize("content", [b"", b"BM is how this text begins, with more of it", b"II", b"{}", b"\0" * 64])
def test_other_content_is_no_image(content: bytes, tmp_path: Path):
    (tmp_path / "notes").write_bytes(content)
    assert not is_image_file(tmp_path / "notes")


def test_a_damaged_file_with_an_images_name_counts_so_that_its_reader_names_it(tmp_path: Path):
    (tmp_path / "a.png").touch()
    assert names(tmp_path) == ["a.png"]


def test_links_are_followed_without_going_round(tmp_path: Path):
    top = tmp_path / "top"
    write(tmp_path / "elsewhere" / "far.png")
    write(top / "near.png")
    (top / "linked").symlink_to(tmp_path / "elsewhere")
    (top / "again").symlink_to(top)
    (tmp_path / "elsewhere" / "back").symlink_to(top)
    assert names(top) == ["linked/far.png", "near.png"]


def test_what_is_left_out_is_said_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for name in ("a.png", "._a.png", ".ipynb_checkpoints/b.png"):
        write(tmp_path / name)
    for name in ("1.txt", "2.txt", "labels.csv", "README"):
        (tmp_path / name).write_text("text")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(tmp_path / "pipe.png")
    with caplog.at_level(logging.WARNING):
        assert names(tmp_path) == ["a.png"]
    (line,) = (record.getMessage() for record in caplog.records)
    expected = (
        "2 .txt files, 1 .csv files, 1 files that are no image, 1 hidden files, 1 hidden folders, 1 broken links, "
        "1 special files"
    )
    assert sorted(line.partition("left out ")[2].partition(";")[0].split(", ")) == sorted(expected.split(", "))
    assert line.endswith("1 images are used")


def test_nothing_is_said_where_all_files_are_used(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    write(tmp_path / "a.png")
    find_images(tmp_path)
    assert not caplog.records


def test_a_folder_without_images_is_an_error(tmp_path: Path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=r"no images below .*1 \.txt files"):
        find_images(tmp_path)
    with pytest.raises(UserError, match="missing"):
        find_images(tmp_path / "nowhere")
