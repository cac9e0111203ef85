"""Features by several workers: the same files, whoever encodes a chunk; tests/integration/test_ray.py has Ray."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import units_of_work as of_work
from small_models import make_clip, write_pictures
from torchvision import transforms

from air_plugin.clip import features as features_module
from air_plugin.clip import spread
from air_plugin.clip.backbone import Backbone
from air_plugin.clip.encoding import Chunk
from air_plugin.clip.features import extract_features
from air_plugin.clip.loading import load_backbone
from air_plugin.utils.errors import UserError
from air_plugin.utils.progress import Event
from air_plugin.utils.store import Store

AUGMENT = transforms.Compose([transforms.RandomResizedCrop(32), transforms.ToTensor()])


@pytest.fixture(scope="module")
def mini() -> Backbone:
    return load_backbone("mini")


@pytest.fixture
def extract(mini: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., bytes]:
    """The table that a number of workers makes, as bytes; chunks of 4 images in batches of 2."""
    monkeypatch.setattr(features_module, "CHUNK", 4)
    paths = write_pictures(tmp_path / "pictures", 11)

    def run(name: str, workers: int, backbone: Backbone = mini, **options: Any) -> bytes:
        monkeypatch.setenv("WORKERS", str(workers))
        options = {"views": 2, "augment": AUGMENT, "batch_size": 2} | options
        table, cached = extract_features(backbone, paths, store=Store(tmp_path / name), **options)
        assert not cached and table.path is not None and len(table) == 11
        return table.path.read_bytes()

    return run


def test_two_workers_one_of_them_killed_write_the_same_table(
    extract: Callable[..., bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    alone = extract("alone", 1)
    monkeypatch.setattr(spread, "encode_chunk", of_work.encode_and_die_once)
    assert extract("two", 2) == alone
    assert caplog.messages and all("another one does it again" in message for message in caplog.messages)
    features = tmp_path / "two" / "features"
    assert (features / "died").exists()
    begun = (features / "encoded").read_text().split("\n")[:-1]
    starts = [int(line.split()[0]) for line in begun]
    assert set(starts) == {0, 4, 8} and len(starts) == 3 + len(caplog.messages)
    again = [line for line in begun if line.endswith("True")]
    assert len(again) == len(caplog.messages)  # its file was there, and was not made again
    assert not list(features.rglob("chunk-*"))


def test_an_interrupted_extraction_leaves_only_missing_chunks_to_the_workers(
    extract: Callable[..., bytes], mini: Backbone, monkeypatch: pytest.MonkeyPatch
):
    alone = extract("alone", 1)
    encode, chunks = Backbone.encode_images, []

    def break_down(backbone: Backbone, pixels: torch.Tensor) -> torch.Tensor:
        chunks.append(len(pixels))
        if len(chunks) == 3:
            raise RuntimeError("power cut")
        return encode(backbone, pixels)

    with monkeypatch.context() as patch:
        patch.setattr(Backbone, "encode_images", break_down)
        with pytest.raises(RuntimeError, match="power cut"):
            extract("cut", 1)
    given: list[int] = []
    work = spread.chosen().map

    def seen(setup: Any, do: Any, units: Any, **options: Any) -> Any:
        given.extend(chunk.start for chunk in units)
        return work(setup, do, units, **options)

    monkeypatch.setattr(spread, "chosen", lambda: Engine(seen))
    assert extract("cut", 2) == alone
    assert given == [4, 8]


class Engine:
    """The local engine with another `map`."""

    name = "local"

    def __init__(self, mapping: Callable[..., Any]) -> None:
        self.map = mapping

    def gpus(self) -> float:
        return 0.0


def refuse(*arguments: Any, **options: Any) -> Any:
    raise AssertionError("work was spread")


def test_what_workers_cannot_make_is_encoded_by_this_process(
    extract: Callable[..., bytes], mini: Backbone, monkeypatch: pytest.MonkeyPatch
):
    alone = extract("alone", 1)
    monkeypatch.setattr(spread, "chosen", lambda: Engine(refuse))
    assert extract("no precision", 2, replace(mini, precision=None)) == alone
    local = transforms.Compose([*AUGMENT.transforms, lambda pixels: pixels])
    extract("lambda", 2, augment=local)
    monkeypatch.setattr(features_module, "CHUNK", 11)
    extract("a single chunk", 2, batch_size=11)
    with pytest.raises(AssertionError, match="work was spread"):
        monkeypatch.setattr(features_module, "CHUNK", 4)
        extract("two", 2)


def test_unreadable_images_are_named_in_their_order(
    extract: Callable[..., bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    alone = extract("alone", 1)
    pictures = sorted((tmp_path / "pictures").iterdir())
    whole = {number: pictures[number].read_bytes() for number in (1, 9)}
    for number in whole:
        pictures[number].write_text("no image")
    with pytest.raises(UserError) as caught:
        extract("two", 2)
    message = str(caught.value)
    assert 0 <= message.find(str(pictures[1])) < message.find(str(pictures[9]))
    assert "(and 1 more" in message and "\n" not in message
    for number, data in whole.items():
        pictures[number].write_bytes(data)
    assert extract("two", 2) == alone


def test_another_backbone_on_a_worker_is_refused(extract: Callable[..., bytes], mini: Backbone):
    with pytest.raises(UserError, match=r"^backbone 'mini' has other weights on a worker's machine than on this one$"):
        extract("other", 2, replace(mini, model=make_clip()))


def test_an_image_is_counted_once_in_the_progress():
    moved: list[int] = []
    meter = spread.Meter([Chunk(0, ["a"] * 4, Path("0")), Chunk(4, ["b"] * 3, Path("4"))], moved.append)
    for index, done in ((0, 2), (1, 2), (0, 2), (0, 4)):  # the worker of 0 was lost, and began again
        meter.move(index, Event("features", done, 4))
    meter.finish(0)
    meter.finish(1)
    assert moved == [2, 2, 2, 0, 1] and sum(moved) == 7


def test_a_worker_has_the_drivers_autocast_and_device(mini: Backbone, tmp_path: Path):
    recipe = spread.Recipe("mini", "fp32", mini.fingerprint, torch.bfloat16, "cpu", None, 2, 0)  # type: ignore[arg-type]
    place = spread.set_up(recipe)
    assert place.backbone.autocast is torch.bfloat16 and place.backbone.device.type == "cpu"
