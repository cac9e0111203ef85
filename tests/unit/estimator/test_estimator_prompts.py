"""The estimator's own training of prompts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small_models import make_backbone
from yacs.config import CfgNode

from air_plugin import AiRClassifier
from air_plugin.clip.features import extract_features
from air_plugin.config import merge_file, own_config
from air_plugin.estimator import prompts
from air_plugin.merging import read_yaml
from air_plugin.utils.store import Store

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("training", "file", "images"),
    [(prompts.SMALL, "mini_training", "mini"), (prompts.PUBLISHED, "cpl_training", "published")],
)
def test_the_settings_are_those_of_the_configs(training: prompts.Training, file: str, images: str):
    from dassl.config import get_cfg_default

    path = ROOT / "configs" / "shared" / f"{file}.yaml"
    cfg = own_config(0)
    merge_file(cfg, path, sections=("TRAINER",))
    written, defaults = read_yaml(path.read_text()), get_cfg_default().OPTIM
    views = get_cfg_default().INPUT
    views.merge_from_other_cfg(CfgNode(yaml.safe_load((path.parent / f"{images}.yaml").read_text())["INPUT"]))
    optim = {
        key: float(written["OPTIM"].get(key, defaults[key])) for key in ("LR", "MAX_EPOCH", "WEIGHT_DECAY", "MOMENTUM")
    }
    assert dataclasses.asdict(training) == {
        "lr": optim["LR"],
        "epochs": optim["MAX_EPOCH"],
        "batch": int(written["DATALOADER"]["TRAIN_X"]["BATCH_SIZE"]),
        "alpha": cfg.TRAINER.CPL.ALPHA,
        "beta": cfg.TRAINER.CPL.BETA,
        "per_class": cfg.TRAINER.CPL.PER_CLASS,
        "weight_decay": optim["WEIGHT_DECAY"],
        "momentum": optim["MOMENTUM"],
        "clip_grad": cfg.TRAINER.PROMPT.CLIP_GRAD,
        "crop": views.RRCROP_SCALE[0],
        "flip": "random_flip" in views.TRANSFORMS,
    }


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
    monkeypatch.setattr(prompts, "PUBLISHED", dataclasses.replace(prompts.PUBLISHED, batch=2, epochs=4))
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
