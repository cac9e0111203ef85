"""Files from the network: whole, verified, resumable, and laid out in the folder of their data set."""

from __future__ import annotations

import os
import re
import shutil
import ssl
import time
import uuid
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from air_plugin.utils.downloads import in_words, size_of
from air_plugin.utils.errors import UserError, is_disk_full
from air_plugin.utils.offline import is_offline
from air_plugin.utils.progress import Progress, waiting
from datasets.archives import fault_of, inside, unpack
from datasets.drive import fetch_from_drive, to_fetch_from_drive
from datasets.sources import ByHand, File, Source

BLOCK = 1 << 20
DOWNLOADS = ".downloads"  # below the data root; an archive that was fetched by hand may be put there, too


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
            Progress(_megabytes(total or 0), title=self.target.name, unit="MB") as progress,
        ):
            file.seek(start)
            progress.skip(_megabytes(start))
            while block := answer.read1(BLOCK):
                file.write(block)
                progress.update(_megabytes(file.tell()) - progress.done)
            file.flush()
            os.fsync(file.fileno())
        if total is not None and self.size < total:  # http.client does not tell
            raise _Cut(f"the connection was cut after {self.size} of {total} bytes")


def _verify(path: Path, checksum: str, size: int | None, *, origin: str) -> None:
    """Raise a UserError for a file that is not the one; it is removed if it came from the network just now."""
    found = path.stat().st_size
    fault = f"has {found} bytes instead of {size}" if size is not None and found != size else ""
    if not fault and checksum:
        fault = fault_of(path, checksum)
    if not fault:
        return
    if not origin:
        raise UserError(f"{path} {fault}; remove it, and it is fetched again")
    path.unlink()
    raise UserError(f"what came{origin} {fault}, and was removed; run again, and if it stays so, fetch it by hand")


def _megabytes(size: int) -> int:
    return round(size / 1e6)


def is_there(file: File, folder: Path) -> bool:
    """Whether all that a file holds has its place in a data set's folder."""
    return all((folder / target).exists() for target in file.takes.values())


def is_missing(source: Source, folder: Path) -> bool:
    """Whether anything is not in a data set's folder that belongs there."""
    return not all(is_there(file, folder) for file in source.files) or bool(missing_by_hand(source, folder))


def missing_by_hand(source: Source, folder: Path) -> list[ByHand]:
    """What a data set needs that is neither there nor fetched from a public address."""
    return [item for item in source.needed if not (folder / item.puts).exists()]


def fetch(name: str, source: Source, folder: Path) -> list[ByHand]:
    """Fetch and lay out what is not there yet; returns what must still be fetched by hand.

    A line is printed before each file: what, how large, where from, licence. Files on Google Drive are fetched where
    gdown is installed and nothing else is missing; those that are optional only before the data set's first use, since
    CoOp's split must not take the place of one that was made here, and used.

    Args:
        name: of the data set, for messages.
        source: where it comes from.
        folder: of the data set; downloads lie beside it, in DOWNLOADS/<name>.

    Raises:
        UserError: an address fails, an archive is not what it should be, or the folder cannot be written to.
        OSError: the disk is full.
    """
    from filelock import FileLock

    downloads = folder.parent / DOWNLOADS / name
    licence = f"licence: {source.licence or 'see there'}"
    try:
        for file in source.files:
            if is_there(file, folder):
                continue
            downloads.mkdir(parents=True, exist_ok=True)
            with FileLock(downloads / "lock"):  # the same command may run twice
                if is_there(file, folder):
                    continue
                if not (downloads / file.name).exists() and not is_offline():
                    print(f"{name}: {file.name}, {in_words(size_of(file.address))}, from {file.address}, {licence}")
                with waiting(f"fetching {file.name}"):
                    lay_out(download(file.address, downloads / file.name, checksum=file.checksum), file, folder)
                print(f"{name}: {downloads / file.name} may be removed")
        for item in to_fetch_from_drive(source, folder):
            downloads.mkdir(parents=True, exist_ok=True)
            with FileLock(downloads / "lock"):
                print(f"{name}: {item.puts}, size unknown, from Google Drive ({item.where}), {licence}")
                if fault := fetch_from_drive(item, downloads, folder, place=lay_out):
                    print(f"{name}: {item.puts} was not fetched: {fault}")
    except OSError as error:
        if is_disk_full(error):
            raise
        raise UserError(f"cannot write to {error.filename or folder.parent}: {error.strerror}") from error
    return missing_by_hand(source, folder)


def lay_out(archive: Path, file: File, folder: Path) -> None:
    """Put what an archive holds where it belongs; what is there already is left as it is.

    A path appears only when it is whole: archives are unpacked beside it and moved.

    Raises:
        UserError: the archive does not hold what it should.
    """
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder.parent / f".{folder.name}.{uuid.uuid4().hex}.tmp"
    try:
        if "" in file.takes:
            beside.mkdir()
            found = {file.takes[""]: Path(shutil.copyfile(archive, beside / archive.name))}
        else:
            opened = unpack(archive, beside / "outer")
            if file.inner:
                opened = unpack(inside(opened, file.inner, archive), beside / "inner")
            found = {target: inside(opened, path, archive) for path, target in file.takes.items()}
        for target, path in found.items():
            if not (folder / target).exists():
                (folder / target).parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, folder / target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
