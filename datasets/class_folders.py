"""Folders of classes on disk: the ones that must be there, and the images in them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from air_plugin.utils.errors import UserError
from air_plugin.utils.image_files import is_image_name, why_left_out


def check_folders(place: Path, known: Iterable[str], *, ignored: Iterable[str] = (), command: str) -> None:
    """Compare the folders in a place with those that must be there; links to folders count as folders.

    Args:
        place: where they lie.
        known: names of the class folders.
        ignored: folders that are no class.
        command: what fetches the data set.

    Raises:
        UserError: a folder is missing, or is of no class; the message names the first of each.
    """
    with os.scandir(place) as entries:
        found = {entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir()}
    missing = sorted(set(known) - found)
    strange = sorted(found - set(known) - set(ignored))
    faults = [f"class folder {name} is missing" for name in missing[:1]]
    faults += [f"folder {name} is no class's" for name in strange[:1]]
    if faults:
        more = f" ({len(missing)} missing, {len(strange)} of no class)" if len(missing) + len(strange) > 2 else ""
        remedy = f"{'rename it, or ' if strange else ''}fetch it: {command}" if missing else "remove it"
        raise UserError(f"{place}: {' and '.join(faults)}{more}; {remedy}")


def folder_with(names: Sequence[str], place: Path) -> Path | None:
    """A folder in a place that holds most folders of these names; None where there is none."""
    for path in sorted(place.iterdir()) if place.is_dir() else ():
        if 2 * sum((path / name).is_dir() for name in names) > len(names):
            return path
    return None


def files_in(folder: Path) -> list[str]:
    """Names of the files in a folder, links to files among them, but for hidden ones; none where it is missing."""
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries if not entry.name.startswith(".") and entry.is_file()]
    except (FileNotFoundError, NotADirectoryError):
        return []


def images_in(folder: Path, left_out: Counter[str]) -> list[str]:
    """Names of the image files in a class folder, sorted; none where it is missing.

    Args:
        folder: links in it count as what they point to.
        left_out: counts, by kind, of everything else in it but hidden files.
    """
    names = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                reason = "" if is_image_name(entry.name) and entry.is_file() else why_left_out(Path(entry.path))
                if reason:
                    left_out[reason] += 1
                else:
                    names.append(entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(names)
