"""Sums over shards: their order, workers in other processes, images on disk, and memory."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sources import ROOT
from torch import Tensor

from air_plugin.clip.images_on_disk import ImagesOnDisk
from air_plugin.engine import LocalEngine
from air_plugin.functional.em import Refined, refine, refine_shards
from air_plugin.functional.gaussian import Gaussians, fit_gaussians
from air_plugin.functional.shards import ShardMap, Sums, add_up, cut, in_this_process
from air_plugin.utils.tables import Table
from air_plugin.utils.tensors import save_tensors

C, D, N = 5, 12, 300


def unit(values: Tensor) -> Tensor:
    return torch.nn.functional.normalize(values, dim=-1)


@pytest.fixture
def images(tmp_path: Path) -> ImagesOnDisk:
    """Of two views, on disk; the second one holds other numbers."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(C, (N,), generator=rng)
    plain = unit(torch.eye(C, D)[labels] + 0.4 * torch.randn(N, D, generator=rng))
    save_tensors(tmp_path / "features.safetensors", {"features": torch.stack([plain, plain.roll(1, dims=0)], dim=1)})
    texts = unit(torch.eye(C, D) + 0.3 * torch.randn(C, D, generator=rng))
    return ImagesOnDisk.open(tmp_path / "features.safetensors", texts, logit_scale=5.0)


@pytest.fixture
def prior() -> Gaussians:
    rng = torch.Generator().manual_seed(1)
    labels = torch.arange(C).repeat_interleave(8)
    generated = unit(torch.eye(C, D)[labels] + 0.2 + 0.4 * torch.randn(len(labels), D, generator=rng))
    return fit_gaussians(generated, labels, classes=C)


def numbers(result: Refined) -> list[Tensor]:
    strength = torch.tensor([result.prior_strength, result.iterations], dtype=torch.float64)
    return [result.model.mean, result.model.covariance, result.model.counts, result.soft_counts, strength]


def same(one: Refined, other: Refined) -> bool:
    return all(torch.equal(*pair) for pair in zip(numbers(one), numbers(other), strict=True))


# The order


class Backwards:
    """A `ShardMap` whose last shard is finished first."""

    def __call__(
        self, setup: Callable[[], Any], work: Callable[[Any, range], Any], units: Sequence[range], /
    ) -> Iterator[tuple[int, Any]]:
        yield from reversed(list(in_this_process(setup, work, units)))


def test_every_image_is_in_one_shard():
    for images in (1, 6, 7, 8, 20):
        shards = cut(images, 7)
        assert [image for shard in shards for image in shard] == list(range(images))
        assert all(len(shard) == 7 for shard in shards[:-1])


def test_shards_are_added_in_their_order_whichever_is_first():
    values = [1e16, 1.0, -1e16, 1.0]  # any other order has another sum
    for map_shards in (in_this_process, Backwards()):
        (total,) = add_up(
            lambda: np.array(values),
            lambda state, unit: [state[unit.start : unit.stop]],
            cut(4, 1),
            map_shards=map_shards,
        )
        assert total.tolist() == [((1e16 + 1.0) - 1e16) + 1.0]


def test_a_shard_without_a_result_is_noticed():
    def forgetful(setup, work, units, /):
        return [result for result in in_this_process(setup, work, units) if result[0] != 1]

    with pytest.raises(RuntimeError, match="shard 1 of 3 has no result"):
        add_up(lambda: None, lambda state, unit: [np.zeros(1)], cut(3, 1), map_shards=forgetful)


# EM


@pytest.mark.parametrize("with_prior", [True, False])
def test_em_over_shards_on_disk_is_em_in_memory(images: ImagesOnDisk, prior: Gaussians, with_prior: bool):
    features = torch.from_numpy(np.array(images.table.rows(0, N)))[:, 0]
    probs = (5.0 * features @ torch.tensor(images.texts).T).softmax(dim=1)
    first = prior if with_prior else None
    whole = refine(features, probs, prior=first)
    parts = refine_shards(images, prior=first, shard=64, chunk=10)
    assert whole.iterations == parts.iterations > 2
    for one, other in zip(numbers(whole), numbers(parts), strict=True):
        assert torch.allclose(one, other, rtol=1e-6, atol=1e-9)
    assert same(refine_shards(images, prior=first), whole)  # one shard


def test_the_size_of_a_shard_is_used(images: ImagesOnDisk, prior: Gaussians):
    seen = []

    def mapping(setup, work, units, /):
        seen.append([len(unit) for unit in units])
        return in_this_process(setup, work, units)

    refine_shards(images, prior=prior, shard=128, iterations=2, map_shards=mapping)
    assert seen == [[128, 128, 44]] * 3  # the second moment, and two E steps


@pytest.mark.parametrize("workers", [2, 3])
def test_the_bits_do_not_depend_on_the_number_of_workers(images: ImagesOnDisk, prior: Gaussians, workers: int):
    def sums(map_shards: ShardMap) -> list[Tensor]:
        return Sums(images, chunk=20, shard=50, map_shards=map_shards).expect("sums", prior.head(), 0.5)

    alone = sums(in_this_process)
    for map_shards in (Backwards(), partial(LocalEngine().map, workers=workers)):
        assert all(torch.equal(*pair) for pair in zip(sums(map_shards), alone, strict=True))


def test_a_worker_receives_places_not_features(images: ImagesOnDisk):
    large = ImagesOnDisk(Table(images.table.path, (10**9, 1, D), "float32", 0), images.texts, 1.0)
    assert len(pickle.dumps(large)) < 2000
    assert len(large) == 10**9 and large.classes == C


# Memory

MEMORY = """
import sys, torch
from air_plugin.clip.images_on_disk import ImagesOnDisk
from air_plugin.functional.em import refine_shards
from air_plugin.utils.tensors import load_tensors
from benchmarks.scaling import peak_of_this_process

torch.set_num_threads(1)
images = ImagesOnDisk.open(sys.argv[1], torch.eye(4, 64), logit_scale=5.0)
refine_shards(images, prior=None, iterations=1, shard=5000, chunk=1000)  # of libraries
before = peak_of_this_process()
refine_shards(images, prior=None, iterations=2, tolerance=0, shard=5000, chunk=1000)
print(1024 * (peak_of_this_process() - before))
load_tensors(images.table.path)
print(1024 * (peak_of_this_process() - before))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak is that of the parent process")
def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path):
    features = unit(torch.randn(600_000, 64, generator=torch.Generator().manual_seed(0)))  # 146 MiB
    save_tensors(tmp_path / "features.safetensors", {"features": features})
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "features.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    shards, whole = map(float, done.stdout.split())
    assert shards < 30 and whole > 140  # MiB
