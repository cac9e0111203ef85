"""Archives from strangers: unpacked whole or not at all, never outside of their folder."""

from __future__ import annotations

import hashlib
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any

from air_plugin.utils.errors import UserError
from air_plugin.utils.progress import Progress

BLOCK = 1 << 20
MOST_MEMBERS = 2_000_000  # of an archive


@dataclass(frozen=True)
class _Member:
    """A file or folder of an archive. fault: why it may not be unpacked, or empty."""

    name: str
    is_folder: bool
    fault: str
    opened: Any  # () -> binary file


def unpack(archive: Path, folder: Path, *, limit: int | None = None) -> Path:
    """Unpack a zip or tar archive (of any compression) into a new folder, whole or not at all; returns `folder`.

    Files and folders are all that is ever made, by our own hand: nothing is linked, no owner, mode or time is taken
    over, so nothing can point out of the folder, and `tarfile`'s filters are not needed (nor their faults,
    CVE-2025-4517). A path that leaves the folder, a link or a device is refused with the whole archive.

    Args:
        archive: the file.
        folder: must not exist.
        limit: largest sum of the unpacked files in bytes; None: 1 GiB and ten times the archive's own size, which is
            plenty for images.

    Raises:
        UserError: it is no archive, damaged, hostile, or larger than the limit.
        OSError: the disk is full.
    """
    limit = (1 << 30) + 10 * archive.stat().st_size if limit is None else limit
    folder.mkdir(parents=True)
    try:
        _unpack_members(archive, folder, limit)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def _unpack_members(archive: Path, folder: Path, limit: int) -> None:
    left, number = limit, 0
    progress = Progress(0, title=f"unpacking {archive.name}", unit="files")
    with _damage_of(archive), _members(archive) as members, progress:
        for number, member in enumerate(members, start=1):
            if number > MOST_MEMBERS:
                raise UserError(f"{archive} holds more than {MOST_MEMBERS} files; it was not unpacked")
            fault = member.fault or _leaves(member.name)
            if fault:
                raise UserError(
                    f"{archive} holds {member.name!r}, {fault}; nothing of it was unpacked. It is not the published "
                    "archive: remove it"
                )
            path = folder.joinpath(*PurePosixPath(member.name).parts)
            if member.is_folder:
                path.mkdir(parents=True, exist_ok=True)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            with member.opened() as source, open(path, "wb") as file:
                left -= _copy(source, file, most=left)
            if left < 0:
                raise UserError(f"{archive} unpacks to more than {limit} bytes; nothing of it was unpacked")
            progress.update()
        if not number:
            raise UserError(f"{archive} is empty")


def _copy(source: IO[bytes], file: IO[bytes], *, most: int) -> int:
    """Copy until more than `most` bytes were written; returns how many were."""
    written = 0
    while written <= most and (block := source.read(BLOCK)):
        written += file.write(block)
    return written


def _leaves(name: str) -> str:
    """Why a path may lead out of the folder that it is unpacked in, on any system; empty where it cannot."""
    for path in (PurePosixPath(name), PureWindowsPath(name)):
        if path.is_absolute() or path.root or path.drive:
            return "an absolute path"
        if ".." in path.parts:
            return "a path out of its folder"
    return "" if name and "\0" not in name else "no path"


@contextmanager
def _damage_of(archive: Path) -> Iterator[None]:
    """What goes wrong while an archive is read becomes one line."""
    damage = (
        tarfile.TarError,
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        ValueError,
        NotImplementedError,
        RuntimeError,
        FileExistsError,
        NotADirectoryError,
        IsADirectoryError,
    )
    try:
        yield
    except damage as error:
        raise UserError(f"{archive} is damaged ({error}); remove it, and it is fetched again") from error
    except OSError as error:
        if error.errno is not None:  # of the disk
            raise
        raise UserError(f"{archive} is damaged ({error}); remove it, and it is fetched again") from error


@contextmanager
def _members(archive: Path) -> Iterator[Iterator[_Member]]:
    """The members of an archive of either kind, in their order."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            yield (_of_zip(opened, info) for info in opened.infolist())
    elif tarfile.is_tarfile(archive):
        with tarfile.open(archive) as opened_tar:
            yield (_of_tar(opened_tar, info) for info in opened_tar)
    else:
        raise UserError(f"{archive} is no zip or tar archive; remove it, and it is fetched again")


def _of_zip(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> _Member:
    kind = stat.S_IFMT(info.external_attr >> 16)  # 0 where the archive was not made on Unix
    fault = "" if kind in (0, stat.S_IFREG, stat.S_IFDIR) else "a link" if kind == stat.S_IFLNK else "no file"
    return _Member(info.filename, info.is_dir(), fault, lambda: archive.open(info))


def _of_tar(archive: tarfile.TarFile, info: tarfile.TarInfo) -> _Member:
    fault = "" if info.isreg() or info.isdir() else "a link" if info.issym() or info.islnk() else "no file"
    return _Member(info.name, info.isdir(), fault, lambda: archive.extractfile(info))


def inside(folder: Path, path: str, archive: Path) -> Path:
    """The file or folder with this path at the shallowest level below a folder, for archives differ in what is on top.

    Raises:
        UserError: there is none.
    """
    level = [folder]
    while level:
        for top in level:
            if (top / path).exists():
                return top / path
        level = sorted(below for top in level for below in top.iterdir() if below.is_dir())
    raise UserError(f"{archive} holds no {path}; it is not the published archive: remove it, and it is fetched again")


def fault_of(path: Path, checksum: str) -> str:
    """In words, why a file is not the one of a checksum ("md5:<hexadecimal>"); empty where it is.

    The file is read in blocks: an archive may be larger than the memory.
    """
    algorithm, _, expected = checksum.partition(":")
    made = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            made.update(block)
    if made.hexdigest() == expected.lower():
        return ""
    return f"has the {algorithm} {made.hexdigest()} instead of {expected.lower()}"
