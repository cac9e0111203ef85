"""Downloads from a server on this machine that misbehaves as asked, and archives that try to leave their folder."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import random
import stat
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from air_plugin.utils.downloads import in_words, size_of
from air_plugin.utils.errors import UserError, explain
from air_plugin.utils.progress import handled_by
from datasets import archives
from datasets import download as fetching
from datasets.archives import unpack
from datasets.download import download

DATA = random.Random(0).randbytes(300_000)
MD5 = f"md5:{hashlib.md5(DATA, usedforsecurity=False).hexdigest()}"


class Server(ThreadingHTTPServer):
    """Serves `data`; `asked` holds the Range of every request, and None where there was none.

    cuts: after how many bytes each of the next answers ends early. ranges: whether Range is understood.
    failures: status codes of the next answers. etag: of the file, or empty. shift: by how much ranges are wrong.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.data, self.ranges, self.etag, self.shift = DATA, True, '"one"', 0
        self.cuts: list[int] = []
        self.failures: list[int] = []
        self.asked: list[str | None] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/some.bin"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server = self.server
        asked, condition = self.headers.get("Range"), self.headers.get("If-Range")
        server.asked.append(asked)
        if server.failures:
            self.send_error(server.failures.pop(0))
            return
        start = 0
        if asked and server.ranges and condition in (None, server.etag):
            start = int(asked.removeprefix("bytes=").removesuffix("-")) + server.shift
            if start >= len(server.data):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(server.data)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(server.data) - 1}/{len(server.data)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(server.data) - start))
        if server.etag:
            self.send_header("ETag", server.etag)
        self.end_headers()
        body = server.data[start:]
        self.wfile.write(body[: server.cuts.pop(0)] if server.cuts else body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("AIR_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_the_size_is_what_the_server_states(server: Server, monkeypatch: pytest.MonkeyPatch):
    assert size_of(server.address) is None  # this one answers no HEAD
    monkeypatch.setattr(Handler, "do_HEAD", Handler.do_GET, raising=False)
    assert size_of(server.address) == len(DATA)
    assert size_of("http://127.0.0.1:1/x", timeout=0.5) is None
    assert [in_words(size) for size in (94_300_000, 2_750_000_000, None)] == ["94.3 MB", "2.8 GB", "size unknown"]


def test_a_download_reports_how_far_it_is(server: Server, tmp_path: Path):
    server.data = bytes(3_400_000)
    server.cuts = [1_500_000]
    events = []
    with handled_by(events.append):
        fetched(server, tmp_path / "some.bin")
    counts = [(event.done, event.total) for event in events if event.stage == "some.bin"]
    assert counts[-1] == (3, 3) and (2, 3) in counts and {total for _, total in counts} == {3}


def fetched(server: Server, target: Path, **options: Any) -> bytes:
    return download(server.address, target, wait=0, **options).read_bytes()


def leftovers(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.endswith(".lock")}


# Downloads


def test_a_whole_file(server: Server, tmp_path: Path):
    target = tmp_path / "new" / "some.bin"
    assert fetched(server, target, checksum=MD5, size=len(DATA)) == DATA
    assert leftovers(target.parent) == {"some.bin"}
    assert fetched(server, target, checksum=MD5) == DATA
    assert server.asked == [None]  # the second call asked for nothing


def test_cut_connections_go_on_where_they_were(server: Server, tmp_path: Path):
    server.cuts = [100_000, 0, 50_000]
    assert fetched(server, tmp_path / "some.bin", checksum=MD5) == DATA
    assert server.asked == [None, "bytes=100000-", "bytes=100000-", "bytes=150000-"]


def test_a_later_call_goes_on_where_the_first_gave_up(server: Server, tmp_path: Path):
    server.cuts = [100_000, 0, 0]
    with pytest.raises(UserError, match=r"cut after 100000 of 300000 bytes; 100000 bytes are kept in .*\.part"):
        fetched(server, tmp_path / "some.bin", checksum=MD5, attempts=2)
    assert not (tmp_path / "some.bin").exists()
    server.cuts, server.asked = [], []
    assert fetched(server, tmp_path / "some.bin", checksum=MD5) == DATA
    assert server.asked == ["bytes=100000-"]


def test_a_server_without_ranges_begins_again(server: Server, tmp_path: Path):
    server.ranges, server.cuts = False, [100_000]
    assert fetched(server, tmp_path / "some.bin", checksum=MD5) == DATA
    assert server.asked == [None, "bytes=100000-"]


def test_without_checksum_a_file_that_changed_meanwhile_is_fetched_anew(server: Server, tmp_path: Path):
    server.cuts = [100_000]
    with pytest.raises(UserError, match="cut after"):
        fetched(server, tmp_path / "some.bin", attempts=1)
    server.data, server.etag = DATA[::-1], '"two"'
    assert fetched(server, tmp_path / "some.bin") == DATA[::-1]
    assert leftovers(tmp_path) == {"some.bin"}


def test_without_checksum_and_mark_nothing_is_pieced_together(server: Server, tmp_path: Path):
    server.etag, server.cuts = "", [100_000]
    assert fetched(server, tmp_path / "some.bin") == DATA
    assert server.asked == [None, None]


def test_another_part_than_the_one_asked_for_is_not_taken(server: Server, tmp_path: Path):
    server.cuts, server.shift = [100_000], 7
    assert fetched(server, tmp_path / "some.bin", checksum=MD5) == DATA
    assert server.asked == [None, "bytes=100000-", None]


@pytest.mark.parametrize("kept", [DATA, DATA + b"more"], ids=["whole", "too long"])
def test_a_part_that_has_nothing_left_to_fetch(server: Server, tmp_path: Path, kept: bytes):
    (tmp_path / "some.bin.part").write_bytes(kept)
    assert fetched(server, tmp_path / "some.bin", checksum=MD5) == DATA
    assert server.asked == [f"bytes={len(kept)}-", *([None] if kept != DATA else [])]


def test_a_wrong_checksum_leaves_nothing_to_build_on(server: Server, tmp_path: Path):
    with pytest.raises(UserError, match=r"has the md5 .* instead of 0123, and was removed"):
        fetched(server, tmp_path / "some.bin", checksum="md5:0123")
    assert not leftovers(tmp_path) - {"some.bin.part.mark"}
    with pytest.raises(UserError, match="has 300000 bytes instead of 5"):
        fetched(server, tmp_path / "some.bin", size=5)
    (tmp_path / "some.bin").write_bytes(b"from elsewhere")
    with pytest.raises(UserError, match=r"some\.bin has the md5 .*; remove it"):
        fetched(server, tmp_path / "some.bin", checksum=MD5)
    assert (tmp_path / "some.bin").read_bytes() == b"from elsewhere"  # a person's file is theirs to remove


def test_a_missing_file_is_told_at_once(server: Server, tmp_path: Path):
    server.failures = [404, 404]
    with pytest.raises(UserError, match=f"{server.address} answers 404 Not Found; .* by hand"):
        fetched(server, tmp_path / "some.bin")
    assert len(server.asked) == 1


def test_a_busy_server_is_asked_again(server: Server, tmp_path: Path):
    server.failures = [503, 429]
    assert fetched(server, tmp_path / "some.bin", checksum=MD5) == DATA


def test_no_server(tmp_path: Path):
    with Server() as gone:
        address = gone.address
    with pytest.raises(UserError, match=r"the connection failed .*; without a network, fetch it elsewhere"):
        download(address, tmp_path / "some.bin", wait=0, attempts=2)
    with pytest.raises(UserError, match="must begin with http"):
        download("file:///etc/passwd", tmp_path / "some.bin")


def test_offline_nothing_is_asked_for(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AIR_OFFLINE", "1")
    with pytest.raises(UserError, match="AIR_OFFLINE is set"):
        fetched(server, tmp_path / "some.bin")
    assert not server.asked
    (tmp_path / "some.bin").write_bytes(DATA)
    assert fetched(server, tmp_path / "some.bin", checksum=MD5) == DATA


def test_a_full_disk_keeps_what_has_arrived(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError) as caught:
            fetched(server, tmp_path / "some.bin", checksum=MD5)
    assert "the disk is full" in str(explain(caught.value))
    assert not (tmp_path / "some.bin").exists()
    assert fetched(server, tmp_path / "some.bin", checksum=MD5) == DATA


def test_a_file_that_cannot_fit_is_not_begun(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(UserError, match="GB free"):
        fetched(server, tmp_path / "some.bin")


# Archives

FILES = {"top/a.txt": b"a" * 10, "top/deep/er/b.bin": DATA[:5000], "c d \u00fc.txt": b""}


def write_tar(path: Path, files: dict[str, bytes], *more: tarfile.TarInfo, mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for info in more:
            archive.addfile(info)
    return path


def write_zip(path: Path, files: dict[str, bytes], *, kind: int = 0) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = kind << 16
            archive.writestr(info, data, zipfile.ZIP_DEFLATED)
    return path


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def below(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("form", ["zip", "tar", "tgz", "tar.xz"])
def test_archives_unpack_to_what_was_packed(tmp_path: Path, form: str):
    path = tmp_path / f"some.{form}"
    if form == "zip":
        write_zip(path, FILES)
    else:
        write_tar(path, FILES, mode={"tar": "w", "tgz": "w:gz", "tar.xz": "w:xz"}[form])
    assert below(unpack(path, tmp_path / "out")) == FILES


HOSTILE = [
    ({"../evil": b"x"}, (), "a path out of its folder"),
    ({"a/../../evil": b"x"}, (), "a path out of its folder"),
    ({"a\\..\\..\\evil": b"x"}, (), "a path out of its folder"),
    ({"/tmp/evil": b"x"}, (), "an absolute path"),
    ({"C:\\evil": b"x"}, (), "an absolute path"),
    ({}, (special("link", tarfile.SYMTYPE, "../.."),), "a link"),
    ({}, (special("link", tarfile.SYMTYPE, "/etc"),), "a link"),
    ({}, (special("link", tarfile.LNKTYPE, "../outside.txt"),), "a link"),
    ({}, (special("device", tarfile.CHRTYPE),), "no file"),
    ({}, (special("device", tarfile.BLKTYPE),), "no file"),
    ({}, (special("pipe", tarfile.FIFOTYPE),), "no file"),
]


@pytest.mark.parametrize(("files", "more", "why"), HOSTILE)
def test_hostile_tar_archives_are_refused_whole(
    tmp_path: Path, files: dict[str, bytes], more: tuple[tarfile.TarInfo, ...], why: str
):
    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "outside.txt").write_text("untouched")
    path = write_tar(tmp_path / "some.tgz", {"good.txt": b"good", **files}, *more)
    before = below(tmp_path)
    with pytest.raises(UserError, match=f"{why}; nothing of it was unpacked"):
        unpack(path, inner / "out")
    assert below(tmp_path) == before and not list(inner.iterdir())
    assert not Path("/tmp/evil").exists()


@pytest.mark.parametrize(("files", "more", "why"), [row for row in HOSTILE if row[0]])
def test_hostile_zip_archives_are_refused_whole(tmp_path: Path, files: dict[str, bytes], more: Any, why: str):
    path = write_zip(tmp_path / "some.zip", {"good.txt": b"good", **files})
    with pytest.raises(UserError, match=why):
        unpack(path, tmp_path / "out")
    assert leftovers(tmp_path) == {"some.zip"}


def test_a_link_in_a_zip_archive_is_refused(tmp_path: Path):
    path = write_zip(tmp_path / "some.zip", {"link": b"/etc/passwd"}, kind=stat.S_IFLNK | 0o777)
    with pytest.raises(UserError, match="a link"):
        unpack(path, tmp_path / "out")


@pytest.mark.parametrize("form", ["zip", "tgz"])
def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path: Path, form: str):
    files = {"a": bytes(3_000_000), "b": bytes(3_000_000)}
    path = tmp_path / f"some.{form}"
    (write_zip if form == "zip" else write_tar)(path, files)
    assert path.stat().st_size < 50_000
    with pytest.raises(UserError, match="more than 5000000 bytes"):
        unpack(path, tmp_path / "out", limit=5_000_000)
    assert leftovers(tmp_path) == {path.name}
    assert below(unpack(path, tmp_path / "out", limit=6_000_000)) == files


@pytest.mark.parametrize("form", ["zip", "tgz"])
@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_a_damaged_archive_is_told_in_one_line(tmp_path: Path, form: str, keep: float):
    path = tmp_path / f"some.{form}"
    (write_zip if form == "zip" else write_tar)(path, {str(n): DATA[n * 1000 : (n + 1) * 1000] for n in range(50)})
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(UserError, match=r"damaged|no zip or tar") as caught:
        unpack(path, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert leftovers(tmp_path) == {path.name}


def test_a_zip_archive_with_a_wrong_byte(tmp_path: Path):
    path = write_zip(tmp_path / "some.zip", {"a": DATA[:10_000]})
    data = bytearray(path.read_bytes())
    data[5000] ^= 255
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        unpack(path, tmp_path / "out")


def test_what_is_no_archive(tmp_path: Path):
    path = tmp_path / "some.zip"
    path.write_text("<html>please log in</html>")
    with pytest.raises(UserError, match="no zip or tar archive"):
        unpack(path, tmp_path / "out")
    with pytest.raises(UserError, match="is empty"):
        unpack(write_tar(tmp_path / "empty.tgz", {}), tmp_path / "out")
    clash = write_tar(tmp_path / "clash.tgz", {"a": b"file", "a/b": b"below it"})
    with pytest.raises(UserError, match="damaged"):
        unpack(clash, tmp_path / "out")


def test_a_full_disk_leaves_no_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any, **__: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = write_zip(tmp_path / "some.zip", FILES)
    monkeypatch.setattr(archives, "_copy", full)
    with pytest.raises(OSError) as caught:
        unpack(path, tmp_path / "out")
    assert "the disk is full" in str(explain(caught.value))
    assert leftovers(tmp_path) == {"some.zip"}
