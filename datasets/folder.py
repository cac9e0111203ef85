"""A person's own images: classes.txt, train/ and, if they have labels to measure with, test/<class>/."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dassl.data.datasets import DATASET_REGISTRY, Datum

from air_plugin.dataset_settings import DatasetSettings
from air_plugin.utils.class_names import match_class, read_class_file
from air_plugin.utils.errors import UserError, unknown
from air_plugin.utils.image_files import find_images, is_image_file, warn_of_left_out, why_left_out
from datasets.base import SplitDataset
from datasets.paradigms import Parts, require_classes

CLASSES, TRAIN, TEST = "classes.txt", "train", "test"
UNLABELLED = "unlabelled"  # a folder in train/ beside those of classes


@DATASET_REGISTRY.register()
class Folder(SplitDataset):
    """DATASET.ROOT itself is the data set; nothing is ever written there.

    Training images have no labels where DATASET.PARADIGM is ul, whatever folders they lie in; else the folders of
    train/ name the labels of the images in them. Without test/ the predictions are made for the unlabelled training
    images, whose labels are -1 for "unknown". Names that begin with a dot are left out, as `ls` does.
    """

    dataset_dir = "folder"
    split_family = "own"
    has_training_labels = False

    @classmethod
    def template_at(cls, root: str) -> str:
        """The template line of classes.txt, if there is one.

        Raises:
            UserError: see `read_class_file`.
        """
        return (read_class_file(class_file(folder_of(root)))[1] if root else "") or cls.template

    def __init__(self, cfg: Any) -> None:
        root = folder_of(cfg.DATASET.ROOT)
        self.folder = root / TRAIN
        names, _ = read_class_file(class_file(root))
        is_unlabelled = cfg.DATASET.PARADIGM == "ul"
        if is_unlabelled and cfg.DATASET.NUM_SHOTS >= 1:
            trainer = cfg.TRAINER.NAME
            learns = trainer.removesuffix("+AiR") == "CoOp"
            hint = (
                "and CoOp learns from labels; use UPL, CPL or AiR"
                if learns
                else f"and {trainer} needs none; leave it out"
            )
            raise UserError(f"DATASET.NUM_SHOTS is {cfg.DATASET.NUM_SHOTS}, but {self.folder} has no labels, {hint}")
        if cfg.DATASET.SUBSAMPLE_CLASSES != "all":
            raise UserError(f"DATASET.SUBSAMPLE_CLASSES must be all: {self.folder} has no labels to choose by")
        found = [(path, -1) for path in find_images(self.folder)] if is_unlabelled else given_labels(self.folder, names)
        train, test = (_items(pairs, names) for pairs in (found, labelled_images(root / TEST, names)))
        super().__init__(cfg, names, train=train, val=[], test=test or train)
        if not test and not is_unlabelled:
            self._test = self.train_u

    def partition(
        self, train: list[Datum], val: list[Datum], names: Sequence[str], *, settings: DatasetSettings
    ) -> Parts:
        """Where some training images lie in no folder of a class, the others are the labelled ones, all of them.

        In trzsl the classes without such a folder are then the unseen ones.
        """
        labelled, rest = ([item for item in train if (item.label >= 0) == known] for known in (True, False))
        if settings.paradigm == "ul" or not rest:
            return super().partition(train, val, names, settings=settings)
        counts = [sum(item.label == label for item in labelled) for label in range(len(names))]
        if settings.paradigm == "ssl":
            number = settings.labels_per_class
            for name, count in zip(names, counts, strict=True):
                if count < number:
                    raise UserError(
                        f"DATASET.PARADIGM ssl needs {number} labelled images of every class "
                        f"(DATASET.LABELS_PER_CLASS); {self.folder} has {count} in the folder of class {name!r}"
                    )
            return Parts(labelled, rest, val, seen=list(range(len(names))))
        require_classes(names)
        seen, unseen = (
            [label for label, count in enumerate(counts) if bool(count) == known] for known in (True, False)
        )
        if not unseen:
            raise UserError(
                f"DATASET.PARADIGM trzsl needs unseen classes, of which no image is labelled; {self.folder} has a "
                "folder of every class: use ssl"
            )
        return Parts(labelled, rest, val, seen, unseen)


def _items(pairs: Iterable[tuple[Path, int]], names: Sequence[str]) -> list[Datum]:
    return [Datum(impath=str(path), label=label, classname=names[label] if label >= 0 else "") for path, label in pairs]


def given_labels(folder: Path, names: list[str]) -> list[tuple[Path, int]]:
    """The images of train/ with their labels, which their folders name; -1 in train/ itself and in train/unlabelled/.

    Raises:
        UserError: a folder is called like no class, or no image has a label.
    """
    if not folder.is_dir():
        raise UserError(f"image folder {folder} is missing")
    found: list[tuple[Path, int]] = []
    left_out = Counter[str]()
    for path in sorted(path for path in folder.iterdir() if not path.name.startswith(".")):
        if not path.is_dir():
            reason = why_left_out(path)
            left_out.update([reason] if reason else [])
            found += [] if reason else [(path, -1)]
            continue
        label = match_class(path.name, names)
        if label is None and path.name != UNLABELLED:
            raise UserError(
                f"{path} is no class of {CLASSES}: {unknown('class', path.name, names)}; images without a label lie in "
                f"{folder} itself or in {folder / UNLABELLED}"
            )
        found += [(image, -1 if label is None else label) for image in find_images(path)]
    if all(label < 0 for _, label in found):
        raise UserError(
            f"DATASET.PARADIGM ssl and trzsl need labelled images, and {folder} has none; put some in "
            f"{folder}/<class>/, or leave the paradigm at ul"
        )
    warn_of_left_out(folder, left_out, used=len(found))
    return found


def folder_of(root: str) -> Path:
    """The person's folder as an absolute path."""
    return Path(os.path.abspath(os.path.expanduser(root)))


def class_file(root: Path) -> Path:
    """Where the class names stand.

    Raises:
        UserError: there is no such file.
    """
    if not (root / CLASSES).is_file():
        raise UserError(
            f"{root / CLASSES} is missing; DATA must name a folder with {CLASSES} (a class name a line), {TRAIN}/ "
            f"(images) and, if you have labels, {TEST}/<class>/"
        )
    return root / CLASSES


def labelled_images(folder: Path, classnames: list[str]) -> list[tuple[Path, int]]:
    """The images of test/<class>/ with their labels; none where there is no such folder.

    Raises:
        UserError: a folder is called like no class or is empty, or an image lies in none.
    """
    if not folder.exists():
        return []
    found: list[tuple[Path, int]] = []
    for path in sorted(path for path in folder.iterdir() if not path.name.startswith(".")):
        if not path.is_dir():
            if is_image_file(path):
                raise UserError(f"{path} lies in no folder of a class; move it to {folder}/<class>/")
            continue
        label = match_class(path.name, classnames)
        if label is None:
            slashes = any("/" in name for name in classnames)
            hint = "; in a folder's name an underscore or a space stands for the / of a class name" if slashes else ""
            raise UserError(f"{path} is no class of {CLASSES}: {unknown('class', path.name, classnames)}{hint}")
        found += [(image, label) for image in find_images(path)]
    if not found:
        raise UserError(f"no images below {folder}; it must hold a folder a class. Remove it if you have no labels")
    return found
