"""The images of some jobs in a folder that several processes, also of several machines, may fill at the same time."""

from __future__ import annotations

import errno
import hashlib
import logging
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from types import TracebackType

from air_plugin.diffusion.jobs import ImageJob
from air_plugin.diffusion.writers import Records, is_whole, read_lines
from air_plugin.utils.errors import UserError
from air_plugin.utils.workers import batched

try:
    import fcntl
except ImportError:  # Windows: one process at a time
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

CLAIMS = ".claims"
POLL = 0.5  # seconds between two looks at what other processes have generated


class Claims:
    """Images that this process generates; others leave them alone meanwhile.

    A claim is the lock of one byte of a file, at a place that the image's key determines. The system drops it when the
    process ends, however it ends. File systems that machines share keep such locks, too (NFS: yes; Lustre: mounted with
    flock). Two objects in one process do not exclude each other.
    """

    def __init__(self, folder: Path) -> None:
        self.file = open(folder / CLAIMS, "ab")  # noqa: SIM115  closed by `close`

    def take(self, keys: Collection[str]) -> bool:
        """Claim all of these images, or none of them where another process has claimed one.

        Raises:
            UserError: the file system has no locks.
        """
        taken: list[str] = []
        for key in keys:
            if not self._lock(key):
                self.release(taken)
                return False
            taken.append(key)
        return True

    def release(self, keys: Collection[str]) -> None:
        for key in keys:
            if fcntl is not None and not self.file.closed:
                fcntl.lockf(self.file, fcntl.LOCK_UN, 1, place(key))

    def close(self) -> None:
        self.file.close()

    def _lock(self, key: str) -> bool:
        if fcntl is None:
            return True
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place(key))
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise UserError(
                f"the file system of {self.file.name} has no file locks ({error.strerror}); mount it with them (Lustre"
                ": -o flock), or name another OUTPUT"
            ) from error
        return True


def place(key: str) -> int:
    """The byte that stands for an image."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")


class ImageSet:
    """Which images of some jobs are missing, and which of them this process generates; a context manager.

    Batches are always the same, whoever generates them: `size` jobs in their order.

    jobs: of all images.
    missing: keys of the images that are not there.
    claimed: keys of those that this process generates now.
    generated: how many it has generated.
    """

    def __init__(self, folder: Path, jobs: Sequence[ImageJob], size: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.jobs = folder, jobs
        self.by_key = {job.key: job for job in jobs}
        self.records: Records = {}
        self.position = read_lines(folder, self.records, 0)[0]
        self.missing = {job.key for job in jobs if not is_whole(folder, job, self.records)}
        self.waiting = [batch for batch in batched(jobs, size) if any(job.key in self.missing for job in batch)]
        self.claimed: set[str] = set()
        self.generated = self.found = 0
        self.announced = False

    def __enter__(self) -> ImageSet:
        self.claims = Claims(self.folder)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.claims.close()

    def take(self) -> Sequence[ImageJob] | None:
        """Claim the next batch with missing images that nobody generates; None where there is none now."""
        for batch in list(self.waiting):
            needed = [job.key for job in batch if job.key in self.missing]
            if needed and not self.claims.take(needed):
                continue
            self.refresh()  # what another process generated before it dropped its claim is in the manifest now
            left = {key for key in needed if key in self.missing}
            self.claims.release([key for key in needed if key not in left])
            self.waiting.remove(batch)
            if left:
                self.claimed |= left
                return batch
        return None

    def batches(self) -> Iterator[Sequence[ImageJob]]:
        """Batches to generate, until nobody but other processes has any."""
        while (batch := self.take()) is not None:
            yield batch

    def recorded(self, key: str) -> None:
        """An image of this process is in the manifest."""
        self.missing.discard(key)
        self.claimed.discard(key)
        self.claims.release([key])
        self.generated += 1

    def refresh(self) -> None:
        """Read what other processes have added to the manifest."""
        self.position, added = read_lines(self.folder, self.records, self.position)
        there = (added & self.missing) - self.claimed
        found = {key for key in there if is_whole(self.folder, self.by_key[key], self.records)}
        self.missing -= found
        self.found += len(found)

    def take_found(self) -> int:
        """How many images of other processes have been found since the last call."""
        count, self.found = self.found, 0
        return count

    def wait(self) -> None:
        """Let other processes go on with the images that they have claimed."""
        if not self.announced:
            self.announced = True
            log.info("images: another process generates %d of them", len(self.missing))
        time.sleep(POLL)
        self.refresh()
        self.waiting = [batch for batch in self.waiting if any(job.key in self.missing for job in batch)]
