"""Feature tables: what is in them, when they are made again, and what an interruption costs."""

from __future__ import annotations

import dataclasses
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import make_backbone, write_pictures
from torch import Tensor
from torchvision.transforms import Compose

from air_plugin.clip import encoding
from air_plugin.clip import features as features_module
from air_plugin.clip.backbone import Backbone
from air_plugin.clip.features import FeatureTable, extract_features
from air_plugin.utils import store as store_module
from air_plugin.utils.errors import UserError
from air_plugin.utils.images import load_rgb
from air_plugin.utils.progress import Progress
from air_plugin.utils.seeding import stable_seed
from air_plugin.utils.store import Store

# FeatureTable


def numbered_table(images: int, views: int) -> FeatureTable:
    """Entry (i, v) is [i, v]."""
    grid = torch.cartesian_prod(torch.arange(images), torch.arange(views)).float()
    return FeatureTable(grid.reshape(images, views, 2))


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_plain_is_the_first_view():
    assert numbered_table(3, 4).plain.tolist() == [[0, 0], [1, 0], [2, 0]]
    assert len(numbered_table(3, 4)) == 3


@pytest.mark.parametrize("count", [1, 2, 3])
def test_sample_gives_different_augmented_views_of_the_asked_images(count: int):
    index = torch.tensor([4, 0, 4, 2] * 20)
    sampled = numbered_table(5, 5).sample(index, generator=rng(), count=count)
    assert sampled.shape == (count, 80, 2)
    assert torch.equal(sampled[:, :, 0], index.float().expand(count, -1))
    views = sampled[:, :, 1].T.tolist()
    assert all(len(set(row)) == count and 0 not in row for row in views)
    assert {view for row in views for view in row} == {1, 2, 3, 4}
    assert len({tuple(row) for row in views}) > 3  # images draw independently


def test_sample_depends_on_the_generator_alone():
    table, index = numbered_table(5, 5), torch.arange(5)
    first = table.sample(index, generator=rng(1), count=2)
    torch.manual_seed(5)
    assert torch.equal(table.sample(index, generator=rng(1), count=2), first)
    assert not torch.equal(table.sample(index, generator=rng(2), count=2), first)


def test_sample_makes_do_with_too_few_views():
    one = numbered_table(3, 1).sample(torch.tensor([2, 1]), generator=rng(), count=2)
    assert one.tolist() == [[[2, 0], [1, 0]]] * 2
    two = numbered_table(3, 2).sample(torch.tensor([2, 1]), generator=rng(), count=2)
    assert sorted(two[:, 0, 1].tolist()) == sorted(two[:, 1, 1].tolist()) == [0, 1]
    assert numbered_table(3, 2).sample(torch.tensor([2]), generator=rng()).tolist() == [[[2, 1]]]


# extract_features


