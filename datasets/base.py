"""What every data set shares: splits, few-shot sampling, and an unlabelled training set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dassl.data.datasets import DatasetBase, Datum


class SplitDataset(DatasetBase):
    """A data set with fixed train, val and test lists.

    train_x: labelled training images, DATASET.NUM_SHOTS a class where that is at least 1 (val: at most 4), else all.
    train_u: every training image, without its label (-1) and in the order of the paths.
    hidden_labels: path -> label of train_u, for figures after training only.
    The class names are the data set's own, so they do not depend on which labels occur.
    """

    def __init__(
        self, cfg: Any, classnames: Sequence[str], *, train: list[Datum], val: list[Datum], test: list[Datum]
    ) -> None:
        self._names = list(classnames)
        self.hidden_labels = {item.impath: item.label for item in train}
        train_u = [Datum(impath=path, label=-1) for path in sorted(self.hidden_labels)]
        shots = cfg.DATASET.NUM_SHOTS
        if shots >= 1:
            train = self.generate_fewshot_dataset(train, num_shots=shots)
            val = self.generate_fewshot_dataset(val, num_shots=min(shots, 4)) if val else val
        super().__init__(train_x=train, train_u=train_u, val=val or None, test=test)

    @property
    def num_classes(self) -> int:
        return len(self._names)

    @property
    def classnames(self) -> list[str]:
        return self._names

    @property
    def lab2cname(self) -> dict[int, str]:
        return dict(enumerate(self._names))
