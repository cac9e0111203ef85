"""The auxiliary classifier of images on disk: that of images in memory, and what an interruption costs."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_models import air_settings
from torch import Tensor

from air_plugin.auxiliary import shards as module
from air_plugin.auxiliary.classifier import AuxiliaryClassifier
from air_plugin.auxiliary.refinement import finalize
from air_plugin.auxiliary.shards import finalize_shards, refine_on_disk
from air_plugin.clip.images_on_disk import ImagesOnDisk
from air_plugin.engine import LocalEngine, Team
from air_plugin.functional.gaussian import Gaussians, fit_gaussians
from air_plugin.functional.shards import in_this_process
from air_plugin.utils.store import Store
from air_plugin.utils.tensors import save_tensors

C, M, D, N = 3, 20, 8, 100


def unit(values: Tensor) -> Tensor:
    return torch.nn.functional.normalize(values, dim=-1)


def near(labels: Tensor, *, seed: int) -> Tensor:
    noise = torch.randn(len(labels), D, generator=torch.Generator().manual_seed(seed))
    return unit(torch.eye(C, D)[labels] + 0.35 * noise)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD", 30)
    monkeypatch.setattr(module, "CHUNK", 8)
    monkeypatch.setattr(module, "SAMPLE", 40)


@pytest.fixture
def generated() -> Tensor:
    return unit(near(torch.arange(C).repeat_interleave(M), seed=0) + 0.3 * torch.eye(1, D)).unflatten(0, (C, M))


@pytest.fixture
def classifier(generated: Tensor) -> AuxiliaryClassifier:
    head = AuxiliaryClassifier.from_prototypes(generated[:, :4], scale=20.0)
    return replace(head, fusion_weight=0.7)


@pytest.fixture
def images(tmp_path: Path) -> ImagesOnDisk:
    features = near(torch.arange(N) % C, seed=1)
    save_tensors(tmp_path / "features.safetensors", {"features": features[:, None]})
    return ImagesOnDisk.open(tmp_path / "features.safetensors", unit(torch.eye(C, D) + 0.2), logit_scale=4.0)


@pytest.fixture
def prior(generated: Tensor) -> Gaussians:
    return fit_gaussians(generated.flatten(0, 1), torch.arange(C).repeat_interleave(M), classes=C)


def in_memory(images: ImagesOnDisk) -> dict[str, Tensor]:
    features = torch.from_numpy(np.array(images.table.rows(0, N)))[:, 0]
    return {"features": features, "probs": (4.0 * features @ torch.tensor(images.texts).T).softmax(dim=1)}


@pytest.mark.parametrize("auto", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        {"AUXILIARY": "cosine"},
        {"AUXILIARY": "gaussian"},
        {"AUXILIARY": "gaussian", "REFINE": "em"},
        {"AUXILIARY": "gaussian", "REFINE": "em", "PRIOR": "none"},
        {"AUXILIARY": "gaussian", "REFINE": "em", "PRIOR_STRENGTH": "data"},
    ],
)
def test_the_result_is_that_of_images_in_memory(
    classifier, generated, images, tmp_path: Path, monkeypatch, changes: dict[str, Any], auto: bool
):
    monkeypatch.setattr("air_plugin.functional.calibration.SAMPLE", 40)
    settings = air_settings(**changes)
    settings = replace(settings, weight=None) if auto else settings
    given = {"settings": settings}
    one, probs, metrics = finalize(classifier, generated, **in_memory(images), **given, store=Store(tmp_path / "one"))
    two, labels, others = finalize_shards(classifier, generated, images=images, **given, store=Store(tmp_path / "two"))
    assert torch.allclose(one.weight, two.weight, rtol=1e-5) and torch.allclose(one.bias, two.bias, rtol=1e-5)
    assert one.scale == pytest.approx(two.scale, rel=1e-6)
    assert one.fusion_weight == pytest.approx(two.fusion_weight, rel=1e-6)
    assert (one.fusion_weight != 0.7) is auto
    assert metrics.keys() == others.keys() and metrics["lambda"] == others["lambda"]
    confidence, classes = probs.max(dim=1)
    assert np.array_equal(labels.classes, classes.numpy()) and labels.classes.dtype == np.int32
    assert np.allclose(labels.confidence, confidence.numpy(), rtol=1e-5)


def test_images_that_the_filter_has_dropped_have_no_part(classifier, generated, images, tmp_path: Path):
    usable = torch.ones(C, M, dtype=torch.bool)
    usable[:, 0] = False
    given = {"settings": air_settings(AUXILIARY="gaussian", REFINE="em"), "usable": usable}
    one, _, _ = finalize(classifier, generated, **in_memory(images), **given, store=Store(tmp_path / "one"))
    two, *_ = finalize_shards(classifier, generated, images=images, **given, store=Store(tmp_path / "two"))
    assert torch.allclose(one.weight, two.weight, rtol=1e-5)
    three, *_ = finalize_shards(
        classifier, generated, images=images, settings=given["settings"], store=Store(tmp_path / "two")
    )
    assert not torch.allclose(two.weight, three.weight, rtol=1e-3)


def test_workers_in_other_processes_give_the_same(classifier, generated, images, store: Store):
    given = {"images": images, "settings": air_settings(AUXILIARY="cosine"), "store": store}
    _, labels, _ = finalize_shards(classifier, generated, **given)
    with Team(LocalEngine(), workers=2) as team:
        _, others, _ = finalize_shards(classifier, generated, **given, map_shards=team.map)
    assert np.array_equal(labels.classes, others.classes)
    assert np.allclose(labels.confidence, others.confidence, rtol=1e-6)  # their chunks have another size


def test_every_step_th_image_is_taken(images: ImagesOnDisk, tmp_path: Path):
    rows = torch.arange(3500.0)[:, None]
    save_tensors(tmp_path / "rows", {"features": torch.cat([torch.cos(rows), torch.sin(rows)], dim=1)})
    many = ImagesOnDisk.open(tmp_path / "rows", torch.eye(2), logit_scale=1.0)
    for step in (1, 3, 4000):
        assert torch.equal(many.every(step)[:, 0], torch.cos(rows[::step, 0]))


def test_an_interrupted_em_goes_on_after_the_last_finished_step(images: ImagesOnDisk, prior: Gaussians, tmp_path: Path):
    calls: list[str] = []

    def mapping(setup, work, units, /, *, until: int):
        calls.append(work.__name__)
        if len(calls) == until:
            raise KeyboardInterrupt
        return in_this_process(setup, work, units)

    whole = refine_on_disk(prior, images, store=Store(tmp_path / "one"))
    assert whole.iterations > 2
    with pytest.raises(KeyboardInterrupt):  # in the third step, after the second moment and two steps
        refine_on_disk(prior, images, store=Store(tmp_path / "two"), map_shards=partial(mapping, until=4))
    calls.clear()
    resumed = refine_on_disk(prior, images, store=Store(tmp_path / "two"), map_shards=partial(mapping, until=0))
    assert calls == ["sums"] * (whole.iterations - 2)
    assert torch.equal(whole.model.mean, resumed.model.mean) and torch.equal(whole.soft_counts, resumed.soft_counts)
    assert torch.equal(whole.model.covariance, resumed.model.covariance)
    (folder,) = (tmp_path / "two" / "refined").glob("*/")
    assert sorted(path.name for path in folder.iterdir()) == ["entry.json", "refined.safetensors"]
    calls.clear()
    refine_on_disk(prior, images, store=Store(tmp_path / "two"), map_shards=partial(mapping, until=0))
    assert not calls


def test_other_features_texts_or_priors_are_other_results(
    images: ImagesOnDisk, prior: Gaussians, store: Store, tmp_path: Path
):
    moved = replace(images, texts=np.roll(images.texts, 1, axis=0))
    warmer = replace(images, logit_scale=5.0)
    save_tensors(tmp_path / "other", {"features": near(torch.arange(N) % C, seed=2)[:, None]})
    other = replace(images, table=replace(images.table, path=tmp_path / "other"))
    for some in (images, moved, warmer, other):
        refine_on_disk(prior, some, store=store)
    refine_on_disk(None, images, store=store)
    assert len(list(store.root.glob("refined/*/entry.json"))) == 5
