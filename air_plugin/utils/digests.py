"""Digests of files' contents, kept between runs: an unchanged file is read once, as version control does."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from air_plugin.utils.errors import UserError

RACY = 2.0  # seconds: a younger file may change again within one tick of its time stamp, so its digest is not kept
FILE = "digests.sqlite"  # in a store
PENDING = 1000  # digests between two writes
TOGETHER = 500  # files that are looked up at once

log = logging.getLogger(__name__)

_Paths = Iterable[str | os.PathLike[str]]
_Stamp = tuple[int, int, int, int]


def content_digest(paths: _Paths, *, cache: str | os.PathLike[str] | None = None) -> str:
    """SHA-256 over the contents of files in their order; names and folders do not matter.

    Args:
        paths: the files.
        cache: file with the digests of earlier calls (`Store.digests`), for any number of processes; it is made where
            it is missing, and made again where it is damaged. A digest is taken from it where path, size, time stamps
            (nanoseconds) and inode are the same. None reads every file.

    Raises:
        UserError: a file cannot be read.

    Example:
        >>> content_digest(["a.png", "b.png"], cache=Store("output/cache").digests)
    """
    total = hashlib.sha256()
    for made in _digests(paths, cache):
        total.update(made)
    return total.hexdigest()


def file_digests(paths: _Paths, *, cache: str | os.PathLike[str] | None = None) -> list[str]:
    """SHA-256 of every file, in hexadecimal; see `content_digest`."""
    return [made.hex() for made in _digests(paths, cache)]


def _digests(paths: _Paths, cache: str | os.PathLike[str] | None) -> Iterator[bytes]:
    left = iter(paths)
    with contextlib.closing(_Cache(cache)) as known:
        while batch := list(islice(left, TOGETHER)):
            known.look_up([os.path.abspath(path) for path in batch])
            for path in batch:
                try:
                    yield _digest(os.path.abspath(path), known)
                except OSError as error:
                    raise UserError(f"cannot read {os.fspath(path)}: {error.strerror}") from error


def _digest(path: str, known: _Cache) -> bytes:
    """SHA-256 of a file, from the cache or of its content."""
    found = known.find(path, _stamp(os.stat(path)))
    if found is not None:
        return found
    with open(path, "rb") as file:
        begun = time.time()
        before = os.fstat(file.fileno())
        made = hashlib.sha256()
        while data := file.read(1 << 20):
            made.update(data)
        after = os.fstat(file.fileno())
    old = begun - max(after.st_mtime, after.st_ctime) >= RACY
    if old and _stamp(before) == _stamp(after):
        known.add(path, _stamp(after), made.digest())
    return made.digest()


def _stamp(status: os.stat_result) -> _Stamp:
    """What changes with a file. The time of the last change of its inode tells where mtime was set back."""
    return (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


class _Cache:
    """Digests by path and stamp in an SQLite file. Where it cannot be used, work goes on without it.

    Its journal is SQLite's plain one, which needs file locks and nothing else, so that machines may share it on a file
    system that has them; a write-ahead log (WAL) needs memory that all of them share.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self.path = None if path is None else Path(path)
        self.connection: sqlite3.Connection | None = None
        self.pending: list[tuple[bytes, bytes, bytes]] = []
        self.found: dict[bytes, tuple[bytes, bytes]] = {}  # path -> stamp and digest
        with self._guarded():
            self._connect()

    def _connect(self) -> None:
        if self.path is None:
            return
        with contextlib.suppress(OSError):  # then connect fails
            self.path.parent.mkdir(parents=True, exist_ok=True)
        self.connection = sqlite3.connect(self.path, timeout=30, isolation_level=None)
        self.connection.execute("CREATE TABLE IF NOT EXISTS digests (path BLOB PRIMARY KEY, stamp BLOB, sha256 BLOB)")

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """A damaged file is thrown away; a locked or read-only one, or a full disk, ends its use in this call."""
        try:
            yield
        except sqlite3.Error as error:
            self._disconnect()
            if self.path is None or isinstance(error, sqlite3.OperationalError):
                log.debug("digests of files are not kept in %s: %s", self.path, error)
                return
            log.info("%s is thrown away and made again: %s", self.path, error)
            for suffix in ("", "-journal"):
                Path(f"{self.path}{suffix}").unlink(missing_ok=True)
            with contextlib.suppress(sqlite3.Error):
                self._connect()

    def look_up(self, paths: Sequence[str]) -> None:
        """Read what is kept of some files, for `find`: at once, since a query locks the file, perhaps on a server."""
        self.found = {}
        with self._guarded():
            if self.connection is not None:
                query = f"SELECT path, stamp, sha256 FROM digests WHERE path IN ({','.join('?' * len(paths))})"
                rows = self.connection.execute(query, [os.fsencode(path) for path in paths])
                self.found = {path: (stamp, sha256) for path, stamp, sha256 in rows}

    def find(self, path: str, stamp: _Stamp) -> bytes | None:
        """The digest of a file with this stamp, one of those that were looked up."""
        kept, sha256 = self.found.get(os.fsencode(path), (None, None))
        return sha256 if kept == _pack(stamp) and isinstance(sha256, bytes) and len(sha256) == 32 else None

    def add(self, path: str, stamp: _Stamp, sha256: bytes) -> None:
        """Keep a digest; it is written with others, or at the end."""
        if self.connection is not None:
            self.pending.append((os.fsencode(path), _pack(stamp), sha256))
            if len(self.pending) >= PENDING:
                self._write()

    def _write(self) -> None:
        rows, self.pending = self.pending, []
        with self._guarded():
            if self.connection is not None and rows:
                self.connection.execute("BEGIN IMMEDIATE")
                self.connection.executemany("INSERT OR REPLACE INTO digests VALUES (?, ?, ?)", rows)
                self.connection.execute("COMMIT")

    def _disconnect(self) -> None:
        if self.connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self.connection.close()
            self.connection = None

    def close(self) -> None:
        """Write what is pending."""
        self._write()
        self._disconnect()


def _pack(stamp: _Stamp) -> bytes:
    return " ".join(map(str, stamp)).encode()  # an inode may be larger than SQLite's integers
