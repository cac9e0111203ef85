"""Zero-shot CLIP: the text features of a template, and the unlabelled images with the probabilities they give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from air_plugin.clip.backbone import Backbone
from air_plugin.clip.features import FeatureTable, extract_features
from air_plugin.utils.class_names import fill
from air_plugin.utils.store import Store
from air_plugin.utils.tensors import unit_rows


class _Item(Protocol):
    impath: str


class _DataSet(Protocol):
    """What Dassl's data sets have."""

    train_x: Sequence[_Item]
    train_u: Sequence[_Item] | None


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
    """The files of a Dassl data set's unlabelled images (`train_u`, else `train_x`), in an order no label decides."""
    return sorted(item.impath for item in dataset.train_u or dataset.train_x)


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
