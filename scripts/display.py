"""What a script shows while it works: one live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from air_plugin.utils.progress import Event, ticking

STATUS = 30.0  # seconds between two lines of a run's progress, where the output is no terminal
BAR = 20  # characters; half of them where the terminal is narrow


@dataclass
class Line:
    """A run that goes on: its last event, when its stage began, and how far it was then."""

    event: Event = field(default_factory=lambda: Event("starting"))
    begun: float = field(default_factory=lambda: time.time())
    first: Event | None = None  # of those that count

    def update(self, event: Event) -> None:
        if event.stage != self.event.stage:
            self.begun, self.first = event.time, None
        elif event.loss is None and self.event.loss is not None:
            event = Event(event.stage, event.done, event.total, self.event.loss, event.time)
        if self.first is None and event.total:
            self.first = event
        self.event = event

    @property
    def seconds_left(self) -> float | None:
        """Of the stage, at the rate since its first event; None where it is unknown."""
        event, first = self.event, self.first
        if first is None or event.done <= first.done:
            return None
        since = max(0.0, time.time() - event.time)  # it goes on since its last event
        return max(0.0, (event.time - first.time) / (event.done - first.done) * (event.total - event.done) - since)


class Display:
    """The runs that go on, a line each: stage, bar, time left, last loss; and how many of all have ended.

    Elsewhere than on a terminal, every run that goes on has a plain line every `STATUS` seconds.

    console: of rich; default: stdout.
    """

    def __init__(self, *, console: Any = None) -> None:
        from rich.console import Console
        from rich.live import Live

        self.console = console or Console(file=sys.stdout)
        self.stream = self.console.file  # runs in this process have another stdout meanwhile
        self.lock = threading.RLock()
        self.lines: dict[str, Line] = {}
        self.phase, self.total, self.ended = "", 0, 0
        self.begun = time.time()
        self.due = time.monotonic() + STATUS
        on_terminal = self.console.is_terminal if console else sys.stdout.isatty()
        self.live: Any = None
        if on_terminal and not self.console.is_dumb_terminal:
            self.live = Live(
                console=self.console,
                auto_refresh=False,  # a thread of its own would keep workers from being copies of this process
                transient=True,
                get_renderable=self.render,
                redirect_stderr=sys.stderr.isatty(),
            )

    def __enter__(self) -> Display:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live:
            with self.lock:
                self.lines, self.phase, self.total = {}, "", 0
                self.live.stop()

    @contextmanager
    def working(self, phase: str) -> Iterator[None]:
        """Show what this process works on, and that it goes on."""
        before, self.phase = self.phase, phase
        try:
            self.refresh()
            with ticking(self.refresh):
                yield
        finally:
            self.phase = before

    def update(self, name: str, event: Event) -> None:
        """A run has reported something."""
        with self.lock:
            self.lines.setdefault(name, Line()).update(event)

    def show(self, names: Sequence[str]) -> None:
        """The runs that go on now; shows them."""
        with self.lock:
            self.lines = {name: self.lines.get(name) or Line() for name in names}
            self.refresh()

    def end(self, name: str) -> None:
        """A run has ended."""
        with self.lock:
            self.lines.pop(name, None)
            self.ended += 1
        self.print(f"== {name} ({self.ended} of {self.total})")

    def print(self, text: str) -> None:
        """A line above the display."""
        from rich.text import Text

        with self.lock:
            if self.live:
                self.console.print(Text(text), soft_wrap=True)
            else:
                print(text, file=self.stream, flush=True)

    def refresh(self) -> None:
        with self.lock:
            if self.live:
                self.live.refresh()
            elif time.monotonic() >= self.due:
                self.due = time.monotonic() + STATUS
                for name, line in self.lines.items():
                    self.print(f"-- {name}: {describe(line.event)}, {time.time() - line.begun:.0f} s")
                if self.phase:
                    self.print(f"-- {self.phase}, {time.time() - self.begun:.0f} s")

    def render(self) -> Any:
        """The live display: a line a run, and one for all."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        with self.lock:
            dataset = {name.partition(" / ")[0] for name in self.lines}
            rows = [
                cells_of((name.partition(" / ")[2] if len(dataset) == 1 else "") or name, line)
                for name, line in self.lines.items()
            ]
            table, widths = Table.grid(padding=(0, 1)), widths_of(rows, self.console.width)
            for width in widths:
                table.add_column(no_wrap=True, overflow="ellipsis", max_width=width)
            for row in rows:
                table.add_row(*(_cell(value, width) for value, width in zip(row, widths, strict=True)))
            ended = [f"{self.ended} of {self.total} runs have ended"] if self.total else []
            words = ", ".join([*([self.phase] if self.phase else []), *ended])
            last = Text(f"{words}, {clock(time.time() - self.begun)}") if words else Text("")
            return Group(table, last) if self.lines else last


def cells_of(name: str, line: Line) -> list[Any]:
    """What a run's line shows; a bar of unknown length is a pair of zeros."""
    event, left = line.event, line.seconds_left
    count = f"{event.done:,}/{event.total:,}" if event.total else ""
    times = f"{clock(left)} left" if left is not None else clock(time.time() - line.begun)
    loss = "" if event.loss is None else f"loss {event.loss:.4f}"
    return [name, event.stage, (event.done, event.total), count, times, loss]


def widths_of(rows: Sequence[Sequence[Any]], width: int) -> list[int]:
    """The width of every column of the display; stages and names are cut where a terminal is narrow."""
    longest = (36, 24, BAR, 16, 12, 12)
    needed = [
        max((BAR // 2 if isinstance(row[n], tuple) else len(row[n]) for row in rows), default=0) for n in range(6)
    ]
    widths = [min(pair) for pair in zip(needed, longest, strict=True)]
    for column in (1, 0):
        widths[column] = max(6, widths[column] - max(0, sum(widths) + len(widths) - width))
    widths[2] = min(BAR, widths[2] + max(0, width - sum(widths) - len(widths)))
    return widths


def _cell(value: Any, width: int) -> Any:
    from rich.progress_bar import ProgressBar
    from rich.text import Text

    if isinstance(value, str):
        return Text(value)
    done, total = value
    return ProgressBar(total, done, width=width) if total else Text("")


def clock(seconds: float) -> str:
    """Seconds as people write them.

    Example:
        >>> clock(75), clock(3700)
        ('1:15', '1:01:40')
    """
    minutes, rest = divmod(max(0, int(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def describe(event: Event) -> str:
    """A stage in words.

    Example:
        >>> describe(Event("lora", 120, 300, loss=0.5))
        'lora 120 of 300 (40 %), loss 0.5000'
    """
    share = f" {event.done:,} of {event.total:,} ({100 * event.done / event.total:.0f} %)" if event.total else ""
    return event.stage + share + ("" if event.loss is None else f", loss {event.loss:.4f}")
