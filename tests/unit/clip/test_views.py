"""Pixels of views: what workers hand over and the device finishes equals the plain preparation, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from small_models import write_pictures
from torch import Tensor
from torchvision import transforms as T
from torchvision.transforms import v2

from air_plugin.clip import views as views_module
from air_plugin.clip.views import Views
from air_plugin.utils.images import load_rgb
from air_plugin.utils.seeding import stable_seed

SIDE, MEAN, STD = 16, (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
PLAIN = open_clip.image_transform(SIDE, is_train=False, mean=MEAN, std=STD)
NORMALIZE = T.Normalize(mean=list(MEAN), std=list(STD))
CROP = T.RandomResizedCrop(SIDE, scale=(0.3, 1.0))
BYTES = {
    "crop": T.Compose([CROP, T.ToTensor(), NORMALIZE]),
    "colour": T.Compose([CROP, T.ColorJitter(0.3, 0.3, 0.3, 0.1), T.RandomGrayscale(0.5), T.ToTensor(), NORMALIZE]),
}
FLOATS = {
    "other mean": T.Compose([CROP, T.ToTensor(), T.Normalize((0.5, 0.4, 0.2), STD)]),
    "no mean": T.Compose([CROP, T.ToTensor()]),
    "erasing": T.Compose([CROP, T.ToTensor(), NORMALIZE, T.RandomErasing(0.9)]),
    "v2": v2.Compose([v2.RandomCrop(SIDE), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]),
    "function": lambda image: T.functional.to_tensor(CROP(image)) + torch.randn(3, 1, 1),
}


@pytest.fixture
def jpegs(tmp_path: Path) -> list[str]:
    rng = np.random.default_rng(0)
    paths = []
    for number in range(5):
        pixels = rng.integers(0, 256, (20 + number, 40, 3), dtype=np.uint8)
        paths.append(str(tmp_path / f"{number}.jpg"))
        Image.fromarray(pixels).resize((60, 50), Image.Resampling.BILINEAR).save(paths[-1])
    return paths


def one_by_one(paths: list[str], augment: Callable[[Image.Image], Tensor], *, views: int, seed: int) -> Tensor:
    """(N * V, 3, H, W): every view from a file of its own reading, prepared alone."""
    pixels = []
    for index, path in enumerate(paths):
        pixels.append(PLAIN(load_rgb(path)))
        for view in range(1, views):
            torch.manual_seed(stable_seed(seed, index, view))
            pixels.append(augment(load_rgb(path)))
    return torch.stack(pixels)


@pytest.mark.parametrize("name", [*BYTES, *FLOATS])
def test_views_equal_those_prepared_one_by_one(name: str, jpegs: list[str]):
    augment = {**BYTES, **FLOATS}[name]
    views = Views(PLAIN, augment, views=4, seed=7)
    items = [views.read((index, path)) for index, path in enumerate(jpegs)]
    assert {item.dtype.name for item in items} == {"uint8" if name in BYTES else "float32"}
    made = views.finish(views.collate(items))
    assert made.is_contiguous() and torch.equal(made, one_by_one(jpegs, augment, views=4, seed=7))


def test_a_single_view_is_the_plain_preparation(jpegs: list[str]):
    views = Views(PLAIN, None, views=1, seed=0)
    items = [views.read((index, path)) for index, path in enumerate(jpegs)]
    assert items[0].shape == (1, SIDE, SIDE, 3) and items[0].dtype == np.uint8
    assert torch.equal(views.finish(views.collate(items)), torch.stack([PLAIN(load_rgb(path)) for path in jpegs]))


def test_bytes_and_floats_in_one_batch(jpegs: list[str]):
    """A view of another mode than RGB is finished where it is read."""
    other_mode = T.RandomApply([T.Lambda(lambda image: image.convert("YCbCr"))], p=0.4)
    augment = T.Compose([CROP, other_mode, T.ToTensor(), NORMALIZE])
    views = Views(PLAIN, augment, views=2, seed=1)
    items = [views.read((index, path)) for index, path in enumerate(jpegs)]
    assert {item.dtype.name for item in items} == {"uint8", "float32"}
    assert torch.equal(views.finish(views.collate(items)), one_by_one(jpegs, augment, views=2, seed=1))


def test_an_image_is_decoded_once(jpegs: list[str], monkeypatch: pytest.MonkeyPatch):
    read: list[str] = []

    def counting(path: str) -> Image.Image:
        read.append(path)
        return load_rgb(path)

    monkeypatch.setattr(views_module, "load_rgb", counting)
    views = Views(PLAIN, BYTES["crop"], views=8, seed=0)
    for index, path in enumerate(jpegs):
        views.read((index, path))
    assert read == jpegs


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path):
    paths = write_pictures(tmp_path, 1)
    Path(paths[0]).write_text("no image")
    assert paths[0] in Views(PLAIN, None, views=1, seed=0).read((0, paths[0]))


def test_a_deviation_of_0_is_an_error_as_before(jpegs: list[str]):
    plain = T.Compose([T.Resize((SIDE, SIDE)), T.ToTensor(), T.Normalize(MEAN, (0.2, 0.0, 0.2))])
    with pytest.raises(ValueError, match="zero"):
        Views(plain, None, views=1, seed=0).read((0, jpegs[0]))
