"""What every data set shares: fixed lists, few-shot sampling, an unlabelled training set, and facts about itself."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

from dassl.data.datasets import DatasetBase, Datum

from air_plugin.dataset_settings import DatasetSettings
from air_plugin.utils.class_names import warn_of_same_prompts
from air_plugin.utils.errors import UserError, unknown
from datasets.incomplete import incomplete
from datasets.paradigms import Parts, require_disjoint, semi_supervised, transductive
from datasets.sources import Source

LOG = logging.getLogger("air_plugin.datasets")  # an entry shows what `air_plugin` logs
SUBSETS = ("all", "base", "new")


class SplitDataset(DatasetBase):
    """A data set with fixed train, val and test lists.

    train_x: labelled training images, DATASET.NUM_SHOTS a class where that is at least 1 (val: at most 4), else all.
    train_u: the unlabelled ones, with the label -1 and in the order of the paths.
    hidden_labels: path -> label of train_u, for metrics after training only; empty where one of them is unknown.
    Where DATASET.PARADIGM is ul (unsupervised), train_u is every training image, and a method that needs no labels
    leaves train_x alone. In ssl and trzsl every training image is labelled, unlabelled or left out, and a labelled one
    is never in train_u; see datasets/paradigms.py.
    The class names are the data set's own, so they do not depend on which labels occur. DATASET.SUBSAMPLE_CLASSES
    "base" keeps the first half of the classes (rounded up), "new" the second; labels then begin at 0 again. Shots are
    sampled before that, train before val, as CoOp does: the same seed gives the same shots.

    Attributes:
        paradigm: DATASET.PARADIGM.
        seen, unseen: labels of the classes that labelled images may have, and of the others; without trzsl all are
            seen.
        unlabelled_classes: labels of the classes that pseudo-labels may have: all, in trzsl the unseen ones.

    Attributes, for whoever has the class only (train.py, prepare.py, the scripts):
        dataset_dir: folder below DATASET.ROOT.
        template: of the prompts, where neither a config file nor an option sets DATASET.TEMPLATE.
        source: where the data set is fetched from.
        has_training_labels: scripts leave methods that need labels out where this is False and PARADIGM is ul.
    """

    dataset_dir = ""
    template = "a photo of a {}."
    source = Source()
    has_training_labels = True

    @classmethod
    def template_at(cls, root: str) -> str:
        """The template of the data set below this root."""
        return cls.template

    def __init__(
        self, cfg: Any, classnames: Sequence[str], *, train: list[Datum], val: list[Datum], test: list[Datum]
    ) -> None:
        subset = cfg.DATASET.SUBSAMPLE_CLASSES
        if subset not in SUBSETS:
            raise unknown("DATASET.SUBSAMPLE_CLASSES", subset, SUBSETS)
        settings = DatasetSettings.from_cfg(cfg)
        parts = self.partition(train, val, classnames, settings=settings)
        if settings.paradigm != "ul":
            require_disjoint(parts.labelled, parts.unlabelled)
        classes = parts.unseen or list(range(len(classnames)))
        unlabelled = incomplete(parts.unlabelled, classes, settings=settings, seed=max(cfg.SEED, 0))
        labelled, val = unlabelled if settings.paradigm == "ul" else parts.labelled, parts.val
        shots = cfg.DATASET.NUM_SHOTS
        if shots >= 1:
            labelled = self.generate_fewshot_dataset(labelled, num_shots=shots)
            val = self.generate_fewshot_dataset(val, num_shots=min(shots, 4)) if val else val
        half = (len(classnames) + 1) // 2
        kept = {"all": range(len(classnames)), "base": range(half), "new": range(half, len(classnames))}[subset]
        if subset != "all":
            unlabelled, labelled, val, test = (_keep(items, kept) for items in (unlabelled, labelled, val, test))
        self._names = [classnames[label] for label in kept]
        warn_of_same_prompts(tuple(self._names))
        self.paradigm = settings.paradigm
        self.seen, self.unseen = (list(range(len(kept))), []) if subset != "all" else (parts.seen, parts.unseen)
        self.unlabelled_classes = self.unseen or list(range(len(kept)))
        known = all(item.label >= 0 for item in unlabelled)
        self.hidden_labels = {item.impath: item.label for item in unlabelled} if known else {}
        train_u = [Datum(impath=path, label=-1) for path in sorted({item.impath for item in unlabelled})]
        super().__init__(train_x=labelled, train_u=train_u, val=val or None, test=test)

    def partition(
        self, train: list[Datum], val: list[Datum], names: Sequence[str], *, settings: DatasetSettings
    ) -> Parts:
        """The labelled and the unlabelled training images of DATASET.PARADIGM.

        Raises:
            UserError: the data set cannot serve the paradigm; the message names the reason.
        """
        if settings.paradigm == "ul":
            return Parts(train, train, val, seen=list(range(len(names))))
        missing = [item.impath for item in train if item.label < 0]
        if missing:
            raise UserError(
                f"DATASET.PARADIGM {settings.paradigm} needs training labels, and {len(missing)} of {len(train)} "
                f"training images of {self.dataset_dir} have none, first {missing[0]}"
            )
        if settings.paradigm == "ssl":
            return semi_supervised(train, val, names, settings=settings)
        if settings.subsample_classes != "all":
            raise UserError(
                "DATASET.PARADIGM trzsl divides the classes itself, into seen and unseen ones; "
                f"DATASET.SUBSAMPLE_CLASSES is {settings.subsample_classes} and must be all"
            )
        return transductive(train, val, names, order=self.class_order(names), settings=settings)

    def class_order(self, names: Sequence[str]) -> Sequence[int]:
        """The labels in the order of GRIP's class names, which its seeds of seen classes belong to."""
        return range(len(names))

    @property
    def num_classes(self) -> int:
        return len(self._names)

    @property
    def classnames(self) -> list[str]:
        return self._names

    @property
    def lab2cname(self) -> dict[int, str]:
        return dict(enumerate(self._names))


@functools.cache
def warn_once(message: str) -> None:
    """Warn, once in a process: a run reads its data set several times."""
    LOG.warning(message)


def _keep(items: list[Datum], kept: range) -> list[Datum]:
    """The items of some classes, with labels that begin at 0."""
    return [
        Datum(impath=item.impath, label=item.label - kept.start, classname=item.classname)
        for item in items
        if item.label in kept
    ]
