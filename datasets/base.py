"""What every data set shares: splits, few-shot sampling, an unlabelled training set, and published layouts on disk."""

from __future__ import annotations

import errno
import json
import os
import random
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from dassl.data.datasets import DatasetBase, Datum

from air_plugin.utils.errors import UserError, unknown
from air_plugin.utils.files import SUFFIXES, write_atomically

Item = tuple[str, int, str]  # path below the image folder (with /), label, class name
Split = dict[str, list[Item]]  # its keys are PARTS
PARTS = ("train", "val", "test")
FAMILIES = ("zhou", "elevater")
SUBSETS = ("all", "base", "new")
SEED = 0  # of every split that is made here
MADE = f"split_made_here_seed{SEED}.json"


class SplitDataset(DatasetBase):
    """A data set with fixed train, val and test lists.

    train_x: labelled training images, DATASET.NUM_SHOTS a class where that is at least 1 (val: at most 4), else all.
    train_u: every training image, without its label (-1) and in the order of the paths.
    hidden_labels: path -> label of train_u, for figures after training only.
    The class names are the data set's own, so they do not depend on which labels occur. DATASET.SUBSAMPLE_CLASSES
    "base" keeps the first half of the classes (rounded up), "new" the second; labels then begin at 0 again. Shots are
    drawn before that, train before val, as CoOp does: the same seed gives the same shots.
    """

    def __init__(
        self, cfg: Any, classnames: Sequence[str], *, train: list[Datum], val: list[Datum], test: list[Datum]
    ) -> None:
        subset = cfg.DATASET.SUBSAMPLE_CLASSES
        if subset not in SUBSETS:
            raise unknown("DATASET.SUBSAMPLE_CLASSES", subset, SUBSETS)
        everything = train
        shots = cfg.DATASET.NUM_SHOTS
        if shots >= 1:
            train = self.generate_fewshot_dataset(train, num_shots=shots)
            val = self.generate_fewshot_dataset(val, num_shots=min(shots, 4)) if val else val
        half = (len(classnames) + 1) // 2
        kept = {"all": range(len(classnames)), "base": range(half), "new": range(half, len(classnames))}[subset]
        if subset != "all":
            everything, train, val, test = (_keep(items, kept) for items in (everything, train, val, test))
        self._names = [classnames[label] for label in kept]
        self.hidden_labels = {item.impath: item.label for item in everything}
        train_u = [Datum(impath=path, label=-1) for path in sorted(self.hidden_labels)]
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


