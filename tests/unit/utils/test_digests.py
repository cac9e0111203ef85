"""Digests of files: contents count, and an unchanged file is read once."""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from air_plugin.utils import digests
from air_plugin.utils.digests import content_digest
from air_plugin.utils.errors import UserError

pytestmark = pytest.mark.public_reports


def write(folder: Path, count: int = 5) -> list[Path]:
    folder.mkdir(exist_ok=True)
    for number in range(count):
        (folder / f"{number}.bin").write_bytes(number.to_bytes(4, "big") * 25)
    return sorted(folder.glob("*.bin"))


def expected(paths: list[Path]) -> str:
    """The slow and obvious way."""
    return hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in paths)).hexdigest()


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """All files are old."""
    now = time.time
    monkeypatch.setattr(digests.time, "time", lambda: now() + 60)


class Reads:
    """The files that are opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []

        def counting(path: str, mode: str):
            self.names.append(os.path.basename(path))
            return open(path, mode)

        monkeypatch.setattr(digests, "open", counting, raising=False)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


def test_an_unchanged_file_is_read_once(tmp_path: Path, reads: Reads, later: None):
    """Item 2: contents count, and a million files stay quick."""
    paths, cache = write(tmp_path / "files"), tmp_path / "new" / "digests.sqlite"
    assert content_digest(paths, cache=cache) == expected(paths) == content_digest(paths)
    assert len(reads.names) == 10
    reads.names.clear()
    assert content_digest(reversed(paths), cache=cache) == expected(paths[::-1])
    assert content_digest([os.path.relpath(path) for path in paths], cache=cache) == expected(paths)
    assert not reads.names


def test_a_file_that_was_changed_in_place_is_read_again(tmp_path: Path, reads: Reads, later: None):
    """Item 2: the same name, the same size and even the same mtime."""
    paths, cache = write(tmp_path / "files"), tmp_path / "digests.sqlite"
    content_digest(paths, cache=cache)
    status = paths[3].stat()
    paths[3].write_bytes(b"x" * 100)
    os.utime(paths[3], ns=(status.st_atime_ns, status.st_mtime_ns))
    reads.names.clear()
    assert content_digest(paths, cache=cache) == expected(paths)
    assert reads.names == ["3.bin"]


def test_a_file_that_was_replaced_is_read_again(tmp_path: Path, later: None):
    """Item 2: another inode."""
    paths, cache = write(tmp_path / "files"), tmp_path / "digests.sqlite"
    before = content_digest(paths, cache=cache)
    (tmp_path / "other").write_bytes(b"y" * 100)
    os.replace(tmp_path / "other", paths[0])
    assert content_digest(paths, cache=cache) == expected(paths) != before


@pytest.mark.parametrize("young", [True, False])
def test_the_digest_of_a_young_file_is_not_kept(
    young: bool, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
):
    """Item 2: a clock may be too coarse to show a second change; only of old files is the stamp to be trusted."""
    monkeypatch.setattr(digests, "_stamp", lambda status: (1, 2, 3, 4))
    if not young:
        request.getfixturevalue("later")
    paths, cache = write(tmp_path / "files", 1), tmp_path / "digests.sqlite"
    before = content_digest(paths, cache=cache)
    paths[0].write_bytes(b"z" * 100)
    assert content_digest(paths, cache=cache) == (expected(paths) if young else before)


@pytest.mark.parametrize("damage", ["garbage", "cut", "flipped", "foreign", "folder", "empty"])
def test_a_cache_that_cannot_be_used_costs_time_only(damage: str, tmp_path: Path, reads: Reads, later: None):
    """Item 2: a damaged cache is thrown away and made again."""
    paths, cache = write(tmp_path / "files", 400), tmp_path / "digests.sqlite"
    content_digest(paths, cache=cache)
    data = bytearray(cache.read_bytes())
    if damage == "flipped":
        for place in range(4096, len(data), 97):
            data[place] ^= 255
    cache.unlink()
    if damage == "folder":
        cache.mkdir()
    else:
        parts = {"garbage": b"no database" * 999, "cut": bytes(data[: len(data) // 2]), "flipped": bytes(data)}
        cache.write_bytes(parts.get(damage, b""))
    if damage == "foreign":
        with digests.sqlite3.connect(cache) as connection:
            connection.execute("CREATE TABLE digests (other INTEGER)")
    assert content_digest(paths, cache=cache) == expected(paths)
    assert content_digest(paths, cache=cache) == expected(paths)
    if damage in ("garbage", "cut", "empty"):
        reads.names.clear()
        assert content_digest(paths, cache=cache) == expected(paths) and not reads.names


def test_a_cache_where_nothing_can_be_written_is_left_out(tmp_path: Path):
    paths = write(tmp_path / "files")
    assert content_digest(paths, cache="/proc/digests.sqlite") == expected(paths)
    assert content_digest(paths, cache=paths[0] / "digests.sqlite") == expected(paths)


def test_files_are_looked_up_together(tmp_path: Path, reads: Reads, later: None, monkeypatch: pytest.MonkeyPatch):
    paths, cache = write(tmp_path / "files", 25), tmp_path / "digests.sqlite"
    content_digest(paths, cache=cache)
    reads.names.clear()
    statements: list[str] = []
    connect = digests.sqlite3.connect

    def traced(*arguments: Any, **options: Any) -> Any:
        connection = connect(*arguments, **options)
        connection.set_trace_callback(statements.append)
        return connection

    monkeypatch.setattr(digests.sqlite3, "connect", traced)
    monkeypatch.setattr(digests, "TOGETHER", 10)
    assert content_digest(paths, cache=cache) == expected(paths) and not reads.names
    assert sum(statement.startswith("SELECT") for statement in statements) == 3


DIES = """
import os, signal, sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA cache_size = 1")  # pages are written before the end of the transaction
connection.execute("BEGIN IMMEDIATE")
for number in range(9999):
    connection.execute("INSERT OR REPLACE INTO digests VALUES (?, 'x', 'y')", (b"%d" % number,))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_that_is_killed_while_it_writes_leaves_no_lock(tmp_path: Path, reads: Reads, later: None):
    paths, cache = write(tmp_path / "files"), tmp_path / "digests.sqlite"
    content_digest(paths, cache=cache)
    reads.names.clear()
    subprocess.run([sys.executable, "-c", DIES, str(cache)], check=False)
    assert (tmp_path / "digests.sqlite-journal").exists()  # of the transaction that was not ended
    assert content_digest(paths, cache=cache) == expected(paths) and not reads.names
    with contextlib.closing(digests.sqlite3.connect(cache)) as connection:
        assert connection.execute("SELECT count(*) FROM digests").fetchone() == (len(paths),)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)


def _digest_often(folder: Path) -> set[str]:
    digests.RACY, digests.PENDING = -60.0, 3
    paths = sorted((folder / "files").glob("*.bin"))
    return {content_digest(paths, cache=folder / "digests.sqlite") for _ in range(10)}


def test_several_processes_share_a_cache(tmp_path: Path, reads: Reads):
    paths = write(tmp_path / "files", 50)
    with concurrent.futures.ProcessPoolExecutor(3, mp_context=multiprocessing.get_context("spawn")) as pool:
        for found in pool.map(_digest_often, [tmp_path] * 3):
            assert found == {expected(paths)}
    assert content_digest(paths, cache=tmp_path / "digests.sqlite") == expected(paths) and not reads.names


def test_names_need_not_be_text(tmp_path: Path, later: None):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.bin")
    try:
        Path(path).write_bytes(b"content")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    for _ in range(2):
        assert content_digest([path], cache=tmp_path / "digests.sqlite") == expected([Path(path)])


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"cannot read .*nowhere\.png: No such file"):
        content_digest([tmp_path / "nowhere.png"], cache=tmp_path / "digests.sqlite")
