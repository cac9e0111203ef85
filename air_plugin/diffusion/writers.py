"""Files of generated images and their manifest, written by threads while the next images are generated."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from queue import Queue
from threading import Thread
from types import TracebackType
from typing import IO, Any

import numpy as np
from PIL import Image

from air_plugin.diffusion.jobs import ImageJob
from air_plugin.utils.files import digest, to_json, write_atomically

log = logging.getLogger(__name__)

MANIFEST = "manifest.jsonl"
LOCK = ".manifest.lock"
THREADS = 4  # PNG compression and SHA-256 run outside of Python's lock

Records = dict[str, dict[str, Any]]  # lines of the manifest by the key of the image


class ImageWriter:
    """Writes images in threads; a context manager that leaves when all of them are written.

    An image counts when its line is in the manifest. The line is written after the file, and in the order of `put`, so
    a process that is killed leaves nothing half-written that counts.

    Example:
        >>> with ImageWriter(folder, records, waiting=32) as writer:
        ...     writer.put(job, pixels, attempt=0)  # (H, W, 3) uint8
    """

    def __init__(
        self, folder: Path, records: Records, *, waiting: int, recorded: Callable[[str], None] | None = None
    ) -> None:
        """
        Args:
            folder: of the images (`<key>.png`) and of the manifest.
            records: get the line of each image.
            waiting: images that may wait to be written; with more, `put` waits.
            recorded: is called with the key of each image that is in the manifest, by a thread.
        """
        self.folder, self.records, self.recorded = folder, records, recorded
        self._error: BaseException | None = None
        self._waiting: Queue[tuple[ImageJob, int, Future[str]] | None] = Queue(waiting)
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="image")
        self._manifest = Thread(target=self._record, name="manifest", daemon=True)

    def __enter__(self) -> ImageWriter:
        self._manifest.start()
        return self

    def put(self, job: ImageJob, pixels: np.ndarray, attempt: int) -> None:
        """Hand over an (H, W, 3) uint8 image.

        Raises:
            OSError: an image before could not be written, for instance because the disk is full.
        """
        self._raise_error()
        written = self._pool.submit(write_image, self.folder / f"{job.key}.png", pixels)
        self._waiting.put((job, attempt, written))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Write what waits, also after an error or Ctrl-C: these images are finished."""
        self._waiting.put(None)
        self._manifest.join()
        self._pool.shutdown()
        if error is None:
            self._raise_error()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _record(self) -> None:
        """Add the line of each image to the manifest; after an error, no more."""
        while (item := self._waiting.get()) is not None:
            job, attempt, written = item
            if self._error is not None:
                written.cancel()
                continue
            try:
                self.records[job.key] = add_line(self.folder, job, attempt, written.result())
                if self.recorded is not None:
                    self.recorded(job.key)
            except Exception as error:
                self._error = error  # `put` or `__exit__` raises it


def write_image(path: Path, pixels: np.ndarray) -> str:
    """Write an image as PNG; returns the SHA-256 of the file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png")
    data = buffer.getvalue()
    write_atomically(path, data)
    return digest(data)


def add_line(folder: Path, job: ImageJob, attempt: int, sha256: str) -> dict[str, Any]:
    """Add the line of an image to the manifest and return it; see `add_lines`."""
    return add_lines(folder, [(job, attempt, sha256)])[0]


def add_lines(folder: Path, written: Sequence[tuple[ImageJob, int, str]]) -> list[dict[str, Any]]:
    """Add lines of images to the manifest under one lock and return them; several processes may do so at a time.

    written: jobs of finished images, the number of the attempt, and the SHA-256 of the file.
    """
    from filelock import FileLock

    lines = [{**asdict(job), "key": job.key, "attempt": attempt, "sha256": sha256} for job, attempt, sha256 in written]
    with FileLock(folder / LOCK), open(folder / MANIFEST, "ab+") as manifest:
        if manifest.tell() and _last_byte(manifest) != b"\n":  # of a process that was killed
            manifest.write(b"\n")
        manifest.write(b"".join(to_json(line).encode() + b"\n" for line in lines))
    return lines


def _last_byte(file: IO[bytes]) -> bytes:
    file.seek(-1, 2)
    return file.read(1)


def read_manifest(folder: Path) -> Records:
    """The records of the manifest by key; a line that is incomplete, because a run was killed, is left out."""
    records: Records = {}
    read_lines(folder, records, 0)
    return records


def read_lines(folder: Path, records: Records, position: int) -> tuple[int, set[str]]:
    """Put the whole lines of the manifest from a position on into `records`; returns where they end, and their keys."""
    path = folder / MANIFEST
    if not path.exists():
        return position, set()
    with open(path, "rb") as manifest:
        manifest.seek(position)
        text = manifest.read()
    end = text.rfind(b"\n") + 1
    keys = set()
    for line in text.splitlines():  # the last one may lack its end: it is read again when it has that
        try:
            record = json.loads(line)
            records[record["key"]] = record
            keys.add(record["key"])
        except (ValueError, KeyError, TypeError):
            if not position:  # else another process may be writing it
                log.info("cache: a damaged line in %s is left out", path)
    return position + end, keys


def is_whole(folder: Path, job: ImageJob, records: Records) -> bool:
    """Whether an image exists with the checksum of its record."""
    path = folder / f"{job.key}.png"
    if job.key not in records or not path.exists():
        return False
    if digest(path.read_bytes()) == records[job.key].get("sha256"):
        return True
    log.info("cache: %s is thrown away and made again: its content does not match its key", path)
    return False
