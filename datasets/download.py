"""Files from the network and archives from strangers: whole, verified, resumable, never outside of their folder."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import ssl
import stat
import tarfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from air_plugin.utils.errors import UserError

BLOCK = 1 << 20
MOST_MEMBERS = 2_000_000  # of an archive


def download(
    address: str,
    target: Path,
    *,
    checksum: str = "",
    size: int | None = None,
    attempts: int = 5,
    wait: float = 1.0,
    timeout: float = 60.0,
) -> Path:
    """Fetch a file, whole or not at all; returns `target`.

    What has arrived stays in `<target>.part`, and the next attempt or call goes on from there, if the server can and
    if it can be told that the rest belongs to it: by the checksum, or by the server's own mark of the file (If-Range,
    RFC 9110, section 13.1.5). A file that is there already is verified instead.

    Args:
        address: http:// or https://.
        target: where; its folder is made.
        checksum: "md5:<hexadecimal>" or any other algorithm of hashlib; empty: none is published.
        size: in bytes, where it is published.
        attempts: how often in a row a connection may fail without any progress.
        wait: seconds before the second attempt; they double with each one.
        timeout: seconds without an answer after which a connection counts as cut.

    Raises:
        UserError: the address does not answer, or not with this file; what was wrong is removed.
        OSError: the disk is full or read-only; what has arrived is kept.
    """
    from filelock import FileLock

    from air_plugin.utils.offline import is_offline

    if urlsplit(address).scheme not in ("http", "https"):
        raise UserError(f"{address} is no address of a file; it must begin with http:// or https://")
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if target.is_file():
            _verify(target, checksum, size, origin="")
            return target
        if is_offline():
            raise UserError(f"{address} is not fetched, for AIR_OFFLINE is set; fetch it elsewhere, put it at {target}")
        part = _Part(target, address, verifiable=bool(checksum))
        failures = 0
        while True:
            before = part.size
            try:
                part.go_on(size=size, timeout=timeout)
                break
            except _Cut as cut:
                failures = 1 if part.size > before else failures + 1
                if failures >= attempts:
                    kept = f"{part.size} bytes are kept in {part.path}, the same command goes on there"
                    none = f"without a network, fetch it elsewhere and put it at {target}"
                    raise UserError(f"{address}: {cut}; {kept if part.size else none}") from cut
                time.sleep(wait * 2 ** (failures - 1))
        _verify(part.path, checksum, size, origin=f" from {address}")
        os.replace(part.path, target)
        part.mark.unlink(missing_ok=True)
    return target


class _Cut(Exception):
    """The connection failed in a way that may pass."""


@dataclass
class _Part:
    """What has arrived of a file.

    verifiable: a checksum will tell whether the parts fit each other.
    """

    target: Path
    address: str
    verifiable: bool

    @property
    def path(self) -> Path:
        return self.target.with_name(f"{self.target.name}.part")

    @property
    def mark(self) -> Path:
        """Holds what the server calls this version of the file."""
        return self.target.with_name(f"{self.target.name}.part.mark")

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def go_on(self, *, size: int | None, timeout: float) -> None:
        """Fetch what is missing.

        Raises:
            _Cut: the connection failed; what had arrived is kept.
            UserError: the server has no such file.
        """
        known = self.mark.read_text() if self.mark.exists() else ""
        start = self.size if self.verifiable or known else 0
        if size is not None and start == size:
            return  # only the last step was missing
        headers = {"User-Agent": "air-plugin", "Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
            if known:
                headers["If-Range"] = known
        try:
            with urlopen(Request(self.address, headers=headers), timeout=timeout) as answer:
                self._take(answer, start)
        except HTTPError as error:
            self._judge(error, start)
        except (URLError, HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
            raise _Cut(f"the connection failed ({getattr(error, 'reason', None) or error})") from error

    def _judge(self, error: HTTPError, start: int) -> None:
        """What an answer other than the file means."""
        if error.code == 416 and start:  # nothing is left, or what we have is longer than the file
            total = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range", ""))
            if total and int(total[1]) == start:
                return
            self.path.unlink()
            raise _Cut("the file has changed on the server") from error
        if error.code in (408, 429) or error.code >= 500:
            raise _Cut(f"the server answers {error.code} {error.reason}") from error
        raise UserError(
            f"{self.address} answers {error.code} {error.reason}; the file may have moved: fetch it by hand, and put "
            f"it at {self.target}"
        ) from error

    def _take(self, answer: Any, start: int) -> None:
        """Write an answer's body behind the first `start` bytes, or from the beginning where it is the whole file."""
        from tqdm import tqdm

        if start and answer.status == 206:
            first = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
            if not first or int(first[1]) != start:
                self.path.unlink()
                raise _Cut("the server sent another part than the one asked for")
        else:  # a server without Range, or another version of the file: from the beginning
            start = 0
        etag = answer.headers.get("ETag", "")
        mark = etag if etag.startswith('"') else ""  # a weak one (W/"...") does not promise the same bytes
        self.mark.write_text(mark or answer.headers.get("Last-Modified", ""))
        length = answer.headers.get("Content-Length")
        total = start + int(length) if length and length.isdigit() else None
        free = shutil.disk_usage(self.target.parent).free
        if total is not None and total - start > free:
            raise UserError(
                f"{self.target.parent} has {free / 1e9:.1f} GB free, {self.target.name} needs "
                f"{(total - start) / 1e9:.1f} GB more; free some space or choose another --root"
            )
        with (
            open(self.path, "r+b" if start else "wb") as file,
            tqdm(desc=self.target.name, total=total, initial=start, unit="B", unit_scale=True, disable=None) as bar,
        ):
            file.seek(start)
            while block := answer.read1(BLOCK):
                file.write(block)
                bar.update(len(block))
            file.flush()
            os.fsync(file.fileno())
        if total is not None and self.size < total:  # http.client does not tell
            raise _Cut(f"the connection was cut after {self.size} of {total} bytes")


def _verify(path: Path, checksum: str, size: int | None, *, origin: str) -> None:
    """Raise a UserError for a file that is not the one; it is removed if it came from the network just now."""
    found = path.stat().st_size
    fault = f"has {found} bytes instead of {size}" if size is not None and found != size else ""
    if not fault and checksum:
        algorithm, _, wanted = checksum.partition(":")
        with open(path, "rb") as file:
            made = hashlib.new(algorithm, usedforsecurity=False)
            while block := file.read(BLOCK):
                made.update(block)
        if made.hexdigest() != wanted.lower():
            fault = f"has the {algorithm} {made.hexdigest()} instead of {wanted.lower()}"
    if not fault:
        return
    if not origin:
        raise UserError(f"{path} {fault}; remove it, and it is fetched again")
    path.unlink()
    raise UserError(f"what came{origin} {fault}, and was removed; run again, and if it stays so, fetch it by hand")


# Archives


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
    from tqdm import tqdm

    left, number = limit, 0
    with _damage_of(archive), _members(archive) as members, tqdm(desc=archive.name, unit=" files", disable=None) as bar:
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
            bar.update()
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
