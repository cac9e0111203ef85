"""predictions.json: the prediction of every head for every test image."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from air_plugin.report.record import RunResult
from air_plugin.report.schema import OPTIONAL, Indices, Invalid, Line, Shares, load, plain, read
from air_plugin.utils.errors import UserError
from air_plugin.utils.files import to_json, write_atomically


@dataclass(frozen=True, eq=False)
class HeadPredictions:
    """predicted: (N,) class numbers. confidence: (N,) their probabilities, in [0, 1]."""

    predicted: Indices
    confidence: Shares


@dataclass(frozen=True, eq=False, kw_only=True)
class Predictions:
    """What every head predicted for N test images (predictions.json, format 1).

    split: which images. root: the data root; images: N paths, relative to it where they lie below it.
    labels: (N,) true classes; None where nobody has them. classnames: C names. heads: by name.
    seen: labels of the classes that had labelled training images, in the paradigm trzsl; None, and not in the file, in
        the others.
    """

    format: Literal[1] = 1
    split: str = "test"
    root: str
    images: tuple[str, ...]
    labels: Indices | None
    classnames: tuple[str, ...]
    heads: dict[Line, HeadPredictions]
    seen: Indices | None = field(default=None, metadata=OPTIONAL)

    def __post_init__(self) -> None:
        if not self.images or not self.classnames:
            raise Invalid("it has no images" if not self.images else "it has no classnames")
        columns = {f"heads.{name}.predicted": head.predicted for name, head in self.heads.items()}
        if self.labels is not None:
            columns["labels"] = self.labels
        size, classes = len(self.images), len(self.classnames)
        for name, column in columns.items():
            if len(column) != size or not ((column >= 0) & (column < classes)).all():
                raise Invalid(f"its {name} are not {size} class numbers from 0 to {classes - 1}")
        if self.seen is not None and not ((self.seen >= 0) & (self.seen < classes)).all():
            raise Invalid(f"its seen are not class numbers from 0 to {classes - 1}")
        for name, head in self.heads.items():
            if len(head.confidence) != size:
                raise Invalid(f"its heads.{name}.confidence are not {size} numbers")

    @classmethod
    def from_plain(cls, data: dict[str, Any]) -> Predictions:
        """Predictions from dicts and lists, as they stand in the file.

        Raises:
            UserError: a value is missing, has another type or is out of its range.
        """
        try:
            return read(cls, data)
        except Invalid as error:
            raise UserError(f"the predictions of the run are not valid: {error}") from error

    @classmethod
    def load(cls, path: Path) -> Predictions:
        """Read a predictions.json, also one from before the files had a format, which differs in nothing else.

        Raises:
            FileNotFoundError: there is no such file.
            UserError: the file is damaged; the message names the value that is wrong.
        """
        return load(cls, path, upgrade=lambda old: old)

    def save(self, path: Path) -> None:
        """Write the file whole or not at all."""
        write_atomically(path, to_json(plain(self)).encode(), durable=True)


def load_predictions(result: RunResult) -> Predictions | None:
    """The predictions of a finished run; None where the run has no predictions.json.

    Raises:
        UserError: the file is damaged, or does not belong to the result beside it.
    """
    path = result.folder / "predictions.json"
    try:
        predictions = Predictions.load(path)
    except FileNotFoundError:
        return None
    fault = _mismatch(predictions, result)
    if fault:
        raise UserError(f"{path} does not belong to the result beside it: {fault}")
    return predictions


def _mismatch(predictions: Predictions, result: RunResult) -> str | None:
    """Why these are not the predictions of this result; None where they are."""
    labels = predictions.labels
    if (predictions.seen is None) == (result.paradigm == "trzsl"):
        return "only one of them has seen classes"
    for name, metrics in result.heads.items():
        if name not in predictions.heads:
            return f"it has no {name} head"
        if (labels is None) != (metrics.accuracy is None):
            return "only one of them has test labels"
        if labels is None or metrics.accuracy is None:
            continue
        accuracy = 100.0 * float(np.mean(predictions.heads[name].predicted == labels))
        # One image may differ: two classes may have the same score, and each file was made from an argmax of its own.
        if abs(accuracy - metrics.accuracy) > 100.0 / len(labels) + 1e-6:
            return (
                f"its {name} head is correct on {accuracy:.1f} % of the images, the result has {metrics.accuracy:.1f} %"
            )
    return None
