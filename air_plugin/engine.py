"""Work in many places: units that are done by workers of this machine, or of a cluster (Ray).

A unit is something that is atomic on disk, for instance a run, a batch of images or a chunk of features. A unit that
was lost with its worker is done again; the same bits come out whatever the engine, the number of workers and the order.

Environment: ENGINE (local, the default, or ray), RAY_ADDRESS (a cluster's; without it Ray starts on this machine),
WORKERS (see `number_of_workers`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from air_plugin.utils.errors import UserError, unknown
from air_plugin.utils.processes import Processes
from air_plugin.utils.progress import Event
from air_plugin.utils.units import Died, Done, Failed, Message, Ready, Task, is_worker

log = logging.getLogger(__name__)

RETRIES = 2  # of a unit whose worker died
WAIT = 1.0  # seconds; a driver looks at its workers this often at least

Choose = Callable[[Sequence[int], Sequence[int]], int | None]
Tick = Callable[[Sequence[int]], None]


class Engine(Protocol):
    """Spreads units over workers; an engine says who these are (`crew`).

    name: as in ENGINE.
    """

    name: str

    def gpus(self) -> float:
        """How many GPUs it hands out to workers; 0 where every worker sees all GPUs of this machine."""

    def capacity(self, *, gpus: float = 0.0) -> int:
        """How many workers with so many GPUs each there is room for now, at least 1.

        Raises:
            UserError: the cluster cannot be used, or has no such GPU.
        """

    def crew(self, task: Task, *, workers: int, gpus: float, folders: Sequence[Path], events: bool) -> Crew | None:
        """The workers that do a task, see `map`; None: this process does it. events: whether they send any."""

    def map(
        self,
        setup: Callable[[], Any],
        work: Callable[[Any, Any], Any],
        units: Sequence[Any],
        *,
        workers: int,
        gpus: float = 0.0,
        title: str = "",
        folders: Sequence[Path] = (),
        choose: Choose | None = None,
        progress: Callable[[int, Event], None] | None = None,
        tick: Tick | None = None,
    ) -> Iterator[tuple[int, Any]]:
        """Do units.

        Args:
            setup: is called once by each worker; returns its state, for instance a loaded model. Where workers are
                other processes, `setup`, `work`, units and results are pickled: functions of a module, or
                `functools.partial` of one.
            work: `work(state, unit)` does one unit and returns its result.
            units: what is to be done.
            workers: how many there are at most.
            gpus: of each worker; 0.25 lets four of them share one.
            title: what a unit is, for messages; its `name` follows, or its number where it has none.
            folders: that every worker must see, as this process sees them; a cluster's nodes are checked before any
                work.
            choose: is called with the indices of the units that wait and of those that are worked on; returns the next
                one's, or None for none now. Where it returns None and nothing is worked on, the work ends. Default: in
                their order, those of a lost worker first.
            progress: is called with a unit's index and an event of it, where workers are other processes.
            tick: is called with the indices of the units that are worked on, once a second at least; as `progress`.

        Yields:
            The index of a unit and its result, as they are finished.

        Raises:
            UserError: the workers of a unit died `RETRIES` + 1 times; all others have been done. Bad input: see the
                engine.
            Exception: what `setup` or `work` raised.
        """
        if not units:
            return
        crew = self.crew(Task(setup, work), workers=workers, gpus=gpus, folders=folders, events=progress is not None)
        if crew is not None:
            spread = Spread(crew, units, workers=workers, title=title, choose=choose, progress=progress, tick=tick)
            yield from spread.results()
            return
        state, waiting = setup(), list(range(len(units)))
        while waiting and (index := (choose or first)(waiting, [])) is not None:
            waiting.remove(index)
            yield index, work(state, units[index])


class LocalEngine(Engine):
    """Workers are processes of this machine; with one worker the work is done in this process.

    copies: is asked before each worker is started whether it may be a copy of this process (fork). That is for
        processes without threads that have not used CUDA. If it may at first, every worker does one unit.
    """

    name = "local"

    def __init__(self, *, copies: Callable[[], bool] | None = None) -> None:
        self.copies = copies

    def gpus(self) -> float:
        return 0.0

    def capacity(self, *, gpus: float = 0.0) -> int:
        return 1

    def crew(self, task: Task, *, workers: int, gpus: float, folders: Sequence[Path], events: bool) -> Crew | None:
        return Processes(task, copies=self.copies, gpus=gpus) if workers > 1 and not is_worker() else None


class RayEngine(Engine):
    """Workers are Ray's actors; see `air_plugin.utils.nodes` for what is checked before any work."""

    name = "ray"

    def gpus(self) -> float:
        from air_plugin.utils import cluster, nodes

        cluster.connect()
        return sum(node.gpus for node in nodes.alive_nodes())

    def capacity(self, *, gpus: float = 0.0) -> int:
        from air_plugin.utils import cluster

        cluster.connect()
        return cluster.capacity(gpus=gpus)

    def crew(self, task: Task, *, workers: int, gpus: float, folders: Sequence[Path], events: bool) -> Crew | None:
        from air_plugin.utils import cluster, nodes

        self.capacity(gpus=gpus)  # refuses what the cluster does not have
        nodes.require_nodes(folders)
        return cluster.Actors(task, gpus=gpus, events=events)