def _keep(items: list[Datum], kept: range) -> list[Datum]:
    """The items of some classes, with labels that begin at 0."""
    return [
        Datum(impath=item.impath, label=item.label - kept.start, classname=item.classname)
        for item in items
        if item.label in kept
    ]


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
        covered: every image on disk is in one of the own lists; one that is not tells of a list that was cut short.
        balanced: every own list has the same number of images of every class; the same purpose.
        own_is_zhou: CoOp itself uses the own lists, so that nothing need be made.
        grip: label -> class name where GRIP's and CPL's wording (DATASET.CLASS_NAMES "grip") differs; None: has none.
        split_family: what was really used, for result.json.
    """

    image_dir = "images"
    classes = 0
    split_file = ""
    sizes: Mapping[str, tuple[int, int, int]] = {}
    covered = False
    balanced = False
    own_is_zhou = False
    grip: Mapping[int, str] | None = None

    def __init__(self, cfg: Any) -> None:
        self.root = Path(os.path.abspath(os.path.expanduser(cfg.DATASET.ROOT)))
        self.folder = self.root / self.dataset_dir
        self.remedy = self.command  # what the messages on a split end with
        self.source = self.folder  # what messages speak of: the file that was read last
        self.images = self.need(self.image_dir)
        family = cfg.DATASET.SPLIT_FAMILY
        if family not in FAMILIES:
            raise unknown("split family (DATASET.SPLIT_FAMILY)", family, FAMILIES)
        self.split_family = family
        split = self._zhou() if family == "zhou" else self._elevater()
        names = self.worded(self._names_in(split), cfg.DATASET.CLASS_NAMES)
        self.check_images(split)
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
        return class_names(split, number=self.classes, where=str(self.source), remedy=self.remedy)

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

    def _elevater(self) -> Split:
        own = self._guarded(self.own_lists)
        return {"train": own["train"] + own["val"], "val": [], "test": own["test"]}

    def _guarded(self, read: Any) -> Split:
        """What a reader of lists returns; whatever it stumbles over becomes one line that names the file."""
        try:
            split = read()
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            fault = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
            raise UserError(f"{self.source} is damaged or of another data set ({fault}); {self.command}") from error
        self.source = self.folder  # a fault that shows later need not be the last file's
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

    # What subclasses read with

    @property
    def name(self) -> str:
        """The module's name, which is also the data set's on the command line."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def command(self) -> str:
        """What fetches the data set."""
        return f"python prepare.py {self.name} --root {shlex.quote(str(self.root))}"

    def need(self, path: str, *, why: str = "") -> Path:
        """A file or folder of the data set; it becomes `source`, what error messages speak of.

        Raises:
            UserError: it is missing.
        """
        self.source = self.folder / path
        if self.source.exists():
            return self.source
        missing = next(folder for folder in (self.root, self.folder, self.source) if not folder.exists())
        raise UserError(f"{self.name}: {missing} is missing{why}; fetch it: {self.command}")

    def lines(self, path: str, *, fields: int, why: str = "") -> list[list[str]]:
        """The lines of a list, cut at spaces into so many fields, of which the last takes the rest.

        Raises:
            UserError: the list is missing, is no text, or a line has fewer fields.
        """
        source = self.need(path, why=why)
        try:
            texts = [text.strip() for text in source.read_text(encoding="utf-8").splitlines() if text.strip()]
        except (UnicodeDecodeError, OSError) as error:
            raise UserError(f"{source} is no list ({error}); fetch it again: {self.command}") from error
        rows = [text.split(" ", fields - 1) for text in texts]
        for number, row in enumerate(rows, start=1):
            if len(row) < fields:
                raise UserError(f"{source}, line {number} has {len(row)} instead of {fields} fields; {self.command}")
        return rows

    def matrix(self, path: str) -> dict[str, Any]:
        """The variables of a MATLAB file.

        Raises:
            UserError: it is missing or cannot be read.
        """
        from scipy.io import loadmat

        source = self.need(path)
        try:
            return loadmat(str(source), squeeze_me=True)
        except Exception as error:  # scipy raises what its C code stumbles over
            raise UserError(f"{source} is damaged ({error}); fetch it again: {self.command}") from error

    def one_a_class(self, names: Sequence[str]) -> Sequence[str]:
        """The class names of the file that was read last, as they are.

        Raises:
            ValueError: there are too many or too few.
        """
        if len(names) != self.classes:
            raise ValueError(f"{len(names)} class names instead of {self.classes}")
        return names

    def class_folders(self, ignored: Iterable[str] = ()) -> list[str]:
        """The names of the class folders, sorted.

        Raises:
            UserError: there are too many or too few.
        """
        with os.scandir(self.images) as entries:
            found = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
        folders = [folder for folder in found if folder not in set(ignored)]
        if len(folders) != self.classes:
            raise UserError(f"{self.images} has {len(folders)} class folders instead of {self.classes}; {self.command}")
        return folders

    def by_folder(self, names: Mapping[str, str] | None = None, *, ignored: Iterable[str] = ()) -> list[Item]:
        """Every image of the class folders; labels in the order of the folders.

        Args:
            names: folder -> class name, where it is not the folder's.
            ignored: folders that are no class.

        Raises:
            UserError: the number of folders is wrong, or one has no images.
        """
        items: list[Item] = []
        for label, folder in enumerate(self.class_folders(ignored)):
            files = images_in(self.images / folder)
            if not files:
                raise UserError(f"{self.images / folder} has no images; {self.command}")
            items.extend((f"{folder}/{file}", label, (names or {}).get(folder, folder)) for file in files)
        return items

    def worded(self, names: list[str], wording: str) -> list[str]:
        """The class names in the wording of DATASET.CLASS_NAMES.

        Raises:
            UserError: there is no such wording of this data set.
        """
        if wording == "coop":
            return names
        if wording != "grip" or self.grip is None:
            known = ("coop",) if self.grip is None else ("coop", "grip")
            raise unknown(f"wording (DATASET.CLASS_NAMES) of {self.name}", wording, known)
        return [self.grip.get(label, name) for label, name in enumerate(names)]

    # Whether all is there

    def check_images(self, split: Split) -> None:
        """Look every listed image up, by listing folders and not by opening files.

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
        left_over = sorted(filter(is_image, present - set(listed)))
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
        """Say so where a split is not as large as the published one."""
        found = tuple(len(split[part]) for part in PARTS)
        published = self.sizes.get(self.split_family.split(",")[0], found)
        if found != published:
            numbers = [" + ".join(f"{number:,}" for number in some) for some in (found, published)]
            print(f"warning: {self.name} has {numbers[0]} train + val + test images; published: {numbers[1]}")


def files_in(folder: Path) -> list[str]:
    """Names of the files in a folder but for hidden ones; none where it is missing."""
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries if not entry.name.startswith(".") and entry.is_file()]
    except (FileNotFoundError, NotADirectoryError):
        return []


def is_image(path: str) -> bool:
    """Whether a file's name is that of an image."""
    return os.path.splitext(path)[1].lower() in SUFFIXES


