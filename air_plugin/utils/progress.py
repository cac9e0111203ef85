"""Progress of long work: a bar on a terminal; elsewhere, as in a run's log.txt, a line from time to time."""

from __future__ import annotations

import logging
import time
from types import TracebackType
from typing import Any

EVERY = 30.0  # seconds between two lines
FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"

log = logging.getLogger(__name__)


class Progress:
    """A bar with its rate on stderr where that is a terminal, else lines in the log, one in `EVERY` seconds.

    Args:
        total: number of units of the whole work.
        title: of the work.
        unit: in the plural.

    Example:
        >>> with Progress(5000, title="features of train", unit="images") as progress:
        ...     progress.skip(4096)  # was done by an earlier run
        ...     progress.update(100)
        features of train: 4,196 of 5,000 images, 31.2 images/s
    """

    def __init__(self, total: int, *, title: str, unit: str) -> None:
        from tqdm import tqdm

        self.total, self.title, self.unit = total, title, unit
        self.done, self.skipped = 0, 0
        self.start = self.last = time.monotonic()
        self.bar: Any = tqdm(total=total, desc=title, unit=f" {unit}", bar_format=FORMAT, disable=None)

    def skip(self, count: int) -> None:
        """Count units that an earlier run did: they are not part of the rate."""
        self.skipped += count
        self.done += count
        self.bar.initial = self.skipped
        self.bar.update(count)

    def update(self, count: int) -> None:
        """Count units that are done."""
        self.done += count
        self.bar.update(count)
        now = time.monotonic()
        if self.bar.disable and now - self.last >= EVERY:
            self.last = now
            rate = (self.done - self.skipped) / (now - self.start)
            log.info("%s: %s of %s %s, %.1f %s/s", *self._counts(), self.unit, rate, self.unit)

    def _counts(self) -> tuple[str, str, str]:
        return self.title, f"{self.done:,}", f"{self.total:,}"

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()
