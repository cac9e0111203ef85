"""From scores and labels to metrics: names -> numbers, rates in percent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor


def head_metrics(scores: Tensor, labels: Tensor | None, classnames: Sequence[str]) -> dict[str, Any]:
    """Accuracy and macro F1 of one head.

    Args:
        scores: (N, C); the largest is the prediction.
        labels: (N,) true classes, or None where there are none.
        classnames: C names.

    Returns:
        accuracy, macro_f1 (over the classes that occur among the labels, as Dassl computes it), and per_class: the
        accuracy of each class that occurs; of classes with one name, the later ones are called "name (2)", "name (3)".
        All in percent; None, None and {} without labels.
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
    }


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
