"""Confusion between classes, from predictions.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from air_plugin.report.collection import Cell, Method
from air_plugin.report.predictions import Predictions, load_predictions
from air_plugin.report.sections.view import MANY_CLASSES, View
from air_plugin.utils.errors import UserError

PAIRS = 15  # the most confused ones, where there are too many classes for a matrix

SeedPredictions = dict[int, tuple[Predictions, str]]  # seed -> predictions, name of the primary classifier


def predictions_of(view: View, method: Method) -> SeedPredictions:
    """The predictions of each seed that has them and test labels; damaged files are faults."""
    found = {}
    for run in view.runs(method):
        try:
            predictions = load_predictions(run)
        except UserError as error:
            view.faults.append(str(error))
            continue
        if predictions is not None and predictions.labels is not None:
            found[run.seed] = predictions, run.primary
    return found


def confusion(view: View, predictions: Mapping[Cell, SeedPredictions]) -> list[dict[str, Any]]:
    """Percent of each true class that was predicted as each class, mean over seeds."""
    entries = []
    for method in view.methods:
        runs = [*predictions[method.cell].values()]
        if not runs:
            continue
        names = runs[0][0].classnames
        alike = [(found, head) for found, head in runs if found.classnames == names]
        matrix = np.mean([confusion_matrix(found, head) for found, head in alike], axis=0)
        entry = {"title": method.title, "open": method in view.shown, "names": names, "seeds": len(alike)}
        if len(names) <= MANY_CLASSES:
            entry["rows"] = [(name, np.rint(row).astype(int).tolist()) for name, row in zip(names, matrix, strict=True)]
        else:
            entry["pairs"] = most_confused(matrix, names)
        entries.append(entry)
    return entries


def confusion_matrix(predictions: Predictions, head: str) -> np.ndarray:
    """(C, C) percent of the true class, which are the rows; a class without images has a row of zeros."""
    if predictions.labels is None:
        raise ValueError("a confusion matrix needs test labels")
    size = len(predictions.classnames)
    cells = predictions.labels * size + predictions.heads[head].predicted
    counts = np.bincount(cells, minlength=size * size).reshape(size, size)
    return 100.0 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


def most_confused(matrix: np.ndarray, names: Sequence[str]) -> list[tuple[str, str, float]]:
    """True class, predicted class and percent of the true class, the largest first, of a (C, C) matrix in percent."""
    mistakes = matrix * (1 - np.eye(len(names)))
    true, predicted = np.unravel_index(np.argsort(-mistakes, axis=None, kind="stable")[:PAIRS], mistakes.shape)
    return [(names[t], names[p], mistakes[t, p]) for t, p in zip(true, predicted, strict=True) if mistakes[t, p] > 0]
