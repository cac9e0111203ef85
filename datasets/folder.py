"""A person's own images: classes.txt, train/ and, if they have labels to measure with, test/<class>/."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from dassl.data.datasets import DATASET_REGISTRY, Datum

from air_plugin.utils.class_names import match_class, read_class_file
from air_plugin.utils.errors import UserError, unknown
from air_plugin.utils.image_files import find_images, is_image_file
from datasets.base import SplitDataset

CLASSES, TRAIN, TEST = "classes.txt", "train", "test"


@DATASET_REGISTRY.register()
class Folder(SplitDataset):
    """DATASET.ROOT itself is the data set; nothing is ever written there.

    Training images have no labels. Without test/ the predictions are made for the training images, whose labels are -1
    for "unknown". Names that begin with a dot are left out, as `ls` does.
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
        names, _ = read_class_file(class_file(root))
        if cfg.DATASET.NUM_SHOTS >= 1:
            trainer = cfg.TRAINER.NAME
            learns = trainer.removesuffix("+AiR") == "CoOp"
            hint = (
                "and CoOp learns from labels; use UPL, CPL or AiR"
                if learns
                else f"and {trainer} needs none; leave it out"
            )
            raise UserError(f"DATASET.NUM_SHOTS is {cfg.DATASET.NUM_SHOTS}, but {root / TRAIN} has no labels, {hint}")
        if cfg.DATASET.SUBSAMPLE_CLASSES != "all":
            raise UserError(f"DATASET.SUBSAMPLE_CLASSES must be all: {root / TRAIN} has no labels to choose by")
        train = [Datum(impath=str(path), label=-1) for path in find_images(root / TRAIN)]
        tested = [
            Datum(impath=str(path), label=label, classname=names[label])
            for path, label in labelled_images(root / TEST, names)
        ]
        super().__init__(cfg, names, train=train, val=[], test=tested or train)
        self.hidden_labels = {}


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
