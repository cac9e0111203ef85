"""Runs of a script, one after another or side by side.

Side by side, each run is a process of its own. On Linux it is a copy (fork) of this process, which has imported the
libraries before: they are imported once, and every run begins with the same state. Elsewhere, and where this process
has threads or has used CUDA, which a copy could not use, a few processes (spawn) do one run after another.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from typing import Any

from air_plugin.utils.errors import UserError
from air_plugin.utils.progress import Event
from scripts.compose import uses_generator
from scripts.worker import GENERATING, LIBRARIES, Finished, Run, Worker, import_libraries, may_copy, work

STATUS = 30.0  # seconds between two lines of a run's progress


def run_all(runs: list[Run], *, at_once: int) -> int:
    """Do the runs; returns the exit code of the first one that failed, else 0.

    Raises:
        UserError: a run was killed; the others have been done all the same.
    """
    if at_once > 1:
        print(f"{len(runs)} runs, {at_once} at a time; each writes its log.txt", flush=True)
        return SideBySide(runs, at_once).run()
    for run in runs:
        print(f"== {run.name}", flush=True)
        code = work(run, quiet=False).code
        if code:
            return code
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

    def __init__(self, runs: Sequence[Run], at_once: int) -> None:
        self.waiting = sorted(runs, key=lambda run: run.generates is None)
        self.at_once, self.total = at_once, len(runs)
        self.active: list[Worker] = []
        self.idle: list[Worker] = []
        self.made: set[Any] = set()  # what the runs that have ended have generated
        self.shown: set[str] = set()  # lines of earlier runs
        self.status = Status()
        self.code, self.killed, self.ended = 0, False, 0

    def run(self) -> int:
        """Do all runs, or those that go on when one fails; returns the exit code of the first one that failed, else 0.

        Raises:
            UserError: a run was killed.
        """
        try:
            self.import_libraries()
            while self.active or (self.waiting and not self.code):
                while self.waiting and not self.code and len(self.active) < self.at_once:
                    self.begin(self.next())
                wait([worker.pipe for worker in self.active], timeout=1)
                for worker in list(self.active):
                    for message in worker.messages():
                        self.take(worker, message)
                self.status.show([worker.run.name for worker in self.active if worker.run])
        except BaseException:
            for worker in (*self.active, *self.idle):
                worker.process.terminate()
            raise
        finally:
            for worker in (*self.active, *self.idle):
                worker.end()
        if self.killed and not self.code:
            raise UserError("a run was killed, perhaps for want of memory; run again with JOBS=1")
        return self.code

    def import_libraries(self) -> None:
        """Import what the copies need. While this process imports what generates images, a run without that goes on."""
        if sys.platform != "linux":
            return
        import_libraries(LIBRARIES)
        simple = [run for run in self.waiting if not uses_generator(run.cfg.TRAINER.NAME)]
        if len(simple) == len(self.waiting):
            return
        if simple and may_copy():
            self.begin(simple[-1])
        import_libraries(GENERATING)

    def next(self) -> Run:
        """The next run: not one that would wait for what another one generates, if there is another."""
        busy = {worker.run.generates for worker in self.active if worker.run} - {None} - self.made
        return next((run for run in self.waiting if run.generates not in busy), self.waiting[0])

    def begin(self, run: Run) -> None:
        self.waiting.remove(run)
        worker = self.idle.pop() if self.idle else self.new_worker()
        self.active.append(worker)
        worker.begin(run)

    @staticmethod
    def new_worker() -> Worker:
        """It inherits that Ctrl-C is blocked: this process ends it, and it alone writes a message."""
        if not hasattr(signal, "pthread_sigmask"):  # Windows
            return Worker(is_copy=False)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return Worker(is_copy=may_copy())
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def take(self, worker: Worker, message: Event | Finished | None) -> None:
        """What a worker has sent; None: it was killed."""
        run = worker.run
        if run is None:  # it has ended, as it should
            return
        if isinstance(message, Event):
            self.status.update(run.name, message)
            return
        worker.run = None
        self.active.remove(worker)
        self.ended += 1
        if message is None or worker.is_copy:
            worker.end()
        else:
            self.idle.append(worker)
        self.close(run, message)

    def close(self, run: Run, finished: Finished | None) -> None:
        """A run has ended."""
        if finished is None:
            self.killed = True
            print(f"== {run.name}: killed ({self.ended} of {self.total})", flush=True)
            return
        if finished.code and self.code:  # perhaps with the same message; one is enough
            return
        self.code = self.code or finished.code
        self.made.add(run.generates)
        print(f"== {run.name} ({self.ended} of {self.total})", flush=True)
        show_messages(finished.messages, run.name, self.shown)


def show_messages(messages: str, name: str, shown: set[str]) -> None:
    """Print what a run wrote to stderr, its warnings with its name; a line that an earlier run wrote is left out."""
    for line in messages.splitlines():
        if line not in shown:
            shown.add(line)
            print(f"{line} ({name})" if line.startswith("warning: ") else line, file=sys.stderr, flush=True)


class Status:
    """The last event of every run; now and then, a line for each run that goes on."""

    def __init__(self) -> None:
        self.last: dict[str, Event] = {}
        self.begun: dict[str, float] = {}  # when a run's stage began
        self.due = time.monotonic() + STATUS

    def update(self, name: str, event: Event) -> None:
        if name not in self.last or self.last[name].stage != event.stage:
            self.begun[name] = event.time
        self.last[name] = event

    def show(self, names: Sequence[str]) -> None:
        if time.monotonic() < self.due:
            return
        self.due = time.monotonic() + STATUS
        for name in names:
            if name in self.last:
                print(f"-- {name}: {describe(self.last[name])}, {time.time() - self.begun[name]:.0f} s", flush=True)


def describe(event: Event) -> str:
    """A stage in words.

    Example:
        >>> describe(Event("lora", 120, 300, loss=0.5))
        'lora 120 of 300 (40 %), loss 0.5000'
    """
    share = f" {event.done:,} of {event.total:,} ({100 * event.done / event.total:.0f} %)" if event.total else ""
    return event.stage + share + ("" if event.loss is None else f", loss {event.loss:.4f}")
