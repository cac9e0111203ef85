"""Trainers with labelled images: what may change their weights, and that a kill may not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import arguments, figures, weights
from safetensors.torch import load_file
from shared import copy_to_change, make_once
from small_backbones import write_backbone

import train
from datasets.base import SplitDataset
from trainers.self_training import SelfTraining

Finished = Callable[..., Path]
ROUNDS = ["TRAINER.PROMPT.ROUNDS", "2", "OPTIM.MAX_EPOCH", "2"]
RUNS = {
    "GRIP, ul": ("GRIP", ["DATASET.PARADIGM", "ul", *ROUNDS]),
    "GRIP, ssl": ("GRIP", ["DATASET.PARADIGM", "ssl", *ROUNDS]),
    "UPL, ssl": ("UPL", ["DATASET.PARADIGM", "ssl", "TRAINER.PROMPT.ENSEMBLE", "2"]),
    "AiR, ssl": ("AiR", ["DATASET.PARADIGM", "ssl", "AIR.AUXILIARY", "gaussian", "AIR.REFINE", "em"]),
    "CPL, trzsl": ("CPL", ["DATASET.PARADIGM", "trzsl", *ROUNDS]),
    "AiR, trzsl": ("AiR", ["DATASET.PARADIGM", "trzsl", "AIR.PROTOTYPES", "real"]),
    "CoOp+AiR, trzsl": ("CoOp+AiR", ["DATASET.PARADIGM", "trzsl"]),
}


def result(output: Path) -> dict[str, Any]:
    return json.loads((output / "result.json").read_text())


def seen_classes(output: Path) -> set[int]:
    return set(json.loads((output / "predictions.json").read_text())["seen"])


def changed_data(data: Path, target: Path, change: Callable[[dict[str, list[list[Any]]]], None]) -> Path:
    """A copy of the data root with other lists of images and labels."""
    copy_to_change(data / "digits", target / "digits", "split.json")
    items = json.loads((target / "digits" / "split.json").read_text())
    change(items)
    (target / "digits" / "split.json").write_text(json.dumps(items))
    return target


def permute_test_labels(items: dict[str, list[list[Any]]]) -> None:
    labels = [item[1:] for item in items["test"]]
    items["test"] = [[item[0], *label] for item, label in zip(items["test"], labels[::-1], strict=True)]


@pytest.fixture
def hidden_labels_permuted(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From now on data sets hide other labels. (Other labels on disk would be drawn as labelled ones in ssl.)"""
    make = SplitDataset.__init__

    def permuted(self: SplitDataset, *args: Any, **options: Any) -> None:
        make(self, *args, **options)
        self.hidden_labels = dict(zip(self.hidden_labels, list(self.hidden_labels.values())[::-1], strict=True))

    return lambda: monkeypatch.setattr(SplitDataset, "__init__", permuted)


@pytest.mark.parametrize("name", RUNS)
def test_hidden_and_test_labels_change_no_bit_of_the_weights(
    name: str, finished: Finished, data: Path, cache: str, tmp_path: Path, hidden_labels_permuted: Callable[[], None]
) -> None:
    trainer, options = RUNS[name]
    first = finished(trainer, *options)
    hidden_labels_permuted()
    root = changed_data(data, tmp_path / "data", permute_test_labels)
    assert train.main(arguments(trainer, root, tmp_path / "run", "AIR.CACHE", cache, *options)) == 0
    left, right = weights(first), weights(tmp_path / "run")
    assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
    before, after = result(first), result(tmp_path / "run")
    for head, metrics in before["heads"].items():
        assert metrics["accuracy"] != after["heads"][head]["accuracy"]  # else nothing was permuted
    if trainer != "CoOp+AiR":
        assert before["pseudo_labels"]["selected"] == after["pseudo_labels"]["selected"] > 0
        assert before["pseudo_labels"]["accuracy"] != after["pseudo_labels"]["accuracy"]


def test_hidden_labels_on_disk_change_no_bit_in_trzsl(
    finished: Finished, data: Path, cache: str, tmp_path: Path
) -> None:
    trainer, options = RUNS["CPL, trzsl"]
    first = finished(trainer, *options)
    unseen = set(range(10)) - seen_classes(first)

    def permute(items: dict[str, list[list[Any]]]) -> None:
        places = [place for place, item in enumerate(items["train"]) if item[1] in unseen]
        labels = [items["train"][place][1:] for place in places]
        for place, label in zip(places, labels[::-1], strict=True):
            items["train"][place][1:] = label

    root = changed_data(data, tmp_path / "data", permute)
    assert train.main(arguments(trainer, root, tmp_path / "run", "AIR.CACHE", cache, *options)) == 0
    left, right = weights(first), weights(tmp_path / "run")
    assert all(torch.equal(left[key], right[key]) for key in left)
    assert result(first)["pseudo_labels"]["accuracy"] != result(tmp_path / "run")["pseudo_labels"]["accuracy"]


