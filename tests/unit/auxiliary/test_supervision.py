"""Labelled images in the auxiliary classifier: captions, EM and real prototypes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import air_settings, make_generator
from torch import Tensor

from air_plugin.auxiliary import stages
from air_plugin.auxiliary.build import build_auxiliary
from air_plugin.auxiliary.refinement import finalize, fit
from air_plugin.auxiliary.stages import adapt, cosine_classifier, prototypes_of_real_images
from air_plugin.auxiliary.supervision import Supervision
from air_plugin.clip.backbone import Backbone
from air_plugin.clip.features import FeatureTable
from air_plugin.clip.zero_shot import UnlabelledImages
from air_plugin.functional.em import refine
from air_plugin.utils.provenance import Stages
from air_plugin.utils.store import Store

NAMES = ["dog", "annual_crop land", "sea", "ship"]
UNSEEN = torch.tensor([1, 3])


def unit(*shape: int, seed: int) -> Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return made / made.norm(dim=-1, keepdim=True)


def some_probs(images: int, *, seed: int = 0) -> Tensor:
    return (2 * torch.randn(images, 4, generator=torch.Generator().manual_seed(seed))).softmax(dim=1)


def supervision(paths: list[str], *, size: int, classes: Tensor | None) -> Supervision:
    labels = torch.tensor([0, 2, 2, 0, 2][: len(paths)])
    return Supervision(paths, unit(len(paths), size, seed=9), labels, classes)


def test_an_unlabelled_image_has_only_classes_that_it_may_have():
    probs, given = some_probs(6), supervision(["a", "b"], size=3, classes=UNSEEN)
    for row, allowed in zip(probs.tolist(), given.allowed(probs).tolist(), strict=True):
        total = row[1] + row[3]
        assert allowed == pytest.approx([0, row[1] / total, 0, row[3] / total])
    assert supervision(["a"], size=3, classes=None).allowed(probs) is probs
    features, joined = given.joined(unit(6, 3, seed=1), probs)
    assert torch.equal(features[6:], given.features) and joined[6:].tolist() == [[1, 0, 0, 0], [0, 0, 1, 0]]
    assert torch.equal(joined[:6], given.allowed(probs))


@pytest.mark.parametrize("classes", [None, UNSEEN])
@pytest.mark.parametrize("kind", ["confident", "above_median", "all", "generic"])
def test_captions_are_true_of_labelled_images_and_possible_of_the_others(
    classes: Tensor | None, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    used: dict[str, str] = {}

    def train(generator: Any, paths: list[str], captions: list[str], **options: Any) -> tuple[Path, str, bool]:
        used.update(zip(paths, captions, strict=True))
        return tmp_path, "key", False

    monkeypatch.setattr(stages, "train_lora", train)
    probs, given = some_probs(12), supervision(["x0", "x1", "x2"], size=3, classes=classes)
    settings = air_settings(PROMPT="a photo of a {}.", **{"LORA.CAPTIONS": kind, "LORA.PER_CLASS": 2})
    paths = [f"u{i}" for i in range(12)]
    options = {"probs": probs, "settings": settings, "store": Store(tmp_path)}
    adapt(make_generator(), NAMES, paths, **options, supervision=given)
    spoken = {label: f"a photo of a {name}." for label, name in enumerate(["dog", "annual crop land", "sea", "ship"])}
    if kind == "generic":
        assert used == dict.fromkeys([*paths, "x0", "x1", "x2"], "a photo.")
        return
    assert [used[name] for name in ("x0", "x1", "x2")] == [spoken[0], spoken[2], spoken[2]]
    columns = range(4) if classes is None else classes.tolist()
    likely = {f"u{i}": spoken[max(columns, key=lambda c, row=row: row[c])] for i, row in enumerate(probs.tolist())}
    found = {path: caption for path, caption in used.items() if path in likely}
    assert found and found == {path: likely[path] for path in found}
    assert len(found) == 12 if kind == "all" else max(list(found.values()).count(c) for c in spoken.values()) <= 2


@pytest.mark.parametrize("classes", [None, UNSEEN])
def test_em_takes_labelled_images_as_certain(classes: Tensor | None, tiny_backbone: Backbone, tmp_path: Path):
    size = 8
    features, probs, generated = unit(30, size, seed=1), some_probs(30), unit(4, 6, size, seed=2)
    given = supervision([f"x{i}" for i in range(5)], size=size, classes=classes)
    settings = air_settings(AUXILIARY="gaussian", REFINE="em")
    images = UnlabelledImages([f"u{i}" for i in range(30)], FeatureTable(features[:, None]), probs)
    kept = torch.arange(2).expand(4, -1)
    head = cosine_classifier(
        stages.Prototypes(generated[:, :2], [[]] * 4, kept, generated), tiny_backbone, NAMES, settings=settings
    )
    classifier, posterior, metrics = finalize(
        head,
        generated,
        features=images.features,
        probs=probs,
        settings=settings,
        store=Store(tmp_path),
        supervision=given,
    )
    certain = torch.nn.functional.one_hot(given.labels, 4).float()
    possible = probs.clone()
    if classes is not None:
        possible[:, [0, 2]] = 0
        possible = possible / possible.sum(dim=1, keepdim=True)
    reference = refine(torch.cat([features, given.features]), torch.cat([possible, certain]), prior=fit(generated))
    weight, _ = reference.model.bias_corrected_head()
    assert torch.allclose(classifier.weight, weight.float(), atol=1e-4)
    assert metrics["soft_counts"] == [round(count, 1) for count in reference.soft_counts.tolist()]
    assert len(posterior) == 30
    if classes is not None:
        assert posterior[:, [0, 2]].max() < 1e-6  # of the unlabelled images
        assert reference.soft_counts[[0, 2]].tolist() == pytest.approx([2, 3])  # the labelled ones alone


def test_real_prototypes_are_labelled_images_first():
    features, probs = unit(20, 6, seed=1), some_probs(20)
    given = supervision([f"x{i}" for i in range(5)], size=6, classes=UNSEEN)
    images = UnlabelledImages([f"u{i}" for i in range(20)], FeatureTable(features[:, None]), probs)
    made = prototypes_of_real_images(images, settings=air_settings(M=3, K=2), supervision=given)
    names = [[path.name for path in row] for row in made.images]
    assert names[0][:2] == ["x0", "x3"] and names[2] == ["x1", "x2", "x4"]
    alone = given.allowed(probs)
    for c in (1, 3):
        own = [i for i in range(20) if int(alone[i].argmax()) == c]
        assert names[c] == [f"u{i}" for i in sorted(own, key=lambda i, c=c: (-float(alone[i, c]), i))[:3]]
    assert torch.equal(made.generated[2], given.features[[1, 2, 4]])


def test_without_labelled_images_every_key_of_the_store_is_as_before(
    tiny_backbone: Backbone, pictures: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """And with them the adapter, and what is made with it, has another one."""
    monkeypatch.setattr("air_plugin.auxiliary.build.load_generator", lambda *_, **__: make_generator())
    features, probs = unit(7, tiny_backbone.encode_texts(["a"]).shape[1], seed=3), some_probs(7)
    images = UnlabelledImages(pictures, FeatureTable(features[:, None]), probs)
    options = {"settings": air_settings(), "store": Store(tmp_path), "stages": Stages()}

    def keys(given: Supervision | None) -> set[str]:
        build_auxiliary(tiny_backbone, NAMES, images, **options, supervision=given)
        return {path.name for path in (tmp_path / "lora").iterdir() if path.is_dir()}

    plain = keys(None)
    assert keys(None) == plain and len(plain) == 1
    given = Supervision(pictures[:2], features[:2], torch.tensor([0, 2]), UNSEEN)
    assert len(keys(given)) == 2
