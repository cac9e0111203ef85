"""Split files: which images of a data set are train, val and test. Read, checked, divided, written."""

from __future__ import annotations

import errno
import json
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from air_plugin.utils.errors import UserError
from air_plugin.utils.files import to_json, write_atomically
from datasets.base import warn_once

Item = tuple[str, int, str]  # path below the image folder (with /), label, class name
Split = dict[str, list[Item]]  # its keys are PARTS
PARTS = ("train", "val", "test")
SEED = 0  # of every split that is made here
MADE = f"split_made_here_seed{SEED}.json"


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
    text = to_json({part: split[part] for part in PARTS})
    try:
        write_atomically(path, text.encode(), durable=True)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        warn_once(f"{path} cannot be written ({error.strerror}); the split is made anew every time")
