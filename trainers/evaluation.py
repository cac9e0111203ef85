"""What an evaluation leaves: predictions by head, and the metrics of seen and unseen classes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from air_plugin.functional.metrics import head_predictions


def seen_classes(dataset: Any) -> list[int] | None:
    """Labels of the classes that had labelled training images, in trzsl; None in other paradigms and data sets."""
    return dataset.seen if getattr(dataset, "paradigm", "ul") == "trzsl" else None


def print_groups(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Print a head's metrics of the two groups of classes in Dassl's form, and return those that it has."""
    found = {name: metrics[name] for name in ("seen", "unseen", "harmonic") if metrics.get(name) is not None}
    for name, value in found.items():
        print(f"* {name}: {value:.1f}%")
    return found


def predictions_of(
    heads: Mapping[str, Tensor],
    images: Sequence[str],
    labels: Tensor | None,
    *,
    split: str,
    root: str,
    classnames: list[str],
    seen: list[int] | None,
) -> dict[str, Any]:
    """The content of predictions.json; paths of images as they are.

    Args:
        heads: name -> (N, C) probabilities.
        images: N paths.
        labels: (N,) true classes; None where nobody has them.
        split: which images.
        root: the data root.
        classnames: C names.
        seen: see `seen_classes`.
    """
    return {
        "split": split,
        "root": os.path.abspath(os.path.expanduser(root)),
        "images": list(images),
        "labels": labels.tolist() if labels is not None else None,
        "classnames": classnames,
        "seen": seen,
        "heads": {name: head_predictions(probs) for name, probs in heads.items()},
    }
