"""Progress of long work: a bar on a terminal; elsewhere, as in a run's log.txt, a line from time to time.

Nothing is silent for long: what cannot say how far it is (`waiting`) shows its name and time.

It is reported as events, too: as with a log, an entry sets their handler, and without one nothing happens.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

EVERY = 30.0  # seconds between two lines
SILENCE = 2.0  # seconds without an event after which a terminal shows the time
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
_reported = 0.0  # when the last event was reported


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
    global _reported
    _reported = time.monotonic()
    if _handler is not None:
        _handler(Event(stage, done, total, loss))


# Signs of life

_calls = threading.Lock()  # held while a thread of `ticking` works, so that no copy (fork) of this process finds a lock
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_calls.acquire, after_in_parent=_calls.release, after_in_child=_calls.release)


@contextmanager
def ticking(call: Callable[[], None], *, every: float = 0.5) -> Iterator[None]:
    """Call a function in a thread every so many seconds meanwhile, but never while this process is copied (fork)."""
    ended = threading.Event()

    def work() -> None:
        while not ended.wait(every):
            with _calls, suppress(OSError, ValueError):  # the terminal was closed
                call()

    thread = threading.Thread(target=work, name="ticking", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def waiting(title: str) -> Iterator[None]:
    """Report that a stage begins, and show that it goes on where nothing else is reported meanwhile.

    A terminal shows the stage's name and time. Elsewhere a line is logged every `EVERY` seconds.

    Example:
        >>> with waiting("loading the generator"):
        ...     ...
        loading the generator: 12 s
    """
    report(title)
    sign = _Sign(title)
    _signs.append(sign)
    try:
        with ticking(sign.show, every=SILENCE / 2):
            yield
    finally:
        _signs.remove(sign)
        sign.clear()


class _Sign:
    """The name and time of a stage of which nothing else is shown."""

    def __init__(self, title: str) -> None:
        self.title, self.shown = title, False
        self.start = self.logged = time.monotonic()

    def show(self) -> None:
        """Show the time, unless there was an event a short while ago; a bar that stands still shows it itself."""
        now = time.monotonic()
        silent = now - max(_reported, self.start)
        if _signs[-1:] != [self] or silent < SILENCE:
            return
        if not sys.stderr.isatty():
            if silent >= EVERY and now - self.logged >= EVERY:
                self.logged = now
                log.info("%s: %.0f s so far", self.title, now - self.start)
        elif _bars:
            _bars[-1].refresh()
        else:
            self.shown = True
            minutes, seconds = divmod(int(now - self.start), 60)
            sys.stderr.write(f"\r{self.title}: {minutes}:{seconds:02d}\x1b[K\r")  # the next line takes its place
            sys.stderr.flush()

    def clear(self) -> None:
        if self.shown and sys.stderr.isatty():
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


_signs: list[_Sign] = []  # innermost last
_bars: list[Any] = []  # those of `Progress`, on a terminal

# A bar


class Progress:
    """A bar with its rate on a terminal, else lines in the log, one in `EVERY` seconds; and events in any case.

    Args:
        total: number of units of the whole work; 0 where it is unknown.
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
        self.bar: Any = tqdm(total=total or None, desc=title, unit=f" {unit}", bar_format=FORMAT, disable=None)
        if not self.bar.disable:
            _bars.append(self.bar)

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
            amount = f"{self.done:,} of {self.total:,}" if self.total else f"{self.done:,}"
            log.info("%s: %s %s, %.1f %s/s", self.title, amount, self.unit, rate, self.unit)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar in _bars:
            _bars.remove(self.bar)
        self.bar.close()
