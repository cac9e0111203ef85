"""Progress of long work: a bar on a terminal; elsewhere, as in a run's log.txt, a line from time to time.

It is reported as events, too: as with a log, an entry sets their handler, and without one nothing happens.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

EVERY = 30.0  # seconds between two lines
FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"

log = logging.getLogger(__name__)

# Events


@dataclass(frozen=True)
class Event:
    """How far a run is.

    stage: what it works on: the name of a stage (`Stages`) or the title of a bar.
    done, total: in steps, epochs or images; total is 0 where it is unknown.
    loss: the last one; None where there is none.
    time: when it was reported, in seconds since 1970.
    """

    stage: str
    done: int = 0
    total: int = 0
    loss: float | None = None
    time: float = field(default_factory=time.time)


Handler = Callable[[Event], None]
_handler: Handler | None = None


@contextmanager
def handled_by(handler: Handler) -> Iterator[None]:
    """Let a handler have every event of this process for a while; it may be called from any thread.

    Example:
        >>> with handled_by(print):
        ...     report("lora", 1, 300, loss=0.5)
        Event(stage='lora', done=1, total=300, loss=0.5, time=...)
    """
    global _handler
    before, _handler = _handler, handler
    try:
        yield
    finally:
        _handler = before


def report(stage: str, done: int = 0, total: int = 0, *, loss: float | None = None) -> None:
    """Tell the handler, if there is one, how far a stage is; see `Event`."""
    if _handler is not None:
        _handler(Event(stage, done, total, loss))


# A bar


class Progress:
    """A bar with its rate on a terminal, else lines in the log, one in `EVERY` seconds; and events in any case.

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
        report(self.title, self.done, self.total)

    def update(self, count: int = 1, *, loss: float | None = None) -> None:
        """Count units that are done; the bar shows the last loss."""
        self.done += count
        self.bar.update(count)
        if loss is not None:
            self.bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        report(self.title, self.done, self.total, loss=loss)
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
