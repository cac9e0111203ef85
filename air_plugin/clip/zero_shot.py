"""Zero-shot CLIP: the text features of a template, and the unlabelled images with the probabilities they give."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from air_plugin.clip.backbone import Backbone
from air_plugin.clip.features import FeatureTable, extract_features
from air_plugin.utils.class_names import fill
from air_plugin.utils.errors import UserError
from air_plugin.utils.store import Store
from air_plugin.utils.tensors import unit_rows

log = logging.getLogger(__name__)


class _Item(Protocol):
    impath: str
    label: int


class _DataSet(Protocol):
    """What Dassl's data sets have."""

    train_x: Sequence[_Item]
    train_u: Sequence[_Item] | None
    val: Sequence[_Item] | None
    test: Sequence[_Item] | None


@dataclass(frozen=True)
class UnlabelledImages:
    """The unlabelled images as the frozen backbone sees them.

    paths: N image files, in the order of the rows below.
    table: their features, (N, V, D).
    probs: (N, C) zero-shot probabilities, rows sum to 1.
    """

    paths: list[str]
    table: FeatureTable
    probs: Tensor

    @property
    def features(self) -> Tensor:
        """(N, D) unit features of the images without augmentation."""
        return unit_rows(self.table.plain, "images")


def template_features(backbone: Backbone, classnames: Sequence[str], template: str) -> Tensor:
    """(C, D) unit text features of a template with one {}, filled with each class name."""
    return backbone.encode_texts([fill(template, name) for name in classnames])


def unlabelled_paths(dataset: _DataSet) -> list[str]:
    """The files of a Dassl data set's unlabelled images (`train_u`, else `train_x`), in an order no label decides.

    Images that accuracy is measured on are left out: nothing may be adapted to them.

    Raises:
        UserError: no image remains, as in CoOp's ImageNetV2, whose train_x is its test set.
    """
    part = "train_u" if dataset.train_u else "train_x"
    paths = sorted(item.impath for item in dataset.train_u or dataset.train_x)
    measured = measured_images(dataset, paths)
    left = [path for path in paths if path not in measured]
    if not left:
        raise UserError(
            f"no unlabelled image remains: all {len(paths):,} images of {part} are in test or val, and the generator "
            "is never adapted to these; give the data set a train_u of other images of its classes, see docs/drop-in.md"
        )
    note = f"; {len(paths) - len(left):,} more are left out, since they are in test or val" if measured else ""
    log.info("unlabelled: %s images of %s%s", f"{len(left):,}", part, note)
    return left


def measured_images(dataset: _DataSet, paths: Iterable[str]) -> set[str]:
    """Those of some image files that are in `val` or `test` with a label, by whatever path or link.

    A test image without a label (-1) is only predicted: no accuracy is measured on it.
    """
    folders: dict[str, str] = {}  # resolved once each: a data set may have a million files

    def real(path: str) -> str:
        folder, name = os.path.split(path)
        if folder not in folders:
            folders[folder] = os.path.realpath(folder)
        return os.path.realpath(path) if os.path.islink(path) else os.path.join(folders[folder], name)

    items = [*(getattr(dataset, "val", None) or ()), *(getattr(dataset, "test", None) or ())]
    measured = {real(item.impath) for item in items if item.label >= 0}
    return {path for path in paths if real(path) in measured}


def look_at_unlabelled(
    backbone: Backbone, paths: Sequence[str], text_features: Tensor, *, store: Store, **extraction: Any
) -> tuple[UnlabelledImages, bool]:
    """Extract the features of the unlabelled images and classify them by zero-shot CLIP.

    Args:
        backbone: the frozen CLIP.
        paths: N image files; their order must not depend on labels.
        text_features: (C, D), see `template_features`.
        store: of the features.
        extraction: more arguments of `extract_features`.

    Returns:
        The images, and whether their features were in the store.
    """
    table, cached = extract_features(backbone, paths, store=store, **extraction)
    probs = backbone.text_probs(table.plain, text_features)
    return UnlabelledImages(list(paths), table, probs), cached