@pytest.mark.parametrize("paradigm", ["ssl", "trzsl"])
def test_given_labels_change_the_weights(
    paradigm: str, finished: Finished, data: Path, cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The counterpart: labelled images are really used."""
    options = ["DATASET.PARADIGM", paradigm]
    first, make = finished("UPL", *options), SplitDataset.__init__

    def permuted(self: SplitDataset, *args: Any, **given: Any) -> None:
        make(self, *args, **given)
        labels = [item.label for item in self.train_x]
        for item, label in zip(self.train_x, labels[1:] + labels[:1], strict=True):
            item._label = label

    monkeypatch.setattr(SplitDataset, "__init__", permuted)
    assert train.main(arguments("UPL", data, tmp_path / "run", "AIR.CACHE", cache, *options)) == 0
    assert not torch.equal(weights(first)["ctx"], weights(tmp_path / "run")["ctx"])


class Killed(Exception):
    pass


@pytest.fixture(scope="session")
def vit(shared: Path) -> Path:
    """A small random backbone whose image tower takes prompts."""
    return make_once(shared / "backbones", lambda folder: write_backbone(folder / "vit", "vit")) / "vit"


VISUAL = {
    "CPL, visual, ssl": ("CPL", ["TRAINER.PROMPT.MODALITY", "visual", "DATASET.PARADIGM", "ssl"]),
    "GRIP, multimodal, trzsl": (
        "GRIP",
        ["TRAINER.PROMPT.MODALITY", "multimodal", "DATASET.PARADIGM", "trzsl", *ROUNDS],
    ),
    "AiR, visual, trzsl": ("AiR", ["TRAINER.PROMPT.MODALITY", "visual", "DATASET.PARADIGM", "trzsl"]),
}


@pytest.mark.parametrize("name", VISUAL)
def test_prompts_in_the_image_tower_learn_from_labelled_images_and_survive_a_kill(
    name: str, data: Path, cache: str, vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, options = VISUAL[name]
    options = [*options, "MODEL.BACKBONE.NAME", str(vit), "TRAINER.UPL.PER_CLASS", "20", "TRAINER.CPL.PER_CLASS", "20"]
    seen: set[tuple[str, int]] = set()
    losses, run_epoch = SelfTraining.losses, SelfTraining.run_epoch

    def watched(self: SelfTraining, batch: dict[str, torch.Tensor], text: torch.Tensor) -> dict[str, torch.Tensor]:
        seen.update((key, batch[key].ndim) for key in ("img", "labelled"))
        return losses(self, batch, text)

    def until(self: SelfTraining) -> None:
        if self.epoch == 2:
            raise Killed
        run_epoch(self)

    monkeypatch.setattr(SelfTraining, "losses", watched)
    assert train.main(arguments(trainer, data, tmp_path / "whole", "AIR.CACHE", cache, *options)) == 0
    assert seen == {("img", 2), ("labelled", 2)}  # features by the prompted tower
    line = arguments(trainer, data, tmp_path / "cut", "AIR.CACHE", cache, *options)
    with monkeypatch.context() as patch:
        patch.setattr(SelfTraining, "run_epoch", until)
        with pytest.raises(Killed):
            train.main(line)
    assert train.main(line) == 0
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert figures(tmp_path / "whole") == figures(tmp_path / "cut")


@pytest.mark.parametrize(("name", "epoch"), [("CPL, trzsl", 1), ("CPL, trzsl", 2), ("GRIP, ssl", 3), ("AiR, ssl", 2)])
def test_a_kill_changes_nothing(
    name: str, epoch: int, finished: Finished, data: Path, cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, options = RUNS[name]
    whole, run_epoch = finished(trainer, *options), SelfTraining.run_epoch

    def until(self: SelfTraining) -> None:
        if self.epoch == epoch:
            raise Killed
        run_epoch(self)

    line = arguments(trainer, data, tmp_path / "cut", "AIR.CACHE", cache, *options)
    with monkeypatch.context() as patch:
        patch.setattr(SelfTraining, "run_epoch", until)
        with pytest.raises(Killed):
            train.main(line)
    assert train.main(line) == 0
    first, second = weights(whole), weights(tmp_path / "cut")
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert figures(whole) == figures(tmp_path / "cut")


def test_pseudo_labels_of_trzsl_are_unseen_classes(finished: Finished) -> None:
    for name in ("CPL, trzsl", "AiR, trzsl"):
        output = finished(RUNS[name][0], *RUNS[name][1])
        seen = sorted(seen_classes(output))
        for path in (output / "rounds").glob("*.safetensors"):
            mask = load_file(path)["mask"]
            assert len(seen) == 6 and mask.any() and not mask[:, seen].any()
