"""Data sets in their published layouts on disk, read in one of two split families."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dassl.data.datasets import Datum

from air_plugin.utils.errors import UserError, unknown
from air_plugin.utils.image_files import is_image_name, warn_of_left_out
from datasets.base import SplitDataset, warn_once
from datasets.class_folders import check_folders, files_in, folder_with, images_in
from datasets.splits import MADE, PARTS, SEED, Item, Split, class_names, divide, read_split, save_split

FAMILIES = ("zhou", "elevater")


class PublishedDataset(SplitDataset):
    """A data set in its published layout (CoOp's DATASETS.md; docs/datasets.md here), in one of two split families.

    "zhou": the authors' split_zhou_*.json where it lies there; else a split of the same kind, made here once from seed
    0 and saved as MADE. "elevater": the data set's own train and test lists (own val images count as training images).
    A subclass sets the attributes and overrides what it does differently: `own_lists` and `zhou_split`.

    Attributes:
        dataset_dir: folder below DATASET.ROOT.
        image_dir: folder of the images below that; "" is the folder itself. Paths of a split begin here.
        classes: how many there are.
        split_file: name of CoOp's split; "" where there is none.
        sizes: family -> published numbers of train, val and test images; others are warned about.
        covered: the own lists name every image on disk; if one is named nowhere, a list was cut short.
        folders: names of the class folders, as published; empty where lists name the folders, or there are none.
        balanced: every own list has the same number of images of every class; other numbers mean the same.
        own_is_zhou: CoOp itself uses the own lists, so no split is made.
        grip: label -> class name where those of GRIP and CPL (DATASET.CLASS_NAMES grip) differ; None: it has none.
        split_family: the family that was used in fact, for result.json.
    """

    image_dir = "images"
    classes = 0
    split_file = ""
    folders: Sequence[str] = ()
    sizes: Mapping[str, tuple[int, int, int]] = {}
    covered = False
    balanced = False
    own_is_zhou = False
    grip: Mapping[int, str] | None = None

    def __init__(self, cfg: Any) -> None:
        self.root = Path(os.path.abspath(os.path.expanduser(cfg.DATASET.ROOT)))
        self.folder = self.root / self.dataset_dir
        self.remedy = self.command  # messages about a split end with it
        self.reading = self.folder  # the file that was read last; messages name it
        self.images = self.need(self.image_dir)
        family = cfg.DATASET.SPLIT_FAMILY
        if family not in FAMILIES:
            raise unknown("split family (DATASET.SPLIT_FAMILY)", family, FAMILIES)
        self.split_family = family
        split = self._zhou() if family == "zhou" else self._elevater()
        names = self.renamed(self._names_in(split), cfg.DATASET.CLASS_NAMES)
        self.check_images(split)
        if self.reading == self.folder / MADE:
            self._check_made(split)
        self.warn_of_sizes(split)
        super().__init__(
            cfg,
            names,
            train=self._read(split["train"], names),
            val=self._read(split["val"], names),
            test=self._read(split["test"], names),
        )

    def _read(self, items: list[Item], names: list[str]) -> list[Datum]:
        return [Datum(impath=str(self.images / path), label=label, classname=names[label]) for path, label, _ in items]

    def _names_in(self, split: Split) -> list[str]:
        return class_names(split, number=self.classes, where=str(self.reading), remedy=self.remedy)

    # The two families

    def _zhou(self) -> Split:
        if self.split_file and (self.folder / self.split_file).is_file():
            return read_split(self.need(self.split_file), remedy=self.remedy)
        if self.own_is_zhou:
            return self._guarded(self.own_lists)
        self.split_family = f"zhou, made here (seed {SEED})"
        if (self.folder / MADE).is_file():
            self.remedy = "remove it, and it is made again"
            return read_split(self.need(MADE), remedy=self.remedy)
        split = self._guarded(self.zhou_split)
        self._names_in(split)  # do not save what is not whole
        self.check_images(split)
        save_split(split, self.folder / MADE)
        return split

    def _check_made(self, split: Split) -> None:
        """Compare a split that was made here with what would be made now: images may have come since.

        Raises:
            UserError: they differ; the message says in what.
        """
        made = _places(split)
        now = _places(self._guarded(self.zhou_split))
        kinds = {"are new": sorted(now.keys() - made.keys()), "are gone": sorted(made.keys() - now.keys())}
        if not any(kinds.values()):  # else the rest is divided otherwise, too
            kinds = {"have another class or part": sorted(path for path in made if made[path] != now[path])}
        faults = [f"{len(paths):,} images {kind}, first {paths[0]}" for kind, paths in kinds.items() if paths]
        if faults:
            raise UserError(
                f"{self.folder / MADE} was made from {len(made):,} images that were there then; today "
                f"{', '.join(faults)}; remove it, and it is made again"
            )

    def _elevater(self) -> Split:
        own = self._guarded(self.own_lists)
        return {"train": own["train"] + own["val"], "val": [], "test": own["test"]}

    def _guarded(self, read: Any) -> Split:
        """The split that a reader of lists returns; any fault in a list becomes one line that names the file."""
        try:
            split = read()
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            fault = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
            raise UserError(f"{self.reading} is damaged or of another data set ({fault}); {self.command}") from error
        self.reading = self.folder  # a later fault may be in another file
        return split

    def own_lists(self) -> Split:
        """The data set's own lists; "val" may be empty.

        Raises:
            UserError: it has none, or a file is missing.
        """
        raise UserError(f"{self.name} has no train and test lists of its own; use DATASET.SPLIT_FAMILY zhou")

    def zhou_split(self) -> Split:
        """A new split of the kind that CoOp makes; here of the class folders."""
        return self.divided(self.by_folder())

    def divided(self, items: Sequence[Item]) -> Split:
        """CoOp's split of data sets that it divides itself: 50 % train, 20 % val and 30 % test of every class."""
        return divide(items, {"train": 0.5, "val": 0.2}, rest="test")

    def held_out(self) -> Split:
        """CoOp's split of data sets with a test list of their own: 20 % of the training images are val."""
        own = self.own_lists()
        return {**divide(own["train"] + own["val"], {"val": 0.2}, rest="train"), "test": own["test"]}

    # For subclasses: reading files

    @property
    def name(self) -> str:
        """The module's name, which is also the data set's on the command line."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def command(self) -> str:
        """What fetches the data set."""
        return self.command_at(self.root)

    @classmethod
    def command_at(cls, root: Path) -> str:
        """What fetches the data set to a root."""
        return f"python prepare.py {cls.__module__.rpartition('.')[2]} --root {shlex.quote(str(root))}"

    def need(self, path: str, *, why: str = "") -> Path:
        """A file or folder of the data set; it becomes `reading`, which error messages name.

        Raises:
            UserError: it is missing.
        """
        self.reading = self.folder / path
        if self.reading.exists():
            return self.reading
        missing = next(folder for folder in (self.root, self.folder, self.reading) if not folder.exists())
        other = folder_with(self.folders, self.folder) if path and path == self.image_dir else None
        remedy = f"{other} holds such folders: rename it" if other else f"fetch it: {self.command}"
        raise UserError(f"{self.name}: {missing} is missing{why}; {remedy}")

    def lines(self, path: str, *, fields: int, why: str = "") -> list[list[str]]:
        """The lines of a list, cut at spaces into so many fields, of which the last takes the rest.

        Raises:
            UserError: the list is missing, is no text, or a line has fewer fields.
        """
        file = self.need(path, why=why)
        try:
            texts = [text.strip() for text in file.read_text(encoding="utf-8").splitlines() if text.strip()]
        except (UnicodeDecodeError, OSError) as error:
            raise UserError(f"{file} is no list ({error}); fetch it again: {self.command}") from error
        rows = [text.split(" ", fields - 1) for text in texts]
        for number, row in enumerate(rows, start=1):
            if len(row) < fields:
                raise UserError(f"{file}, line {number} has {len(row)} instead of {fields} fields; {self.command}")
        return rows

    def matrix(self, path: str) -> dict[str, Any]:
        """The variables of a MATLAB file.

        Raises:
            UserError: it is missing or cannot be read.
        """
        from scipy.io import loadmat

        file = self.need(path)
        try:
            return loadmat(str(file), squeeze_me=True)
        except Exception as error:  # scipy raises what its C code stumbles over
            raise UserError(f"{file} is damaged ({error}); fetch it again: {self.command}") from error

    def one_a_class(self, names: Sequence[str]) -> Sequence[str]:
        """The class names of the file that was read last, as they are.

        Raises:
            ValueError: there are too many or too few.
        """
        if len(names) != self.classes:
            raise ValueError(f"{len(names)} class names instead of {self.classes}")
        return names

    def known_folders(self) -> Sequence[str]:
        """The names of the class folders, in any order."""
        return self.folders

    def class_folders(self, ignored: Iterable[str] = ()) -> list[str]:
        """The names of the class folders, sorted: a class's label is its place here, whatever lies on disk.

        Args:
            ignored: folders that are no class.

        Raises:
            UserError: a folder is missing, or is of no class.
        """
        known = sorted(set(self.known_folders()))
        check_folders(self.images, known, ignored=ignored, command=self.command)
        return known

    def by_folder(self, names: Mapping[str, str] | None = None, *, ignored: Iterable[str] = ()) -> list[Item]:
        """Every image of the class folders.

        Args:
            names: folder -> class name, where it is not the folder's.
            ignored: folders that are no class.

        Raises:
            UserError: a folder is missing, is of no class, or has no images.
        """
        items: list[Item] = []
        left_out = Counter[str]()
        for label, folder in enumerate(self.class_folders(ignored)):
            files = images_in(self.images / folder, left_out)
            if not files:
                raise UserError(f"{self.images / folder} has no images; {self.command}")
            items.extend((f"{folder}/{file}", label, (names or {}).get(folder, folder)) for file in files)
        warn_of_left_out(self.images, left_out, used=len(items))
        return items

    def renamed(self, names: list[str], version: str) -> list[str]:
        """The class names in the version that DATASET.CLASS_NAMES asks for.

        Raises:
            UserError: the data set has no such version.
        """
        if version == "coop":
            return names
        if version != "grip" or self.grip is None:
            known = ("coop",) if self.grip is None else ("coop", "grip")
            raise unknown(f"class names (DATASET.CLASS_NAMES) of {self.name}", version, known)
        return [self.grip.get(label, name) for label, name in enumerate(names)]

    # Checks

    def check_images(self, split: Split) -> None:
        """Look for every listed image, by listing folders and not by opening files.

        Raises:
            UserError: some are missing, are in no list (`covered`), or a list is not `balanced`.
        """
        listed = [path for part in PARTS for path, _, _ in split[part]]
        folders = {os.path.dirname(path) for path in listed}
        present = {os.path.join(folder, file) for folder in folders for file in files_in(self.images / folder)}
        missing = [path for path in listed if path not in present]
        if missing:
            first = self.images / missing[0]
            raise UserError(f"{len(missing)} of {len(listed)} images are missing, first: {first}; {self.command}")
        if self.split_family != "elevater" and not self.own_is_zhou:
            return
        left_over = sorted(filter(is_image_name, present - set(listed)))
        if self.covered and left_over:
            raise UserError(
                f"the lists of {self.folder} do not name {len(left_over)} of the images, such as {left_over[0]}: "
                f"one is cut short; {self.command}"
            )
        for part in PARTS if self.balanced else ():
            counts = Counter(name for _, _, name in split[part])
            if len(set(counts.values())) > 1:
                (most, many), *_, (least, few) = counts.most_common()
                raise UserError(
                    f"the {part} list of {self.folder} has {many} images of {most} and {few} of {least}, "
                    f"which should be as many: it is cut short; {self.command}"
                )

    def warn_of_sizes(self, split: Split) -> None:
        """Warn where a split is not as large as the published one."""
        found = tuple(len(split[part]) for part in PARTS)
        published = self.sizes.get(self.split_family.split(",")[0], found)
        if found != published:
            numbers = [" + ".join(f"{number:,}" for number in some) for some in (found, published)]
            warn_once(f"{self.folder} has {numbers[0]} train + val + test images; published: {numbers[1]}")


def _places(split: Split) -> dict[str, tuple[str, int, str]]:
    """Path -> part, label and class name."""
    return {path: (part, label, name) for part in PARTS for path, label, name in split[part]}
