"""Labelled images beside the unlabelled ones: what the paradigms ssl and trzsl add to training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from air_plugin.clip.features import FeatureBatches, Sampled
from air_plugin.utils.seeding import stable_seed

FEWEST, MOST = 8, 256  # images in a labelled batch (CPL)


@dataclass(frozen=True)
class LabelledImages:
    """The labelled training images of the paradigms ssl and trzsl; there are none in ul.

    paths: L image files, sorted. labels: L classes.
    """

    paths: list[str]
    labels: list[int]

    @classmethod
    def of(cls, dataset: Any) -> LabelledImages:
        """Those of a data set: `train_x`, but in ul, where labels of training images are hidden."""
        paradigm = getattr(dataset, "paradigm", "ul")
        items = sorted(dataset.train_x, key=lambda item: item.impath) if paradigm != "ul" else []
        return cls([item.impath for item in items], [item.label for item in items])

    def __len__(self) -> int:
        return len(self.paths)


def unlabelled_classes(dataset: Any) -> list[int] | None:
    """The classes that an unlabelled image may have, ascending; None where that is all of them (ul, ssl)."""
    classes = getattr(dataset, "unlabelled_classes", None)
    return None if classes is None or len(classes) == len(dataset.classnames) else sorted(classes)


class LabelledBatches(FeatureBatches):
    """Batches of labelled images, as many in an epoch as the unlabelled images have.

    Every batch is full. The images are cycled through, in another order each time; the orders of an epoch depend only
    on the seed and the epoch, and differ from those of the unlabelled images.

    Args:
        table: of L images.
        labels: (L,) classes; batches contain them as `label`.
        batch_size: images of each member in a batch; may be larger than L.
        batches: in an epoch.
        seed, epoch, members: as in FeatureBatches.
    """

    def __init__(
        self,
        table: Sampled,
        labels: Tensor,
        *,
        batch_size: int,
        batches: int,
        seed: int,
        epoch: Callable[[], int],
        members: int = 1,
    ) -> None:
        index = torch.arange(len(labels), device=labels.device)
        seed = stable_seed("labelled", seed)
        super().__init__(table, index, {"label": labels}, batch_size=1, seed=seed, epoch=epoch, members=members)
        self.batch_size, self.batches = batch_size, batches

    def __len__(self) -> int:
        return self.batches

    def order(self, rng: torch.Generator) -> Tensor:
        """Permutations of the images, one after the other, until there are enough for an epoch."""
        cycles = math.ceil(self.batches * self.batch_size / len(self.index))
        return torch.cat([torch.randperm(len(self.index), generator=rng) for _ in range(cycles)])


class BothBatches:
    """Batches of unlabelled images, and beside each a batch of labelled ones.

    Yields:
        What the unlabelled batches contain, and `labelled` (E * B, D) with `label` (E * B,).
    """

    def __init__(self, unlabelled: FeatureBatches, labelled: LabelledBatches) -> None:
        self.unlabelled, self.labelled = unlabelled, labelled

    @property
    def targets(self) -> dict[str, Tensor]:
        """Of the unlabelled images, see FeatureBatches."""
        return self.unlabelled.targets

    def __len__(self) -> int:
        return len(self.unlabelled)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch, beside in zip(self.unlabelled, self.labelled, strict=True):
            yield {**batch, "labelled": beside["img"], "label": beside["label"]}


def labelled_batch(batch: int, *, labelled: int, selected: int) -> int:
    """Labelled images beside a batch of unlabelled ones, in proportion to their numbers, within limits (CPL).

    >>> labelled_batch(64, labelled=20, selected=160), labelled_batch(64, labelled=5000, selected=160)
    (8, 256)
    """
    return min(max(batch * labelled // selected, FEWEST), MOST)