class Calls:
    """Counts the images that a backbone encodes, and breaks down where it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.images: list[int] = []
        self.break_at: int | None = None
        encode = Backbone.encode_images

        def counting(backbone: Backbone, pixels: Tensor) -> Tensor:
            if len(self.images) == self.break_at:
                raise RuntimeError("power cut")
            self.images.append(len(pixels))
            return encode(backbone, pixels)

        monkeypatch.setattr(Backbone, "encode_images", counting)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


def shaken(image: Image.Image) -> Tensor:
    """A random augmentation."""
    pixels = torch.from_numpy(np.asarray(image.resize((16, 16))).copy()).permute(2, 0, 1) / 255
    return pixels + torch.randn(3, 1, 1)


def test_table_equals_encoding_one_image_after_the_other(tiny_backbone: Backbone, store: Store, pictures: list[str]):
    table, _ = extract_features(tiny_backbone, pictures, store=store)
    assert table.features.shape == (7, 1, 24)
    for path, row in zip(pictures, table.plain, strict=True):
        alone = tiny_backbone.encode_images(tiny_backbone.preprocess(load_rgb(path))[None])[0]
        assert torch.allclose(row, alone, atol=1e-6)
    assert (table.plain[0] - table.plain[1]).abs().max() > 0.01


def test_a_table_of_many_chunks_that_is_mapped_is_the_same(
    tiny_backbone: Backbone, tmp_path: Path, pictures: list[str], monkeypatch: pytest.MonkeyPatch
):
    options = {"views": 3, "augment": shaken, "batch_size": 2}
    plain, _ = extract_features(tiny_backbone, pictures, store=Store(tmp_path / "one"), **options)
    monkeypatch.setattr(features_module, "CHUNK", 2)
    monkeypatch.setattr(store_module, "LARGE", 0)
    for cached in (False, True):
        table, found = extract_features(tiny_backbone, pictures, store=Store(tmp_path / "two"), **options)
        assert found is cached and torch.equal(table.features, plain.features)
        assert table.path == next((tmp_path / "two").glob("features/*/features.safetensors"))
    index = torch.tensor([3, 0])
    assert torch.equal(*(part.sample(index, generator=rng(), count=2) for part in (table, plain)))
    files = [next((tmp_path / name).glob("features/*/features.safetensors")).read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]


def test_views_are_augmented_and_the_first_is_not(tiny_backbone: Backbone, store: Store, pictures: list[str]):
    plain, _ = extract_features(tiny_backbone, pictures, store=store)
    table, _ = extract_features(tiny_backbone, pictures, store=store, views=3, augment=shaken, batch_size=2)
    assert torch.allclose(table.plain, plain.plain, atol=1e-6)
    for path, number in ((pictures[0], 0), (pictures[5], 5)):
        for view in (1, 2):
            torch.manual_seed(stable_seed(0, number, view))
            alone = tiny_backbone.encode_images(shaken(load_rgb(path))[None])[0]
            assert torch.allclose(table.features[number, view], alone, atol=1e-6)


def test_global_randomness_is_neither_used_nor_changed(tiny_backbone: Backbone, tmp_path: Path, pictures: list[str]):
    tables = []
    for name in ("one", "two"):
        torch.manual_seed(len(tables))
        state = torch.random.get_rng_state()
        table, _ = extract_features(
            tiny_backbone, pictures, store=Store(tmp_path / name), views=3, augment=shaken, workers=len(tables)
        )
        assert torch.equal(torch.random.get_rng_state(), state)
        tables.append(table.features)
    assert torch.equal(*tables)


def test_second_time_comes_from_the_store(
    tiny_backbone: Backbone, store: Store, pictures: list[str], calls: Calls, tmp_path: Path
):
    first, cached = extract_features(tiny_backbone, pictures, store=store)
    assert not cached and sum(calls.images) == 7
    elsewhere = [shutil.copyfile(path, tmp_path / f"moved-{Path(path).name}") for path in pictures]
    second, cached = extract_features(tiny_backbone, elsewhere, store=store)
    assert cached and sum(calls.images) == 7
    assert torch.equal(first.features, second.features)


def test_whatever_decides_the_features_makes_another_table(
    tiny_backbone: Backbone, store: Store, pictures: list[str], tmp_path: Path
):
    def is_cached(backbone: Backbone = tiny_backbone, paths: list[str] = pictures, **options) -> bool:
        return extract_features(backbone, paths, store=store, **options)[1]

    assert not is_cached() and is_cached() and is_cached(seed=1)  # nothing is random in a single view
    assert not is_cached(make_backbone(seed=1))
    assert not is_cached(paths=pictures[::-1])
    assert not is_cached(paths=pictures[:-1])
    views = {"views": 2, "augment": shaken}
    assert not is_cached(**views) and is_cached(**views)
    assert not is_cached(**views, seed=1)
    assert not is_cached(views=3, augment=shaken)
    Image.new("RGB", (20, 18)).save(pictures[3])
    assert not is_cached()


def test_batch_size_changes_rounding_at_the_most(tiny_backbone: Backbone, tmp_path: Path, pictures: list[str]):
    tables = [
        extract_features(tiny_backbone, pictures, store=Store(tmp_path / str(size)), batch_size=size)[0].features
        for size in (1, 3, 100)
    ]
    assert torch.allclose(tables[0], tables[1], atol=1e-5) and torch.allclose(tables[0], tables[2], atol=1e-5)


def test_an_interrupted_run_goes_on_where_it_was(
    tiny_backbone: Backbone, tmp_path: Path, pictures: list[str], calls: Calls, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(features_module, "CHUNK", 2)
    whole, _ = extract_features(tiny_backbone, pictures, store=Store(tmp_path / "whole"), batch_size=2)
    assert calls.images == [2, 2, 2, 1]
    calls.images.clear()
    calls.break_at = 2
    with pytest.raises(RuntimeError, match="power cut"):
        extract_features(tiny_backbone, pictures, store=Store(tmp_path / "cut"), batch_size=2)
    calls.break_at = None
    calls.images.clear()
    resumed, cached = extract_features(tiny_backbone, pictures, store=Store(tmp_path / "cut"), batch_size=2)
    assert not cached and calls.images == [2, 1]
    assert torch.equal(resumed.features, whole.features)
    left = {path.name for path in (tmp_path / "cut").rglob("*") if path.is_file()}
    assert left == {"features.safetensors", "entry.json", "digests.sqlite"} | {
        name for name in left if name.endswith(".lock")
    }


def test_an_interrupted_run_may_go_on_with_another_batch_size(
    tiny_backbone: Backbone, tmp_path: Path, pictures: list[str], calls: Calls, monkeypatch: pytest.MonkeyPatch
):
    whole, _ = extract_features(tiny_backbone, pictures, store=Store(tmp_path / "whole"))
    monkeypatch.setattr(features_module, "CHUNK", 2)
    for first, second in ((2, 3), (3, 2)):
        store = Store(tmp_path / f"cut{first}")
        calls.images.clear()
        calls.break_at = 1
        with pytest.raises(RuntimeError, match="power cut"):
            extract_features(tiny_backbone, pictures, store=store, batch_size=first)
        calls.break_at = None
        resumed, _ = extract_features(tiny_backbone, pictures, store=store, batch_size=second)
        assert resumed.features.shape == whole.features.shape
        assert torch.allclose(resumed.features, whole.features, atol=1e-5)


def test_a_preparation_with_an_address_in_its_repr_is_found_again(
    tiny_backbone: Backbone, store: Store, pictures: list[str]
):
    """open_clip 3.0 to 3.2 have a function among the steps, whose repr differs from process to process."""

    def prepared(side: int) -> Backbone:
        def convert(image: Image.Image) -> Image.Image:
            return image.resize((side, side))

        return dataclasses.replace(tiny_backbone, preprocess=Compose([convert, *tiny_backbone.preprocess.transforms]))

    first, second = prepared(4), prepared(4)
    assert repr(first.preprocess) != repr(second.preprocess)
    table, _ = extract_features(first, pictures, store=store)
    found, cached = extract_features(second, pictures, store=store)
    assert cached and torch.equal(found.features, table.features)
    _, cached = extract_features(prepared(5), pictures, store=store)
    assert not cached


def test_a_damaged_table_is_thrown_away_and_made_again(
    tiny_backbone: Backbone, store: Store, pictures: list[str], caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, logger="air_plugin")
    first, _ = extract_features(tiny_backbone, pictures, store=store)
    (path,) = store.root.rglob("features.safetensors")
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))
    second, cached = extract_features(tiny_backbone, pictures, store=store)
    assert caplog.messages == [
        f"cache: {path.parent} is thrown away and made again: "
        "the content of features.safetensors does not match its key"
    ]
    assert not cached and torch.equal(first.features, second.features)


def test_a_damaged_chunk_is_made_again(
    tiny_backbone: Backbone, store: Store, pictures: list[str], calls: Calls, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(features_module, "CHUNK", 2)
    calls.break_at = 3
    with pytest.raises(RuntimeError, match="power cut"):
        extract_features(tiny_backbone, pictures, store=store, batch_size=2)
    chunks = sorted(store.root.rglob("chunk-*.safetensors"))
    assert len(chunks) == 3
    chunks[1].write_bytes(chunks[1].read_bytes()[:-5])
    calls.break_at = None
    calls.images.clear()
    table, _ = extract_features(tiny_backbone, pictures, store=store, batch_size=2)
    assert calls.images == [2, 1]
    again, _ = extract_features(tiny_backbone, pictures, store=Store(store.root / "new"), batch_size=2)
    assert torch.equal(table.features, again.features)


def test_unreadable_images_are_named_and_cost_nothing_once_repaired(
    tiny_backbone: Backbone, store: Store, pictures: list[str]
):
    whole = Path(pictures[2]).read_bytes()
    Path(pictures[2]).write_bytes(whole[:60])
    Path(pictures[5]).write_text("no image")
    with pytest.raises(UserError) as raised:
        extract_features(tiny_backbone, pictures, store=store, batch_size=2)
    message = str(raised.value)
    assert pictures[2] in message and pictures[5] in message and pictures[3] not in message and "\n" not in message
    write_pictures(Path(pictures[0]).parent, 7)
    table, cached = extract_features(tiny_backbone, pictures, store=store, batch_size=2)
    assert not cached and len(table) == 7


def test_a_missing_image_is_named(tiny_backbone: Backbone, store: Store, pictures: list[str]):
    with pytest.raises(UserError, match=r"nowhere\.png"):
        extract_features(tiny_backbone, [*pictures, "nowhere.png"], store=store)


def test_stable_seed_is_the_same_everywhere():
    assert stable_seed("image", 3, "dog", 0) == 7315728664826406896
    seeds = {stable_seed(*parts) for parts in ((1, 2), (2, 1), (12,), ("1/2", 3), (1, 23))}
    assert len(seeds) == 5 and all(0 <= seed < 2**63 for seed in seeds)


# The order of the work


def test_progress_moves_with_every_batch(
    tiny_backbone: Backbone, store: Store, pictures: list[str], monkeypatch: pytest.MonkeyPatch
):
    moves: list[tuple[str, int]] = []

    class Recorded(Progress):
        def skip(self, count: int) -> None:
            moves.append(("skip", count))

        def update(self, count: int) -> None:
            moves.append(("update", count))

    monkeypatch.setattr(features_module, "Progress", Recorded)
    monkeypatch.setattr(features_module, "CHUNK", 4)
    extract_features(tiny_backbone, pictures, store=store, batch_size=2)
    assert moves == [("skip", 0), ("update", 2), ("update", 2), ("update", 2), ("update", 1)]


class FakeGpu:
    """Stands for the copies to and from a GPU, and records the order of uploads, encodings and waits."""

    overlaps = True

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[str, int]] = []
        encode = Backbone.encode_images

        def recorded(backbone: Backbone, pixels: Tensor) -> Tensor:
            self.events.append(("encode", len(pixels)))
            return encode(backbone, pixels)

        def begin_download(features: Tensor) -> Callable[[], Tensor]:
            def wait() -> Tensor:
                self.events.append(("wait", len(features)))
                return features

            return wait

        monkeypatch.setattr(encoding, "Upload", lambda device: self)
        monkeypatch.setattr(encoding, "begin_download", begin_download)
        monkeypatch.setattr(Backbone, "encode_images", recorded)

    def __call__(self, batch: Tensor) -> Tensor:
        self.events.append(("upload", len(batch)))
        return batch

    def borrow(self, batch: Tensor) -> None:
        self.events.append(("borrow", len(batch)))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_gpu_has_a_batch_more_while_results_are_awaited(
    tiny_backbone: Backbone, tmp_path: Path, pictures: list[str], monkeypatch: pytest.MonkeyPatch, workers: int
):
    options = {"batch_size": 2, "views": 3, "augment": shaken}
    plain, _ = extract_features(tiny_backbone, pictures, store=Store(tmp_path / "plain"), **options)
    monkeypatch.setattr(features_module, "CHUNK", 4)
    gpu = FakeGpu(monkeypatch)
    table, _ = extract_features(tiny_backbone, pictures, store=Store(tmp_path / "gpu"), workers=workers, **options)
    assert torch.equal(table.features, plain.features)
    on_device = [event for event in gpu.events if event[0] in ("encode", "wait")]
    assert on_device == [
        *(("encode", 6), ("encode", 6), ("wait", 2), ("encode", 6), ("wait", 2), ("encode", 3), ("wait", 2)),
        ("wait", 1),
    ]
    for copies in ("upload", "borrow"):
        assert [count for event, count in gpu.events if event == copies] == [2, 2, 2, 1]


# Workers


def killing(image: Image.Image) -> Tensor:
    """Kills its process at an image that is black."""
    if not np.asarray(image).any():
        os.kill(os.getpid(), signal.SIGKILL)
    return shaken(image)


@pytest.mark.public_reports
@pytest.mark.parametrize("overlaps", [False, True])
def test_a_killed_worker_costs_no_finished_work(
    tiny_backbone: Backbone,
    store: Store,
    pictures: list[str],
    calls: Calls,
    monkeypatch: pytest.MonkeyPatch,
    overlaps: bool,
):
    """Item 13 of the public reports; on a GPU, whose results are awaited a batch later, as well."""
    if overlaps:
        FakeGpu(monkeypatch)
    monkeypatch.setattr(features_module, "CHUNK", 2)
    options = {"store": store, "views": 2, "augment": killing, "batch_size": 2, "workers": 2}
    whole = Path(pictures[5]).read_bytes()
    Image.new("RGB", (20, 18)).save(pictures[5])
    for _ in range(2):
        with pytest.raises(UserError, match=r"killed by signal 9.*finished work is kept"):
            extract_features(tiny_backbone, pictures, **options)
    assert sum(calls.images) == 2 * 4  # two views of two finished chunks, encoded once
    Path(pictures[5]).write_bytes(whole)
    assert len(extract_features(tiny_backbone, pictures, **options)[0]) == 7


@pytest.mark.public_reports
@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_by_other_generators_is_reproducible_and_changes_none(
    tiny_backbone: Backbone, tmp_path: Path, pictures: list[str], workers: int
):
    """A sibling of item 23 of the public reports: Dassl's Random2DTranslation uses Python's `random`."""

    def moved(image: Image.Image) -> Tensor:
        return shaken(image).roll((random.randrange(16), int(np.random.randint(16))), dims=(1, 2))

    tables = []
    for attempt in range(2):
        random.seed(attempt)
        np.random.seed(attempt)
        torch.manual_seed(attempt)
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist()
        store = Store(tmp_path / f"{workers}-{attempt}")
        tables.append(
            extract_features(tiny_backbone, pictures, store=store, views=4, augment=moved, workers=workers)[0].features
        )
        assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist())
    assert torch.equal(*tables)
    assert len({tuple(row) for row in tables[0][:, 1:].flatten(0, 1).tolist()}) == 7 * 3


SMALL = """if True:
    import dataclasses, os, sys
    from pathlib import Path
    sys.path[:0] = sys.argv[1:3]
    import torch
    from small_models import make_backbone, write_pictures
    from torchvision.transforms import v2
    from air_plugin.clip.backbone import Backbone
    from air_plugin.clip.features import extract_features
    from air_plugin.utils.store import Store

    torch.set_num_threads(1)
    large = v2.Compose([v2.Resize((320, 320)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    encode = Backbone.encode_images
    Backbone.encode_images = lambda self, pixels: encode(self, pixels[..., 100:116, 100:116])
    backbone = dataclasses.replace(make_backbone(), preprocess=large)
    folder, tables = Path(sys.argv[3]), []
    pictures = write_pictures(folder / "pictures", 9)
    for workers in (0, 2):
        store = Store(folder / str(workers))
        options = dict(views=3, augment=large, batch_size=4, workers=workers)
        tables.append(extract_features(backbone, pictures, store=store, **options)[0].features)
    assert os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize == 64 * 1024
    assert torch.equal(*tables) and len(tables[0]) == 9
"""


@pytest.mark.public_reports
def test_workers_need_no_shared_memory(tmp_path: Path):
    """Item 13 of the public reports: /dev/shm holds 64 kB, less than one image of the three views."""
    small = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"', "sh"]
    if shutil.which("unshare") is None or subprocess.run([*small, "true"], capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    root = Path(__file__).resolve().parents[3]
    command = [sys.executable, "-c", SMALL, str(root), str(root / "tests"), str(tmp_path)]
    done = subprocess.run([*small, *command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
