"""What the estimator takes as images and class names, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.sparse import csr_matrix

from air_plugin.estimator.inputs import InputError, as_files, as_sources, clean_names, read_batches, unreadable
from air_plugin.utils.errors import UserError

RGB = np.arange(2 * 3 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 3)


def pixels(images: Any) -> list[np.ndarray]:
    return [np.asarray(image) for batch in read_batches(as_sources(images), 2) for image in batch]


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (RGB, RGB),
        (list(RGB), RGB),
        (RGB / np.float32(255), RGB),
        (torch.from_numpy(RGB), RGB),
        ([Image.fromarray(one) for one in RGB], RGB),
        (RGB[..., 0], RGB[..., [0, 0, 0]]),
        (RGB[..., :1], RGB[..., [0, 0, 0]]),
        (RGB[..., 0] / 255.0, RGB[..., [0, 0, 0]]),
        ([RGB[0], Image.fromarray(RGB[1, ..., 0])], [RGB[0], RGB[1][..., [0, 0, 0]]]),
    ],
)
def test_every_form_of_an_image_gives_the_same_pixels(images: Any, expected: Any):
    found = pixels(images)
    assert len(found) == 2 and all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_folder_is_read_whole_and_sorted(tmp_path: Path):
    for name in ("b/2.png", "a/deep/1.jpg", "c.webp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    assert as_sources(tmp_path) == [tmp_path / name for name in ("a/deep/1.jpg", "b/2.png", "c.webp")]
    assert as_sources(str(tmp_path / "c.webp")) == [tmp_path / "c.webp"]
    assert as_sources(np.array([str(tmp_path / "c.webp")])) == [tmp_path / "c.webp"]


def test_images_in_memory_are_written_once(tmp_path: Path):
    files = as_files(as_sources([*RGB, RGB[0]]), tmp_path / "inputs")
    assert files[0] == files[2] != files[1] and len(list((tmp_path / "inputs").iterdir())) == 2
    assert np.array_equal(np.asarray(Image.open(files[1])), RGB[1])


def test_files_that_cannot_be_read_are_named(pictures: list[str], tmp_path: Path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(Path(pictures[0]).read_bytes()[:60])
    found = unreadable([pictures[0], str(broken), str(tmp_path / "none.png")])
    assert list(found) == [broken, tmp_path / "none.png"] and str(broken) in found[broken]
    with pytest.raises(InputError, match=r"broken\.png.*a row for each image"):
        list(read_batches(as_sources([pictures[0], broken]), 1))


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (np.zeros((5, 7)), r"shape \(5, 7\); it must be \(N, H, W, 3\)"),
        (np.zeros((2, 5, 7, 4), np.uint8), r"image 0 has the shape \(5, 7, 4\)"),
        (np.zeros((2, 0, 7, 3), np.uint8), r"image 0 has the shape \(0, 7, 3\)"),
        (np.zeros((2, 3, 3), np.int64), "image 0 holds int64"),
        (np.full((2, 3, 3), 16.0), r"those of image 0 lie in \[16, 16\]"),
        (np.full((2, 3, 3), np.nan), r"lie in \[nan, nan\]"),
        (np.zeros((5, 7), object), r"shape \(5, 7\)"),
        (csr_matrix(np.eye(3)), "sparse matrix, which is not supported"),
        ([], "there are no images"),
        ([RGB[0], 3], "image 1 is a int"),
        (3, "images is a int"),
        (Image.new("L", (2, 2)), "give a list of images"),
        ("nowhere", "image folder nowhere is missing"),
    ],
)
def test_other_images_are_refused_in_one_line(images: Any, said: str):
    with pytest.raises(UserError, match=said) as raised:
        as_sources(images)
    assert "\n" not in str(raised.value)


def test_names_are_made_clean():
    assert clean_names(("dog", " traffic \t light", "cafe\u0301")) == ["dog", "traffic light", "caf\u00e9"]
    assert clean_names(np.array(["dog", "cat"])) == ["dog", "cat"]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (None, "class_names is None; it must be a list of names"),
        ("names.txt", "read_class_file reads a file"),
        (["dog"], "holds 1 names; a classifier needs at least 2"),
        ([], "holds 0 names"),
        (["dog", 3], "holds 3; every name"),
        (["dog", " "], "holds ' '; every name"),
        (["dog", "cat", "dog"], "'dog' and 'dog', which are one name"),
        (["sea lion", "cat", "Sea_lion"], "'sea lion' and 'Sea_lion', which are one name"),
        (["cafe\u0301", "caf\u00e9"], "which are one name"),
    ],
)
def test_other_names_are_refused(names: Any, said: str):
    with pytest.raises(InputError, match=said) as raised:
        clean_names(names)
    assert isinstance(raised.value, ValueError)
