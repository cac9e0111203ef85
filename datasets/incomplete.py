"""Unlabelled sets that lack classes or are unbalanced: an experiment, which uses labels that no method sees."""

from __future__ import annotations

import random
from collections.abc import Sequence

from dassl.data.datasets import Datum

from air_plugin.dataset_settings import DatasetSettings
from air_plugin.utils.checks import require_range
from air_plugin.utils.errors import UserError


def incomplete(items: list[Datum], labels: Sequence[int], *, settings: DatasetSettings, seed: int) -> list[Datum]:
    """Unlabelled images without some classes, or with few images of every other class.

    Args:
        items: of all classes.
        labels: of the classes that the images may have.
        settings: NUM_MISSING_CLASSES, how many classes are left out; the seed decides which ones. IMBALANCE_RATIO: one
            image in so many is kept of every other class (those of even or odd labels, by the seed), at least one.
        seed: of the choice.

    Raises:
        UserError: fewer than two classes would be left, or the labels of the images are not known.
    """
    missing, ratio = settings.num_missing_classes, settings.imbalance_ratio
    if not missing and ratio == 1:
        return items
    if any(item.label < 0 for item in items):
        key = "NUM_MISSING_CLASSES" if missing else "IMBALANCE_RATIO"
        raise UserError(f"DATASET.{key} needs the labels of the training images, which this data set does not have")
    require_range("DATASET.NUM_MISSING_CLASSES", missing, 0, len(labels) - 2)
    rng = random.Random(f"incomplete {seed}")
    absent = {labels[place] for place in rng.sample(range(len(labels)), missing)}
    kept = []
    for label in sorted(set(labels) - absent):
        images = sorted((item for item in items if item.label == label), key=lambda item: item.impath)
        if ratio > 1 and label % 2 == seed % 2 and images:
            images = rng.sample(images, max(1, round(len(images) / ratio)))
        kept += images
    return sorted(kept, key=lambda item: item.impath)
