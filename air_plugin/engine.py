"""Work in many places: units that are done by workers of this machine, or of a cluster (Ray).

A unit is something that is atomic on disk, for instance a run, a batch of images or a chunk of features. A unit that
was lost with its worker is done again; the same bits come out whatever the engine, the number of workers and the order.

Environment: ENGINE (local, the default, or ray), RAY_ADDRESS (a cluster's; without it Ray starts on this machine),
WORKERS (see `number_of_workers`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from air_plugin.utils.errors import UserError, unknown
from air_plugin.utils.processes import Processes
from air_plugin.utils.progress import Event
from air_plugin.utils.spreading import Choose, Crew, Spread, Staff, Tick, first
from air_plugin.utils.team import Lent, do_step
from air_plugin.utils.units import Task, is_worker


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


class Team:
    """Workers that stay from one `map` to the next: of many short works each begins at once. A context manager.

    The workers are those of an engine, and start with the first units. A team of one worker of this machine is this
    process. After an error the workers are ended, and the next `map` starts others.

    Args:
        engine: whose workers; default: the one that ENGINE names.
        workers, gpus, folders: see `Engine.map`.

    Example:
        >>> with Team(workers=8, folders=[table.path.parent]) as team:
        ...     refine_shards(images, prior=prior, map_shards=team.map)
    """

    def __init__(
        self, engine: Engine | None = None, *, workers: int, gpus: float = 0.0, folders: Sequence[Path] = ()
    ) -> None:
        self.engine, self.workers, self.gpus, self.folders = engine or chosen(), workers, gpus, folders
        self.crew: Crew | None = None
        self.staff = Staff()

    def map(
        self, setup: Callable[[], Any], work: Callable[[Any, Any], Any], units: Sequence[Any], *, title: str = "shard"
    ) -> Iterator[tuple[int, Any]]:
        """See `Engine.map`. One `map` at a time."""
        if self.crew is None:
            options: dict[str, Any] = {"workers": self.workers, "gpus": self.gpus, "folders": self.folders}
            self.crew = self.engine.crew(Task(dict, do_step), **options, events=False)
        if self.crew is None:
            yield from self.engine.map(setup, work, units, workers=1, title=title)
            return
        lent = Lent(self.crew, Task(setup, work), partial(self.close, now=True))
        yield from Spread(lent, units, workers=self.workers, title=title, staff=self.staff).results()

    def close(self, *, now: bool = False) -> None:
        """End the workers; now: also those at work."""
        if self.crew is not None:
            self.crew.close(now=now)
        self.crew, self.staff = None, Staff()

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