def chosen() -> Engine:
    """The engine that the environment names; a worker of an engine does its own work by itself.

    Raises:
        UserError: ENGINE has another value.
    """
    name = os.environ.get("ENGINE", "") or "local"
    engines: dict[str, type[Engine]] = {"local": LocalEngine, "ray": RayEngine}
    if name not in engines:
        raise unknown("ENGINE", name, engines)
    return LocalEngine() if is_worker() else engines[name]()


def number_of_workers(engine: Engine, *, gpus: float | None = None) -> int:
    """WORKERS: how many workers a single run has; without it 1 on this machine, and what fits on a cluster.

    gpus: of each worker; default: one where the engine hands out any.

    Raises:
        UserError: WORKERS is no such number, or the cluster cannot be used.
    """
    word = os.environ.get("WORKERS", "")
    if word and not (word.isascii() and word.isdigit() and 1 <= int(word) <= 9999):
        raise UserError(f"WORKERS is '{word}'; it must be a whole number, at least 1")
    if is_worker():
        return 1
    return int(word) if word else engine.capacity(gpus=min(1.0, engine.gpus()) if gpus is None else gpus)


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


class Spread:
    """Hands units out to workers until all of them are done."""

    def __init__(
        self,
        crew: Crew,
        units: Sequence[Any],
        *,
        workers: int,
        title: str,
        choose: Choose | None,
        progress: Callable[[int, Event], None] | None,
        tick: Tick | None,
    ) -> None:
        self.crew, self.units, self.workers, self.title = crew, units, workers, title or "unit"
        self.choose, self.progress, self.tick = choose or first, progress, tick
        self.waiting = list(range(len(units)))
        self.starting: set[int] = set()
        self.ready: list[int] = []
        self.active: dict[int, int] = {}  # worker -> unit
        self.deaths: dict[int, int] = {}
        self.hired = self.early_deaths = 0
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
        while self.waiting and (self.ready or (self.crew.copies and len(self.active) < self.workers)):
            index = self.choose(self.waiting, list(self.active.values()))
            if index is None:
                return bool(self.active)
            self.waiting.remove(index)
            number = self.ready.pop() if self.ready else self._hire()
            self.active[number] = index
            self.crew.begin(number, self.units[index])
        if not self.crew.copies:
            present = len(self.active) + len(self.ready) + len(self.starting)
            for _ in range(min(self.workers, len(self.active) + len(self.waiting)) - present):
                self.starting.add(self._hire())
        return bool(self.active or self.waiting)

    def _hire(self) -> int:
        self.hired += 1
        self.crew.hire(self.hired)
        return self.hired

    def _take(self, number: int, message: Message) -> Iterator[tuple[int, Any]]:
        """What a worker has sent."""
        if isinstance(message, Event):
            if self.progress is not None and number in self.active:
                self.progress(self.active[number], message)
        elif isinstance(message, Ready):
            if number in self.starting:  # else its unit waits for it
                self.starting.remove(number)
                self.ready.append(number)
        elif isinstance(message, Failed):
            raise message.error from RuntimeError(message.traceback)
        elif isinstance(message, Done):
            index = self.active.pop(number)
            if self.crew.copies:
                self.crew.dismiss(number)
            else:
                self.ready.append(number)
            yield index, message.result
        else:
            self._bury(number, message)

    def _bury(self, number: int, message: Died) -> None:
        """A worker has died: its unit waits again, unless that happened too often."""
        self.crew.dismiss(number)
        if number not in self.active:
            self.early_deaths += number in self.starting
            self.starting.discard(number)
            self.ready = [other for other in self.ready if other != number]
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
