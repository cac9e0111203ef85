"""Unlabelled sets that lack classes or are unbalanced (digits): an experiment's construction, not the method."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import train
from air_plugin.utils.errors import UserError


@pytest.fixture
def digits_of(digits_root: Path) -> Callable[..., Any]:
    """Makes a set of digits with some options."""

    def make(*, seed: int = 1, kind: str = "Digits", **options: float) -> Any:
        from datasets import digits

        cfg = train.set_up(train.parse(["--root", str(digits_root)]))[0]
        cfg.SEED = seed
        for key, value in options.items():
            cfg.DATASET[key] = value
        return getattr(digits, kind)(cfg)

    return make


def numbers(data: Any) -> Counter[int]:
    """Unlabelled images a class."""
    assert [item.impath for item in data.train_u] == sorted(data.hidden_labels)
    return Counter(data.hidden_labels.values())


@pytest.mark.parametrize("missing", [0, 1, 4, 8])
def test_missing_classes_are_missing_and_the_rest_is_whole(digits_of: Callable[..., Any], missing: int):
    whole, data = digits_of(), digits_of(NUM_MISSING_CLASSES=missing)
    counts = numbers(data)
    assert len(counts) == 10 - missing and counts.items() <= numbers(whole).items()
    assert len(data.classnames) == 10 and len(data.test) == 797
    assert numbers(digits_of(NUM_MISSING_CLASSES=missing)) == counts


def test_which_classes_are_missing_follows_the_seed(digits_of: Callable[..., Any]):
    assert len({frozenset(numbers(digits_of(seed=seed, NUM_MISSING_CLASSES=4))) for seed in range(5)}) > 1


@pytest.mark.parametrize("seed", [0, 1])
def test_every_other_class_is_rarer(digits_of: Callable[..., Any], seed: int):
    whole, counts = numbers(digits_of()), numbers(digits_of(seed=seed, IMBALANCE_RATIO=10.0))
    for label, count in counts.items():
        assert count == (round(whole[label] / 10) if label % 2 == seed else whole[label])
    assert min(numbers(digits_of(IMBALANCE_RATIO=1e6)).values()) == 1


@pytest.mark.parametrize("kind", ["DigitsInverted", "DigitsRotated", "DigitsNoisy"])
def test_other_kinds_of_digits_lack_the_same_images(digits_of: Callable[..., Any], kind: str):
    for options in ({"NUM_MISSING_CLASSES": 4}, {"IMBALANCE_RATIO": 10.0}):
        plain, changed = digits_of(**options), digits_of(kind=kind, **options)
        assert 0 < numbers(changed).total() < 1000
        names = [[Path(item.impath).name for item in data.train_u] for data in (plain, changed)]
        assert names[0] == names[1]
        assert list(changed.hidden_labels.values()) == list(plain.hidden_labels.values())


@pytest.mark.parametrize("options", [{"NUM_MISSING_CLASSES": 9}, {"NUM_MISSING_CLASSES": -1}, {"IMBALANCE_RATIO": 0.5}])
def test_an_impossible_set_is_refused_by_its_key(digits_of: Callable[..., Any], options: dict[str, float]):
    with pytest.raises(UserError, match=f"DATASET.{next(iter(options))} is"):
        digits_of(**options)
