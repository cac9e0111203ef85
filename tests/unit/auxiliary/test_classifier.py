"""The auxiliary classifier: its scores against loops, fusion, and its file."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize
from yacs.config import CfgNode

from air_plugin.auxiliary.classifier import AuxiliaryClassifier, make_card
from air_plugin.clip.backbone import Backbone
from air_plugin.config import AirSettings, add_air_config
from air_plugin.utils.errors import UserError


def unit(*shape: int, seed: int = 0) -> Tensor:
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("kept", [1, 6])
def test_scores_are_the_mean_cosine_to_the_prototypes(kept: int):
    prototypes, images = unit(4, kept, 16), unit(11, 16, seed=1)
    scores = AuxiliaryClassifier.from_prototypes(prototypes, scale=None).scores(images)
    for i, image in enumerate(images.tolist()):
        for c, group in enumerate(prototypes.tolist()):
            mean = sum(float(torch.tensor(image).double() @ torch.tensor(one).double()) for one in group) / kept
            assert scores[i, c].item() == pytest.approx(mean, abs=1e-6)
    assert scores.abs().max() <= 1 + 1e-6


def test_weight_is_not_normalised_again():
    classifier = AuxiliaryClassifier.from_prototypes(torch.eye(2)[None], scale=None)
    assert torch.allclose(classifier.weight, torch.tensor([[0.5, 0.5]]))
    assert torch.equal(classifier.bias, torch.zeros(1))


def test_softmax_form_is_a_softmax_of_scaled_scores():
    classifier, images = AuxiliaryClassifier.from_prototypes(unit(4, 6, 16), scale=20.0), unit(11, 16, seed=1)
    probs = classifier.probs(images)
    exponentials = (20.0 * classifier.scores(images)).exp()
    assert torch.allclose(probs, exponentials / exponentials.sum(dim=1, keepdim=True), atol=1e-6)
    assert torch.allclose(probs.sum(dim=1), torch.ones(11))


def test_raw_form_is_the_score_cut_at_zero():
    classifier, images = AuxiliaryClassifier.from_prototypes(unit(4, 6, 16), scale=None), unit(11, 16, seed=1)
    scores, probs = classifier.scores(images), classifier.probs(images)
    assert (scores < 0).any() and (scores > 0).any()
    assert torch.equal(probs, torch.where(scores > 0, scores, torch.zeros_like(scores)))


def test_bias_is_added():
    classifier = AuxiliaryClassifier(torch.eye(2), torch.tensor([0.0, 5.0]), None)
    assert classifier.scores(torch.tensor([[1.0, 0.0]])).tolist() == [[1.0, 5.0]]


def test_weights_follow_the_type_of_the_features():
    classifier = AuxiliaryClassifier.from_prototypes(unit(4, 6, 16), scale=2.0)
    assert classifier.probs(unit(3, 16).double()).dtype == torch.float64


# Fusion with any classifier


def classifier(*, scale: float | None = 8.0, weight: float = 2.0, card: dict | None = None) -> AuxiliaryClassifier:
    made = AuxiliaryClassifier.from_prototypes(unit(4, 6, 16), scale=scale)
    return replace(made, fusion_weight=weight, card=card or {})


def fuse_reference(logits: Tensor, head: AuxiliaryClassifier, features: Tensor, weight: float) -> list[list[float]]:
    rows = []
    for row, feature in zip(logits.tolist(), features.tolist(), strict=True):
        text = [math.exp(value - max(row)) for value in row]
        scores = [sum(f * w for f, w in zip(feature, one, strict=True)) for one in head.weight.tolist()]
        other = [max(s, 0.0) if head.scale is None else math.exp(head.scale * s) for s in scores]
        bottom = 1.0 if head.scale is None else sum(other)
        total = [t / sum(text) + weight * o / bottom for t, o in zip(text, other, strict=True)]
        rows.append([value / sum(total) for value in total])
    return rows


@pytest.mark.parametrize("scale", [8.0, None])
@pytest.mark.parametrize("weight", [None, 0.0, 0.5])
def test_the_softmax_of_fused_logits_is_the_weighted_sum_of_probabilities(scale: float | None, weight: float | None):
    head, features, logits = classifier(scale=scale), unit(5, 16, seed=1), 5 * unit(5, 4, seed=2)
    fused = head.fuse(logits, features, weight=weight)
    expected = fuse_reference(logits, head, features, 2.0 if weight is None else weight)
    assert torch.allclose(fused.softmax(dim=1), torch.tensor(expected), atol=1e-6)
    assert torch.allclose(fused.exp(), torch.tensor(expected), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_fusion_is_float32_whatever_comes_in(dtype: torch.dtype):
    head, features, logits = classifier(), unit(5, 16, seed=1), 50 * unit(5, 4, seed=2)
    fused = head.fuse(logits.to(dtype), features.to(dtype))
    assert fused.dtype == torch.float32
    assert torch.equal(fused, head.fuse(logits.to(dtype).float(), features.to(dtype).float()))


def test_fused_logits_are_finite_where_a_probability_vanishes():
    head = classifier(scale=None, weight=0.0)
    fused = head.fuse(torch.tensor([[1e4, 0.0, -1e4, 0.0]]), unit(1, 16))
    assert torch.isfinite(fused).all() and fused.argmax() == 0
    assert torch.allclose(fused.softmax(dim=1), torch.tensor([[1.0, 0.0, 0.0, 0.0]]))


def test_fused_logits_move_with_the_classes():
    order = torch.tensor([2, 0, 3, 1])
    head, features, logits = classifier(), unit(5, 16, seed=1), unit(5, 4, seed=2)
    moved = replace(head, weight=head.weight[order], bias=head.bias[order])
    assert torch.allclose(moved.fuse(logits[:, order], features), head.fuse(logits, features)[:, order], atol=1e-6)


# As a file


NAMES = ["dog", "sea lion", "Stra\u00dfe", "cat"]
CARD = {"classes": NAMES, "backbone": "mini", "backbone_fingerprint": "a" * 64, "lora": None, "seed": 3}


@pytest.mark.parametrize("scale", [8.0, None])
def test_a_file_gives_the_same_classifier_back(tmp_path: Path, scale: float | None):
    head = replace(classifier(scale=scale, weight=0.25, card=CARD), bias=unit(4))
    head.save(tmp_path / "new" / "head.safetensors")
    same = AuxiliaryClassifier.load(tmp_path / "new" / "head.safetensors", classnames=NAMES, backbone="a" * 64)
    assert torch.equal(same.weight, head.weight) and torch.equal(same.bias, head.bias)
    assert (same.scale, same.fusion_weight, same.card) == (scale, 0.25, CARD)
    features, logits = unit(3, 16, seed=1), unit(3, 4, seed=2)
    assert torch.equal(same.fuse(logits, features), head.fuse(logits, features))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["head.safetensors"]


def test_the_file_is_plain_safetensors_with_a_readable_card(tmp_path: Path):
    path = tmp_path / "head.safetensors"
    classifier(card=CARD).save(path)
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == {"weight", "bias"}
        assert json.loads(file.metadata()["air_classifier"])["card"] == CARD


def test_a_backbone_may_stand_for_its_fingerprint(tmp_path: Path):
    path = tmp_path / "head.safetensors"
    classifier(card=CARD).save(path)
    assert AuxiliaryClassifier.load(path, backbone=SimpleNamespace(name="m", fingerprint="a" * 64)).scale == 8.0
    with pytest.raises(UserError) as caught:
        AuxiliaryClassifier.load(path, backbone=SimpleNamespace(name="RN50", fingerprint="b" * 64))
    assert f"the backbone mini ({'a' * 12}), not for RN50 ({'b' * 12})" in str(caught.value)


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (["dog", "Stra\u00dfe", "sea lion", "cat"], "another order: class 2 is 'sea lion' there and 'Stra\u00dfe'"),
        (["dog", "sea lion", "bird", "cat"], "4 other classes than these 4: class 3 is 'Stra\u00dfe' there and 'bird'"),
        (NAMES[:3], "4 other classes than these 3: class 4 is 'cat' there and nothing here"),
        ([*NAMES, "ox"], "4 other classes than these 5: class 5 is nothing there and 'ox' here"),
    ],
)
def test_other_classes_are_refused_by_the_first_difference(tmp_path: Path, wanted: list[str], said: str):
    path = tmp_path / "head.safetensors"
    classifier(card=CARD).save(path)
    with pytest.raises(UserError) as caught:
        AuxiliaryClassifier.load(path, classnames=wanted)
    assert said in str(caught.value) and str(path) in str(caught.value)


def test_what_a_file_does_not_say_cannot_be_asked_for(tmp_path: Path):
    path = tmp_path / "head.safetensors"
    classifier().save(path)
    assert AuxiliaryClassifier.load(path).card == {}
    for wanted, said in (({"classnames": NAMES}, "its classes"), ({"backbone": "a"}, "its backbone")):
        with pytest.raises(UserError, match=f"does not name {said}"):
            AuxiliaryClassifier.load(path, **wanted)


def damage(path: Path, kind: str) -> None:
    tensors = {"weight": unit(4, 16), "bias": unit(4)}
    data = path.read_bytes()
    match kind:
        case "missing":
            path.unlink()
        case "cut":
            path.write_bytes(data[:-5])
        case "flipped":
            path.write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
        case "no safetensors":
            path.write_bytes(b"PK\x03\x04 a zip, say")
        case "foreign":
            save_file(tensors, path)
        case "header":
            save_file(tensors, path, metadata={"air_classifier": "{"})
        case "form":
            save_file(tensors, path, metadata={"air_classifier": '{"version": 9, "digest": "", "card": {}}'})
        case "tensors":
            path.write_bytes(data.replace(b'"bias"', b'"bia_"'))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("missing", "is missing"),
        ("cut", "damaged"),
        ("flipped", "not what was saved"),
        ("no safetensors", "damaged"),
        ("foreign", "is not a classifier of air_plugin"),
        ("header", "damaged"),
        ("form", "is of form 9"),
        ("tensors", "damaged"),
    ],
)
def test_a_file_that_is_none_of_ours_is_refused_in_one_line(tmp_path: Path, kind: str, said: str):
    path = tmp_path / "head.safetensors"
    classifier(card=CARD).save(path)
    damage(path, kind)
    with pytest.raises(UserError) as caught:
        AuxiliaryClassifier.load(path)
    assert said in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_the_card_says_what_a_classifier_was_made_of(tiny_backbone: Backbone):
    cfg = CfgNode({"DATASET": {}, "TRAINER": {}, "SEED": 5})
    add_air_config(cfg)
    settings = AirSettings.from_cfg(cfg)
    card = make_card(tiny_backbone, NAMES, settings=settings, generator="g" * 64, adapter="k")
    assert json.loads(json.dumps(card)) == card
    assert (card["classes"], card["backbone_fingerprint"]) == (NAMES, tiny_backbone.fingerprint)
    assert (card["generator"], card["generator_fingerprint"], card["lora"]) == ("mini", "g" * 64, "k")
    drawn_by_nobody = make_card(tiny_backbone, NAMES, settings=settings)
    assert (drawn_by_nobody["generator"], drawn_by_nobody["lora"]) == (None, None)


# Features of other lengths


def lengths() -> Tensor:
    return torch.linspace(0.1, 25.0, 11)[:, None]


@pytest.mark.public_reports
@pytest.mark.parametrize("scale", [None, 20.0])
def test_the_length_of_features_does_not_matter(scale: float | None):
    """Item 10 of the public reports: they were fused off by up to 0.39."""
    images, prototypes, text_logits = unit(11, 16, seed=1), unit(4, 6, 16), unit(11, 4, seed=2)
    classifier = AuxiliaryClassifier.from_prototypes(prototypes, scale=scale)
    longer = AuxiliaryClassifier.from_prototypes(3 * prototypes, scale=scale)
    assert torch.allclose(longer.weight, classifier.weight, atol=1e-6)
    for of in (classifier.scores, classifier.probs, lambda features: classifier.fuse(text_logits, features)):
        assert torch.allclose(of(lengths() * images), of(images), atol=1e-5)


@pytest.mark.public_reports
def test_a_feature_of_zeros_gives_no_nan():
    """Item 10 of the public reports."""
    classifier = AuxiliaryClassifier.from_prototypes(unit(4, 6, 16), scale=20.0)
    fused = classifier.fuse(torch.zeros(1, 4), torch.zeros(1, 16)).softmax(dim=1)
    assert torch.allclose(fused, torch.full((1, 4), 0.25))
