"""The estimator's own training of prompts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import make_backbone

from air_plugin import AiRClassifier
from air_plugin.clip.features import extract_features
from air_plugin.estimator import prompts
from air_plugin.utils.store import Store

ROOT = Path(__file__).resolve().parents[3]


COMMON = {"momentum": 0.9, "beta": 0.9}
EXPECTED = {  # CPL's, arXiv 2406.10502; those of the embedded models: docs/benchmark-digits.md
    prompts.PUBLISHED: {"lr": 0.02, "epochs": 50, "batch": 64, "alpha": 0.75, "per_class": 16, "weight_decay": 0.05}
    | {"clip_grad": 0.8, "crop": 0.08, "flip": True, **COMMON},
    prompts.EMBEDDED: {"lr": 0.01, "epochs": 30, "batch": 32, "alpha": 0.6, "per_class": 64, "weight_decay": 5e-4}
    | {"clip_grad": 0.0, "crop": 0.6, "flip": False, **COMMON},
}


@pytest.mark.parametrize("names", EXPECTED)
def test_the_settings_of_training_are_those_of_the_trainers(names: tuple[str, str]):
    training = prompts.read_training(*names)
    assert dataclasses.asdict(training) == EXPECTED[names]
    for name in names:
        shared = ROOT / "configs" / "shared" / f"{name}.yaml"
        assert shared.resolve() == (prompts.FOLDER / f"{name}.yaml").resolve()


def test_where_a_file_names_none_they_are_dassls():
    from dassl.config import get_cfg_default

    cfg, ours = get_cfg_default(), {field.name: field.default for field in dataclasses.fields(prompts.Training)}
    assert (ours["weight_decay"], ours["momentum"]) == (cfg.OPTIM.WEIGHT_DECAY, cfg.OPTIM.MOMENTUM)
    assert ours["crop"] == cfg.INPUT.RRCROP_SCALE[0]


def test_prompts_are_trained_once_and_change_the_text_head_alone(
    parameters: dict[str, Any], pictures: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    plain = AiRClassifier(**parameters).fit(pictures)
    trained = AiRClassifier(**parameters, prompts=True, template="a {}.").fit(pictures)
    again = AiRClassifier(**{**parameters, "cache": tmp_path / "other"}, prompts=True, template="a {}.").fit(pictures)
    assert torch.equal(trained.bundle_.text, again.bundle_.text)  # the seed decides everything
    monkeypatch.setattr(prompts, "_train", lambda *_, **__: pytest.fail("trained twice"))
    from_store = AiRClassifier(**parameters, prompts=True, template="a {}.").fit(pictures)
    assert torch.equal(from_store.bundle_.text, trained.bundle_.text)
    untrained = AiRClassifier(**parameters, template="a {}.").fit(pictures)
    assert torch.equal(untrained.bundle_.auxiliary.weight, trained.bundle_.auxiliary.weight)
    assert not torch.allclose(untrained.bundle_.text, trained.bundle_.text, atol=1e-3)
    assert plain.bundle_.text.shape == trained.bundle_.text.shape == (1, 3, 24)
    assert torch.allclose(trained.bundle_.text.norm(dim=2), torch.ones(1, 3))


def test_training_lowers_both_losses(parameters: dict[str, Any], pictures: list[str]):
    untrained = AiRClassifier(**parameters).fit(pictures)
    trained = AiRClassifier(**parameters, prompts=True).fit(pictures)
    features = trained.auxiliary_.prototypes.features
    label = torch.arange(3).repeat_interleave(features.shape[1])

    def loss(estimator: AiRClassifier) -> float:
        probs = estimator.bundle_.classify(features.flatten(0, 1))["text"]
        return float(torch.nn.functional.nll_loss(probs.log(), label))

    assert loss(trained) < loss(untrained)


def test_epochs_differ(parameters: dict[str, Any], pictures: list[str], monkeypatch: pytest.MonkeyPatch):
    """Every epoch has an order of its own."""
    seen: list[torch.Tensor] = []
    step = prompts.partial_label_loss
    few = dataclasses.replace(prompts.read_training(*prompts.PUBLISHED), batch=2, epochs=4)
    monkeypatch.setattr(prompts, "read_training", lambda *_: few)
    monkeypatch.setattr(
        prompts, "partial_label_loss", lambda logits, target: seen.append(logits.detach()) or step(logits, target)
    )
    monkeypatch.setattr(torch.optim.SGD, "step", lambda *_: None)  # the logits then differ by the images alone
    AiRClassifier(**parameters, prompts=True).fit(pictures)
    epochs = torch.cat(seen).unflatten(0, (4, -1))
    assert not all(torch.allclose(epochs[0], other) for other in epochs[1:])


def test_the_views_are_augmented_and_those_of_the_seed(parameters: dict[str, Any], pictures: list[str], tmp_path: Path):
    backbone = make_backbone()
    tables = {}
    for place, seed in enumerate((1, 1, 2)):
        store = Store(tmp_path / f"store{place}")
        tables[place], _ = extract_features(backbone, pictures, store=store, **prompts.views_of(backbone, seed=seed))
    one, same, other = (table.features for table in tables.values())
    assert one.shape == (len(pictures), prompts.VIEWS, 24) and torch.equal(one, same)
    assert torch.equal(one[:, 0], other[:, 0]) and not torch.allclose(one[:, 1:], other[:, 1:], atol=1e-3)
    plain, _ = extract_features(backbone, pictures, store=Store(tmp_path / "plain"))
    assert torch.allclose(plain.plain, one[:, 0], atol=1e-6)