def images_in(folder: Path) -> list[str]:
    """Names of the image files in a folder, sorted; none where it is missing."""
    return sorted(filter(is_image, files_in(folder)))


def class_names(split: Split, *, number: int, where: str, remedy: str) -> list[str]:
    """The class names by label.

    Args:
        split: its train and test part must have images of every class.
        number: of classes.
        where: what the split was read from.
        remedy: what to do; messages end with it.

    Raises:
        UserError: a label is out of range, has two names, or does not occur in train or in test.
    """
    names: dict[int, str] = {}
    seen: dict[str, set[int]] = {part: set() for part in PARTS}
    for part in PARTS:
        for path, label, name in split[part]:
            if not 0 <= label < number:
                raise UserError(f"{where}: label {label} of {path} is not within 0 to {number - 1}; {remedy}")
            if names.setdefault(label, name) != name:
                raise UserError(f"{where}: label {label} has two names, '{names[label]}' and '{name}'; {remedy}")
            seen[part].add(label)
    for part in ("train", "test"):
        absent = sorted(set(range(number)) - seen[part])
        if absent:
            known = f" ({names[absent[0]]})" if absent[0] in names else ""
            raise UserError(
                f"{where}: no {part} image of {len(absent)} of {number} classes, first {absent[0]}{known}; {remedy}"
            )
    return [names[label] for label in range(number)]


def divide(items: Sequence[Item], shares: Mapping[str, float], *, rest: str) -> Split:
    """Divide every class's items at random into parts of about the shares; always the same, whatever ran before.

    Args:
        items: of all classes.
        shares: part -> share of a class's images, rounded to whole ones.
        rest: the part that takes what is left.

    Raises:
        ValueError: a class has too few images for a part.
    """
    rng = random.Random(SEED)
    groups: dict[int, list[Item]] = defaultdict(list)
    for item in items:
        groups[item[1]].append(item)
    split: Split = {part: [] for part in (*shares, rest)}
    for label in sorted(groups):
        group = rng.sample(groups[label], len(groups[label]))
        begin = 0
        for part, share in {**shares, rest: 1.0}.items():
            end = len(group) if part == rest else begin + round(len(group) * share)
            if begin >= end:
                raise ValueError(f"class {group[0][2]} has only {len(group)} images, too few for a {part} part")
            split[part].extend(group[begin:end])
            begin = end
    return split


def read_split(path: Path, *, remedy: str) -> Split:
    """Read a split in CoOp's format: {"train": [[path, label, class name], ...], "val": ..., "test": ...}.

    Raises:
        UserError: it is no such file, or a path leaves the image folder; the message ends with the remedy.
    """
    try:
        split = json.loads(path.read_text(encoding="utf-8"))
        return {part: [_item(*entry) for entry in split[part]] for part in PARTS}
    except (ValueError, KeyError, TypeError, OSError) as error:
        fault = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} is damaged or no split file ({fault}); {remedy}") from error


def _item(path: str, label: int, name: str) -> Item:
    if not (isinstance(path, str) and isinstance(name, str)):
        raise TypeError(f"{path!r} and {name!r} must be texts")
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise ValueError(f"{path} leaves the image folder")
    return path, int(label), name


def save_split(split: Split, path: Path) -> None:
    """Save a split atomically; a folder that may not be written is left as it is, for the split is always the same."""
    text = json.dumps({part: split[part] for part in PARTS})
    try:
        write_atomically(path, text.encode(), durable=True)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        print(f"warning: {path} cannot be written ({error.strerror}); the split is made anew every time")
