"""Descriptions of image preparations: the same in every process, and another one for whatever changes an image."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional, v2

from air_plugin.clip.preparation import describe
from air_plugin.utils.store import key_of

ROOT = Path(__file__).resolve().parents[3]


def key(step: Any) -> str:
    """The key of a description; whatever is no JSON value in it, or an address, is an error."""
    text = json.dumps(describe(step))
    assert "0x" not in text
    return key_of({"step": describe(step)})


class Shift:
    """A user's step, whose repr holds an address."""

    scale = 1.0

    def __init__(self, by: float) -> None:
        self.by = by

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels * self.scale + self.by

    def twice(self, pixels: torch.Tensor) -> torch.Tensor:
        return self(self(pixels))


class Slotted:
    __slots__ = ("by",)

    def __init__(self, by: float) -> None:
        self.by = by


def halve(pixels: torch.Tensor) -> torch.Tensor:
    return pixels / 2


def scaled(by: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda pixels: pixels * by


def seeded_convolution(seed: int) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1))


MADE_ANEW: dict[str, Callable[[], Any]] = {
    "open_clip's": lambda: open_clip.image_transform(32, is_train=False),
    "an object": lambda: Shift(0.5),
    "a bound method": lambda: Shift(0.5).twice,
    "a closure": lambda: scaled(2.0),
    "an object with slots": lambda: Slotted(2.0),
    "a module with weights": lambda: seeded_convolution(1),
}


@pytest.mark.parametrize("kind", MADE_ANEW)
def test_equal_steps_have_one_key(kind: str) -> None:
    first, second = MADE_ANEW[kind](), MADE_ANEW[kind]()
    assert first is not second and key(first) == key(second)


def test_a_list_and_a_tuple_of_the_same_numbers_have_one_key() -> None:
    assert key(transforms.Normalize([0.5], [0.2])) == key(transforms.Normalize((0.5,), (0.2,)))


def test_what_changes_an_image_changes_the_key() -> None:
    """All of these are different preparations, although the type or the name of some is the same."""
    mean, other = (0.5, 0.5, 0.5), (0.5, 0.5, 0.4)
    steps = [
        open_clip.image_transform(32, is_train=False),
        open_clip.image_transform(24, is_train=False),
        open_clip.image_transform(32, is_train=False, mean=mean),
        open_clip.image_transform(32, is_train=False, mean=other),
        open_clip.image_transform(32, is_train=False, interpolation="bilinear"),
        open_clip.image_transform(32, is_train=False, resize_mode="squash"),
        open_clip.image_transform(32, is_train=False, resize_mode="longest"),
        transforms.Compose([transforms.RandomResizedCrop(32, scale=(0.5, 1)), transforms.RandomHorizontalFlip()]),
        transforms.Compose([transforms.RandomResizedCrop(32, scale=(0.6, 1)), transforms.RandomHorizontalFlip()]),
        transforms.Compose([transforms.RandomHorizontalFlip(), transforms.RandomResizedCrop(32, scale=(0.5, 1))]),
        transforms.Compose([transforms.RandomResizedCrop(32, scale=(0.5, 1)), transforms.RandomHorizontalFlip(0.1)]),
        transforms.RandomApply(torch.nn.ModuleList([transforms.ColorJitter(0.1)])),
        transforms.RandomApply(torch.nn.ModuleList([transforms.ColorJitter(0.2)])),
        v2.ToDtype(torch.float32),
        v2.ToDtype(torch.float16),
        seeded_convolution(1),
        seeded_convolution(2),
        functional.to_tensor,
        functional.hflip,
        functools.partial(functional.rotate, angle=5),
        functools.partial(functional.rotate, angle=6),
        lambda pixels: pixels + 1,
        lambda pixels: pixels + 2,
        lambda pixels: pixels.round(),
        lambda pixels: pixels.floor(),
        lambda pixels, by=1: pixels + by,
        lambda pixels, by=2: pixels + by,
        scaled(2.0),
        scaled(3.0),
        halve,
        Shift(0.5),
        Shift(0.6),
        Shift(0.5).twice,
        Slotted(1.0),
        Slotted(2.0),
        Image.new("RGB", (1, 1), "red"),
        Image.new("RGB", (1, 1), "blue"),
        None,
    ]
    keys = [key(step) for step in steps]
    assert len(set(keys)) == len(steps)


def test_a_users_code_is_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook or script may define another step under the name of the former one."""
    before = key(Shift(0.5))
    monkeypatch.setattr(Shift, "__call__", lambda self, pixels: pixels - self.by)
    edited = key(Shift(0.5))
    monkeypatch.undo()
    monkeypatch.setattr(Shift, "scale", 2.0)
    assert len({before, edited, key(Shift(0.5))}) == 3


def test_dassls_steps_are_described_by_their_parameters() -> None:
    from dassl.data.transforms.transforms import Random2DTranslation

    first, same, other = Random2DTranslation(32, 32), Random2DTranslation(32, 32), Random2DTranslation(32, 32, p=0.1)
    assert repr(first) != repr(same)  # an address
    assert key(first) == key(same) != key(other)
    assert describe(first)["type"] == "dassl.data.transforms.transforms.Random2DTranslation"


def test_a_step_that_holds_itself_ends() -> None:
    step = Shift(0.5)
    step.by = step  # type: ignore[assignment]
    assert describe(step)["attributes"]["by"] == {"parent": 1}


SCRIPT = """
import open_clip, torchvision
from air_plugin.clip.preparation import describe
from air_plugin.utils.store import key_of

def convert(image):
    return image.convert("RGB") if image.mode in {"L", "P", "RGBA", "CMYK"} else image

class Brighten:
    modes = {"RGB", "RGBA", "L"}
    def __call__(self, image):
        return image.point(lambda value: value + 1)

prepare = open_clip.image_transform(32, is_train=False)
steps = [prepare, convert, lambda x: x, Brighten(), torchvision.transforms.functional.hflip]
print(key_of({"steps": describe(torchvision.transforms.Compose(steps))}))
"""


@pytest.mark.full
def test_two_processes_have_one_key(capsys: pytest.CaptureFixture[str]) -> None:
    """Addresses and the order of sets differ between processes; features must be found again."""
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(ROOT)}
    other = subprocess.check_output([sys.executable, "-c", SCRIPT], text=True, env=environment)
    exec(SCRIPT, {"__name__": "__main__"})
    assert capsys.readouterr().out == other and len(other.strip()) == 16
