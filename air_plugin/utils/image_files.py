"""Which files of a folder are images: one rule for every command and data set."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from air_plugin.utils.errors import UserError

SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".ppm", ".pgm", ".pfm")
)
HEAD = 32  # bytes that tell what a file is
STARTS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

log = logging.getLogger(__name__)
_warned: set[tuple[Path, str]] = set()  # a run lists a folder several times


def is_image_name(path: str | os.PathLike[str]) -> bool:
    """Whether a file's suffix is that of an image format."""
    return os.path.splitext(path)[1].lower() in SUFFIXES


def is_image_file(path: str | os.PathLike[str]) -> bool:
    """Whether a file is an image: by its suffix, else by its first bytes.

    A file with the suffix of an image counts as one even if it is damaged: whoever reads it says so.
    """
    if is_image_name(path):
        return True
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD)
    except OSError:
        return False
    if head.startswith(STARTS) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP"):
        return True
    if head[:2] == b"BM" and head[6:10] == b"\0\0\0\0":  # the reserved bytes tell it from a text that begins with BM
        return True
    return head[4:8] == b"ftyp" and (b"avif" in head[8:] or b"avis" in head[8:])


def find_images(folder: Path) -> list[Path]:
    """Every image below a folder, sorted by path.

    Links to files and folders are followed; a folder that is reached twice is read once. Hidden files and folders
    (a leading dot) are left out, as `ls` does. One line of the log says how many files of which kind were left out.

    Raises:
        UserError: the folder is missing, cannot be read, or holds no image.
    """
    if not folder.is_dir():
        raise UserError(f"image folder {folder} is missing")
    found, left_out = [], Counter[str]()
    for path, reason in _walk(folder):
        if reason:
            left_out[reason] += 1
        else:
            found.append(path)
    if not found:
        kinds = _counts(left_out)
        raise UserError(f"no images below {folder}" + (f"; left out: {kinds}" if kinds else ""))
    warn_of_left_out(folder, left_out, used=len(found))
    return sorted(found)


def warn_of_left_out(folder: Path, left_out: Mapping[str, int], *, used: int) -> None:
    """Log how many files of which kind are not used, once for a folder and these numbers.

    Args:
        folder: that was listed.
        left_out: kind (see `why_left_out`) -> number.
        used: number of images.
    """
    kinds = _counts(left_out)
    if kinds and (folder, kinds) not in _warned:
        _warned.add((folder, kinds))
        log.warning("%s: left out %s; %d images are used", folder, kinds, used)


def _counts(left_out: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {reason}" for reason, number in sorted(left_out.items()))


def _walk(top: Path) -> Iterator[tuple[Path, str]]:
    """Every file below a folder with the reason why it is no image; an empty reason where it is one."""
    seen: set[tuple[int, int]] = set()

    def refuse(error: OSError) -> None:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error

    for folder, folders, files in os.walk(top, followlinks=True, onerror=refuse):
        here = os.stat(folder)
        if (here.st_dev, here.st_ino) in seen:
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        for name in folders:
            if name.startswith("."):
                yield Path(folder, name), "hidden folders"
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            yield Path(folder, name), why_left_out(Path(folder, name))


def why_left_out(path: Path) -> str:
    """Why a file is not used; empty where it is an image."""
    if path.name.startswith("."):
        return "hidden files"
    if not path.exists():
        return "broken links"
    if path.is_dir():
        return "folders"
    if not path.is_file():
        return "special files"
    if is_image_file(path):
        return ""
    return f"{path.suffix.lower()} files" if path.suffix else "files that are no image"
