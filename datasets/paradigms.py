"""Which training images are labelled: the unsupervised, semi-supervised and transductive zero-shot paradigms.

ul and ssl are those of GRIP (Menghini et al., NeurIPS 2023, arXiv 2306.01669) and CPL (Zhang et al., ICML 2024, arXiv
2406.10502), trzsl is theirs, too, with GRIP's seeds for the choice of the seen classes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dassl.data.datasets import Datum

from air_plugin.dataset_settings import DatasetSettings
from air_plugin.utils.errors import UserError

SEEN_SHARE = 0.62  # of the classes, rounded down
LABELS_SEED = 0  # of the labelled images in ssl
FEWEST_CLASSES = 3  # in trzsl


@dataclass
class Parts:
    """The training images of a data set by their part in a paradigm.

    labelled: with their true labels. unlabelled: with the labels that trainers must not see, -1 where nobody has them.
    val: labelled images that no method trains on.
    seen: labels of the classes that labelled images may have; unseen: of the others.
    """

    labelled: list[Datum]
    unlabelled: list[Datum]
    val: list[Datum]
    seen: list[int]
    unseen: list[int] = field(default_factory=list)


def semi_supervised(
    train: Sequence[Datum], val: list[Datum], names: Sequence[str], *, settings: DatasetSettings
) -> Parts:
    """A few labelled images of each class; the other training images are unlabelled.

    They are chosen class by class from the sorted paths, with numpy's RandomState(0): the run's seed has no part in it.

    Raises:
        UserError: a class has too few images.
    """
    import numpy as np

    rng, number = np.random.RandomState(LABELS_SEED), settings.labels_per_class
    labelled: list[Datum] = []
    for label, items in enumerate(_by_class(train, len(names))):
        if len(items) <= number:
            raise UserError(
                f"DATASET.PARADIGM ssl needs {number + 1} training images of every class, {number} labelled "
                f"(DATASET.LABELS_PER_CLASS) and one that is not; class {names[label]!r} has {len(items)}"
            )
        chosen = rng.choice(len(items), number, replace=False).tolist()
        labelled += [items[place] for place in sorted(chosen)]
    taken = set(map(id, labelled))  # not by their paths: an image that is listed twice must be found
    rest = [item for item in train if id(item) not in taken]
    return Parts(labelled, rest, val, seen=list(range(len(names))))


def transductive(
    train: Sequence[Datum], val: list[Datum], names: Sequence[str], *, order: Sequence[int], settings: DatasetSettings
) -> Parts:
    """Labelled images of the seen classes, unlabelled images of the unseen ones; val images of seen classes only.

    Args:
        train, val: of all classes.
        names: C class names.
        order: the C labels in the order that the seen classes are chosen from.
        settings: share and seed.

    Raises:
        UserError: there are too few classes, or none of their images is labelled or unlabelled.
    """
    import numpy as np

    require_classes(names)
    rng, number = np.random.RandomState(settings.split_seed), len(names)
    seen = [order[place] for place in rng.choice(range(number), int(SEEN_SHARE * number), replace=False)]
    labelled: list[Datum] = []
    left: list[Datum] = []
    groups = _by_class(train, number)
    for label in sorted(seen):
        items = groups[label]
        if not items:
            raise UserError(f"DATASET.PARADIGM trzsl: the seen class {names[label]!r} has no training image")
        kept = max(1, round(settings.seen_labelled * len(items)))
        chosen = set(rng.choice(len(items), kept, replace=False).tolist()) if kept < len(items) else range(len(items))
        labelled += [item for place, item in enumerate(items) if place in chosen]
        left += [item for place, item in enumerate(items) if place not in chosen]
    unseen = sorted(set(range(number)) - set(seen))
    unlabelled = [item for item in train if item.label in unseen]
    if not unlabelled:
        raise UserError("DATASET.PARADIGM trzsl: no training image is of an unseen class")
    return Parts(labelled, unlabelled, [*(item for item in val if item.label in seen), *left], seen, unseen)


def require_classes(names: Sequence[str]) -> None:
    """Raise a UserError where trzsl has too few classes."""
    if len(names) < FEWEST_CLASSES:
        raise UserError(
            f"DATASET.PARADIGM trzsl needs at least {FEWEST_CLASSES} classes, of which some are seen and some are not; "
            f"there are {len(names)}"
        )


def require_disjoint(labelled: Iterable[Datum], unlabelled: Iterable[Datum]) -> None:
    """Raise a UserError that names an image which is labelled and unlabelled, by whatever path or link."""
    known = {_file(item.impath): item.impath for item in labelled}
    for item in unlabelled:
        other = known.get(_file(item.impath))
        if other is not None:
            same = "" if other == item.impath else f", which is the same file as {other},"
            raise UserError(f"{item.impath}{same} is among the labelled and the unlabelled training images; remove one")


def _file(path: str) -> tuple[int, int]:
    """What all paths and links of one file share."""
    found = os.stat(path)
    return found.st_dev, found.st_ino


def _by_class(items: Iterable[Datum], number: int) -> list[list[Datum]]:
    """The items of each class, sorted by path: the order on disk has no part in what is chosen."""
    groups: list[list[Any]] = [[] for _ in range(number)]
    for item in sorted(items, key=lambda item: item.impath):
        groups[item.label].append(item)
    return groups
