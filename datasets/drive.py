"""Files on Google Drive, which gdown fetches."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from air_plugin.utils.errors import UserError, first_line, is_disk_full
from air_plugin.utils.offline import is_offline
from air_plugin.utils.progress import waiting
from datasets.archives import fault_of
from datasets.sources import ByHand, File, Source
from datasets.splits import MADE

Place = Callable[[Path, File, Path], None]


def to_fetch_from_drive(source: Source, folder: Path) -> list[ByHand]:
    """The files on Google Drive that a data set lacks and that may be fetched now; see `datasets.download.fetch`."""
    try:
        import gdown  # noqa: F401
    except ImportError:
        return []
    missing = [item for item in source.needed if not (folder / item.puts).exists()]
    if is_offline() or not all(item.drive for item in missing):
        return []
    optional = [item for item in source.optional if item.drive]
    in_use = (folder / MADE).exists() or any((folder / item.puts).exists() for item in optional)
    return [*missing, *([] if in_use else optional)]


def fetch_from_drive(item: ByHand, downloads: Path, folder: Path, *, place: Place) -> str:
    """Fetch a file and put it where it belongs, whole or not at all; returns why it failed, or an empty text.

    Without a checksum a .json file must be JSON, and an archive must hold what belongs to the data set.

    Args:
        item: lies on Google Drive; where it puts a folder, it is an archive of that folder.
        downloads: takes the file.
        folder: of the data set.
        place: puts what an archive holds in its place; see `datasets.download.lay_out`.

    Raises:
        OSError: the disk is full.
    """
    import gdown

    is_folder = not Path(item.puts).suffix
    file = downloads / (f"{item.puts}.zip" if is_folder else Path(item.puts).name)
    part = file.with_name(f"{file.name}.part")
    try:
        with waiting(f"fetching {file.name}"):
            if not file.exists():
                if gdown.download(id=item.drive, output=str(part), quiet=True) is None:
                    return "Google Drive gives no file, perhaps because too many people fetched it today"
                _check(part, item)
                os.replace(part, file)
            place(file, File(item.where, {item.puts if is_folder else "": item.puts}), folder)
    except Exception as error:  # gdown raises errors of its own, of requests and of the system
        if is_disk_full(error):
            raise
        part.unlink(missing_ok=True)
        return " ".join(str(error).split())[:200] if isinstance(error, UserError) else first_line(error)
    return ""


def _check(path: Path, item: ByHand) -> None:
    """Raise a UserError for what is not the file: one with another checksum, or no JSON where it should be."""
    if item.checksum:
        if fault := fault_of(path, item.checksum):
            raise UserError(f"it {fault}")
    elif item.puts.endswith(".json"):
        try:
            json.loads(path.read_bytes())
        except ValueError as error:
            raise UserError("what came is no JSON") from error
