"""Runs of a script, one after another or side by side.

Side by side, each run is a process of its own. On Linux it is a copy (fork) of this process, which has imported the
libraries before: they are imported once, and every run begins with the same state. Elsewhere, and where this process
has threads or has used CUDA, which a copy could not use, a few processes (spawn) do one run after another. With
ENGINE=ray, the workers of a cluster do them. A run whose worker was killed resumes in another one.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from air_plugin.engine import Engine, LocalEngine, chosen
from air_plugin.utils.errors import UserError
from air_plugin.utils.progress import handled_by, ticking
from scripts.compose import uses_generator
from scripts.display import Display
from scripts.worker import GENERATING, LIBRARIES, Finished, Run, import_libraries, may_copy, set_up, work, work_on

INTERRUPTED = 130  # the exit code of a run that Ctrl-C has ended


def run_all(
    runs: list[Run], *, at_once: int, gpus: float = 0.0, folders: Sequence[Path] = (), display: Display | None = None
) -> int:
    """Do the runs with the engine that the environment names; returns the exit code of the first one that failed.

    Args:
        runs: one thread each.
        at_once: how many go on at the same time.
        gpus: of each run, where an engine hands them out.
        folders: that every worker must see.
        display: of the script; default: one for these runs.

    Raises:
        UserError: a run was killed again and again; the others have been done all the same.
        KeyboardInterrupt: Ctrl-C; all workers have ended.
    """
    if display is None:
        with Display() as own:
            return run_all(runs, at_once=at_once, gpus=gpus, folders=folders, display=own)
    engine, display.total = chosen(), display.ended + len(runs)
    count = f"{len(runs)} run{'s' if len(runs) > 1 else ''}"
    display.print(f"{count}, {at_once} at a time; each writes its log.txt")
    if at_once > 1 or engine.name != "local":
        local = engine.name == "local"
        side = SideBySide(runs, at_once, display=display, engine=None if local else engine, gpus=gpus)
        return side.run(folders)
    return one_after_another(runs, display)


def one_after_another(runs: Sequence[Run], display: Display) -> int:
    """Do runs in this process; returns the exit code of the first one that failed, which is the last one."""
    shown: set[str] = set()
    for run in runs:
        display.show([run.name])
        with ticking(display.refresh), handled_by(partial(display.update, run.name)):
            finished = work(run)
        if finished.code == INTERRUPTED:
            raise KeyboardInterrupt
        display.end(run.name)
        show_messages(finished.messages, run.name, shown)
        if finished.code:
            return finished.code
    return 0


def number_at_once(runs: Sequence[Run], *, cores: int, most: int) -> int:
    """The number of runs at the same time, from `cores` to `most`, with which the long ones have ended first.

    Three equal runs on two cores take 1.5 times as long as one of them if they share the cores, and twice as long if
    the third one waits. Where runs wait for each other's adapter, it is the number of cores.

    Args:
        runs: one thread each.
        cores: how many of these threads go on at full speed.
    """
    long = [run.generates for run in runs if run.generates is not None]
    if len(set(long)) < len(long):
        return cores
    count = len(long) or len(runs)

    def duration(number: int) -> float:
        full, rest = divmod(count, number)
        return full * number / cores + (max(1.0, rest / cores) if rest else 0.0)

    return min(range(cores, max(cores, most) + 1), key=duration)


class SideBySide:
    """Does runs, some of them at the same time, and prints what becomes of them.

    Those that generate images are the longest and begin first. Of several that share an adapter one goes first, and
    others fill the time until it has ended.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        at_once: int,
        *,
        display: Display | None = None,
        engine: Engine | None = None,
        gpus: float = 0.0,
    ) -> None:
        self.runs = sorted(runs, key=lambda run: run.generates is None)
        self.engine = engine or LocalEngine(copies=may_copy)
        self.at_once, self.gpus = at_once, gpus
        self.made: set[Any] = set()  # what the runs that have ended have generated
        self.shown: set[str] = set()  # lines of earlier runs
        self.display = display or Display()
        self.code = 0
        self.imported = False  # whether this process has what the copies need

    def run(self, folders: Sequence[Path] = ()) -> int:
        """Do all runs, or those that go on when one fails; returns the exit code of the first one that failed, else 0.

        Raises:
            UserError: a run was killed again and again.
        """
        self.imported = self.engine.name != "local" or sys.platform != "linux"
        if not self.imported:
            with self.display.working("importing libraries"):
                import_libraries(LIBRARIES)
        finished = self.engine.map(
            set_up,
            work_on,
            self.runs,
            workers=self.at_once,
            gpus=self.gpus,
            title="run",
            folders=folders,
            choose=self.choose,
            progress=lambda index, event: self.display.update(self.runs[index].name, event),
            tick=lambda active: self.display.show([self.runs[index].name for index in active]),
        )
        try:
            for index, result in finished:
                self.close(self.runs[index], result)
        except UserError:
            if not self.code:  # else a run failed before, and its message is shown
                raise
        return self.code

    def choose(self, waiting: Sequence[int], active: Sequence[int]) -> int | None:
        """The next run: not one that would wait for what another one generates, if there is another.

        While this process imports what generates images, which its copies then have, a run without that goes on.
        """
        if self.code:
            return None
        if not self.imported:
            simple = [index for index in waiting if not uses_generator(self.runs[index].cfg.TRAINER.NAME)]
            if len(simple) == len(waiting):
                self.imported = True
            elif simple and not active:
                return simple[-1]
            else:
                with self.display.working("importing libraries"):
                    import_libraries(GENERATING)
                self.imported = True
        busy = {self.runs[index].generates for index in active} - {None} - self.made
        return next((index for index in waiting if self.runs[index].generates not in busy), waiting[0])

    def close(self, run: Run, finished: Finished) -> None:
        """A run has ended."""
        if finished.code and self.code:  # perhaps with the same message; one is enough
            return
        self.code = self.code or finished.code
        self.made.add(run.generates)
        self.display.end(run.name)
        show_messages(finished.messages, run.name, self.shown)


def show_messages(messages: str, name: str, shown: set[str]) -> None:
    """Print what a run wrote to stderr, its warnings with its name; a line that an earlier run wrote is left out."""
    for line in messages.splitlines():
        if line not in shown:
            shown.add(line)
            print(f"{line} ({name})" if line.startswith("warning: ") else line, file=sys.stderr, flush=True)
