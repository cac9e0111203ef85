"""From scores and labels to metrics: names -> numbers, rates in percent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


def head_metrics(
    scores: Tensor, labels: Tensor | None, classnames: Sequence[str], *, seen: Sequence[int] | None = None
) -> dict[str, Any]:
    """Accuracy and macro F1 of one head; in transductive zero-shot learning also those of the two groups of classes.

    Args:
        scores: (N, C); the largest is the prediction.
        labels: (N,) true classes, or None where there are none.
        classnames: C names.
        seen: labels of the classes that had labelled training images; None outside of transductive zero-shot learning.

    Returns:
        accuracy, macro_f1 (over the classes that occur among the labels, as Dassl computes it), and per_class: the
        accuracy of each class that occurs; of classes with one name, the later ones are called "name (2)", "name (3)".
        With `seen` also what `group_metrics` returns. All in percent; None, None and {} without labels.
    """
    if labels is None:
        return {"accuracy": None, "macro_f1": None, "per_class": {}}
    from sklearn.metrics import f1_score

    predicted, true = scores.argmax(dim=1).cpu().numpy(), labels.cpu().numpy()
    hit = predicted == true
    names = _distinct(classnames)
    present = np.unique(true)
    return {
        "accuracy": 100.0 * float(hit.mean()),
        "macro_f1": 100.0 * float(f1_score(true, predicted, average="macro", labels=present)),
        "per_class": {names[c]: 100.0 * float(hit[true == c].mean()) for c in present.tolist()},
        **({} if seen is None else group_metrics(hit, np.isin(true, seen))),
    }


def group_metrics(hit: np.ndarray, is_seen: np.ndarray) -> dict[str, float | None]:
    """Accuracy on the test images of seen and of unseen classes, and the harmonic mean of the two.

    The predictions are over all classes, and a group's accuracy is the share of its images (micro), as in GRIP and CPL.

    Args:
        hit: (N,) bool, whether the prediction is right.
        is_seen: (N,) bool, whether the true class is a seen one.

    Returns:
        seen, unseen, harmonic in percent; None for a group without images, and for the mean then.
    """
    seen, unseen = (100.0 * float(hit[group].mean()) if group.any() else None for group in (is_seen, ~is_seen))
    known = seen is not None and unseen is not None
    return {"seen": seen, "unseen": unseen, "harmonic": float(harmonic_mean(seen, unseen)) if known else None}


def harmonic_mean(seen: Any, unseen: Any) -> np.ndarray:
    """2 s u / (s + u) of numbers or arrays of one shape, at least 0; 0 where both are 0.

    >>> float(harmonic_mean(80.0, 20.0))
    32.0
    """
    total = np.add(seen, unseen)
    return 2 * np.multiply(seen, unseen) / np.where(total == 0, 1.0, total)


def primary_metric(predicted: Tensor, labels: Tensor, *, seen: Sequence[int] | None = None) -> float | None:
    """What runs are compared by, in percent: accuracy; with `seen` the harmonic mean, see `group_metrics`.

    Args:
        predicted, labels: (N,) classes.
    """
    hit = predicted == labels
    if seen is None:
        return 100.0 * float(hit.float().mean())
    return group_metrics(hit.cpu().numpy(), np.isin(labels.cpu().numpy(), seen))["harmonic"]


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, with a number behind each that has occurred before: cap, hat, cap (2)."""
    found: dict[str, None] = {}
    for name in names:
        new, number = name, 1
        while new in found or (number > 1 and new in names):
            number += 1
            new = f"{name} ({number})"
        found[new] = None
    return list(found)


def head_predictions(probs: Tensor) -> dict[str, list[Any]]:
    """(N, C) probabilities to the N predicted classes and their probabilities, as predictions.json holds them."""
    confidence, predicted = probs.max(dim=1)
    return {"predicted": predicted.tolist(), "confidence": [round(value, 6) for value in confidence.tolist()]}


def pseudo_label_metrics(
    index: Tensor, mask: Tensor, top1: Tensor, *, total: int, labels: Tensor | None
) -> dict[str, float | int | None]:
    """Size and quality of a set of pseudo-labels.

    Args:
        index: (S,) selected images.
        mask: (S, C) bool candidates.
        top1: (S,) the candidate of the largest probability.
        total: number of images N.
        labels: (N,) hidden labels, used after training for these metrics only; None where there are none.

    Returns:
        selected (a count), coverage (percent of the images), accuracy (percent of the selected whose top1
        candidate is the true class), candidates (mean number an image), candidate_recall (percent whose true class is
        a candidate).
    """
    accuracy = recall = None
    if labels is not None and len(index):
        true = labels[index.cpu()].to(mask.device)
        accuracy = 100.0 * float((top1 == true).float().mean())
        recall = 100.0 * float(mask.gather(1, true[:, None]).float().mean())
    return {
        "selected": len(index),
        "coverage": 100.0 * len(index) / total,
        "accuracy": accuracy,
        "candidates": float(mask.sum(dim=1).float().mean()) if len(index) else 0.0,
        "candidate_recall": recall,
    }
