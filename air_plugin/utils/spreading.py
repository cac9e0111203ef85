"""How units are handed out to workers, by whatever they are: processes of this machine, or actors of a cluster."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from air_plugin.utils.errors import UserError
from air_plugin.utils.progress import Event
from air_plugin.utils.units import Died, Done, Failed, Message, Ready

log = logging.getLogger(__name__)

RETRIES = 2  # of a unit whose worker died
WAIT = 1.0  # seconds; a driver looks at its workers this often at least

Choose = Callable[[Sequence[int], Sequence[int]], int | None]
Tick = Callable[[Sequence[int]], None]


def first(waiting: Sequence[int], active: Sequence[int]) -> int:
    """The unit that waits for the longest time."""
    return waiting[0]


class Crew(Protocol):
    """The workers of a spread, by their numbers."""

    copies: Callable[[], bool] | None  # where set, a worker does one unit and is started for it

    def hire(self, number: int) -> None:
        """Begin to start a worker; `Ready` is its first message."""

    def begin(self, number: int, unit: Any) -> None:
        """Let a worker do a unit."""

    def messages(self, timeout: float) -> list[tuple[int, Message]]:
        """What workers have sent, as soon as there is anything."""

    def dismiss(self, number: int) -> None:
        """Let go of a worker that is ready, or has died."""

    def close(self, *, now: bool) -> None:
        """End all workers; now: also those at work."""


@dataclass
class Staff:
    """Workers without a unit.

    hired: how many workers there ever were; their numbers go from 1 to it.
    starting, ready: numbers.
    """

    hired: int = 0
    starting: set[int] = field(default_factory=set)
    ready: list[int] = field(default_factory=list)


class Spread:
    """Hands units out to workers until all of them are done.

    staff: workers that an earlier spread has left in the crew, and then those that this one leaves there.
    """

    def __init__(
        self,
        crew: Crew,
        units: Sequence[Any],
        *,
        workers: int,
        title: str,
        choose: Choose | None = None,
        progress: Callable[[int, Event], None] | None = None,
        tick: Tick | None = None,
        staff: Staff | None = None,
    ) -> None:
        self.crew, self.units, self.workers, self.title = crew, units, workers, title or "unit"
        self.choose, self.progress, self.tick = choose or first, progress, tick
        self.staff = Staff() if staff is None else staff
        self.waiting = list(range(len(units)))
        self.active: dict[int, int] = {}  # worker -> unit
        self.deaths: dict[int, int] = {}
        self.early_deaths = 0
        self.given_up: dict[int, str] = {}  # unit -> why

    def results(self) -> Iterator[tuple[int, Any]]:
        """See `Engine.map`."""
        whole = False
        try:
            while self._go_on():
                for number, message in self.crew.messages(WAIT):
                    yield from self._take(number, message)
                if self.tick is not None:
                    self.tick(list(self.active.values()))
            whole = True
        finally:
            self.crew.close(now=not whole)
        if self.given_up:
            hint = "perhaps for lack of memory; use fewer at once (JOBS, WORKERS); finished work is kept"
            raise UserError(f"{self.given_up[min(self.given_up)]}, {hint}")

    def _go_on(self) -> bool:
        """Hand out what can be handed out; returns whether there is anything to wait for."""
        while self.waiting and (self.staff.ready or (self.crew.copies and len(self.active) < self.workers)):
            index = self.choose(self.waiting, list(self.active.values()))
            if index is None:
                return bool(self.active)
            self.waiting.remove(index)
            number = self.staff.ready.pop() if self.staff.ready else self._hire()
            self.active[number] = index
            self.crew.begin(number, self.units[index])
        if not self.crew.copies:
            present = len(self.active) + len(self.staff.ready) + len(self.staff.starting)
            for _ in range(min(self.workers, len(self.active) + len(self.waiting)) - present):
                self.staff.starting.add(self._hire())
        return bool(self.active or self.waiting)

    def _hire(self) -> int:
        self.staff.hired += 1
        self.crew.hire(self.staff.hired)
        return self.staff.hired

    def _take(self, number: int, message: Message) -> Iterator[tuple[int, Any]]:
        """What a worker has sent."""
        if isinstance(message, Event):
            if self.progress is not None and number in self.active:
                self.progress(self.active[number], message)
        elif isinstance(message, Ready):
            if number in self.staff.starting:  # else its unit waits for it
                self.staff.starting.remove(number)
                self.staff.ready.append(number)
        elif isinstance(message, Failed):
            raise message.error from RuntimeError(message.traceback)
        elif isinstance(message, Done):
            index = self.active.pop(number)
            if self.crew.copies:
                self.crew.dismiss(number)
            else:
                self.staff.ready.append(number)
            yield index, message.result
        else:
            self._bury(number, message)

    def _bury(self, number: int, message: Died) -> None:
        """A worker has died: its unit waits again, unless that happened too often."""
        self.crew.dismiss(number)
        if number not in self.active:
            self.early_deaths += number in self.staff.starting
            self.staff.starting.discard(number)
            self.staff.ready = [other for other in self.staff.ready if other != number]
            if self.early_deaths > RETRIES + self.workers:
                raise UserError(f"workers end before they begin: the last one {message.how}")
            return
        index = self.active.pop(number)
        self.deaths[index] = self.deaths.get(index, 0) + 1
        unit = f"{self.title} {getattr(self.units[index], 'name', f'{index + 1} of {len(self.units)}')}"
        if self.deaths[index] > RETRIES:
            self.given_up[index] = f"{unit}: {self.deaths[index]} workers died of it, the last one {message.how}"
        else:
            log.warning("the worker of %s %s; another one does it again", unit, message.how)
            self.waiting.insert(0, index)
