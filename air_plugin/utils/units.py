"""Units of work in a worker: what a worker of an engine holds, does and sends (air_plugin/engine.py)."""

from __future__ import annotations

import os
import pickle
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from air_plugin.utils.progress import Event, handled_by

OFTEN = 0.5  # seconds between two events of one stage
_inside = False  # whether this process is a worker


@dataclass(frozen=True)
class Task:
    """What a worker does: `setup()` once, which returns its state, then `work(state, unit)` for each of its units.

    threads: torch's number of threads, which results depend on by rounding: that of the driver's process.
    """

    setup: Callable[[], Any]
    work: Callable[[Any, Any], Any]
    threads: int = field(default_factory=torch.get_num_threads)


@dataclass(frozen=True)
class Ready:
    """A worker waits for its next unit."""


@dataclass(frozen=True)
class Done:
    """The result of a unit."""

    result: Any


@dataclass(frozen=True)
class Failed:
    """An error that setup or work raised, and its traceback as text."""

    error: BaseException
    traceback: str


@dataclass(frozen=True)
class Died:
    """A worker ended without a result; how, in words."""

    how: str


Message = Ready | Done | Failed | Died | Event


def is_worker() -> bool:
    """Whether this process is a worker of an engine: it does not spread its own work any further."""
    return _inside


class Bench:
    """A worker's place: holds the state that its units share.

    send: takes events of progress; None where nobody wants them.
    """

    def __init__(self, task: Task, send: Callable[[Event], None] | None) -> None:
        global _inside
        _inside = True
        self.task, self.send = task, send
        self.state: Any = None

    def set_up(self) -> bytes:
        """Make the state; returns a pickled message."""
        try:
            if torch.get_num_threads() != self.task.threads:
                torch.set_num_threads(self.task.threads)
            self.state = self.task.setup()
        except Exception as error:
            return pack_error(error)
        return pack(Ready())

    def do(self, unit: Any) -> bytes:
        """Do a unit; returns a pickled message."""
        try:
            if self.send is None:
                return pack(Done(self.task.work(self.state, unit)))
            reporter = Reporter(self.send)
            with handled_by(reporter):
                result = self.task.work(self.state, unit)
            with reporter.lock:  # not within an event of another thread
                return pack(Done(result))
        except Exception as error:
            return pack_error(error)


def pack(value: Any) -> bytes:
    """A message or unit as bytes; tensors by value: /dev/shm may be small, and other machines have their own."""
    return pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)


def unpack(data: bytes) -> Any:
    """What was packed."""
    return pickle.loads(data)


def pack_error(error: Exception) -> bytes:
    """An error as a message; one that cannot be pickled becomes a RuntimeError with its text."""
    text = traceback.format_exc()
    with suppress(Exception):
        data = pack(Failed(error, text))
        unpack(data)  # some errors can be pickled, but not be made again
        return data
    return pack(Failed(RuntimeError(" ".join(f"{type(error).__name__}: {error}".split())), text))


class Reporter:
    """Sends a unit's progress: every new stage, and of one stage an event now and then, with the last loss."""

    def __init__(self, send: Callable[[Event], None]) -> None:
        self.send, self.lock = send, threading.Lock()
        self.stage, self.sent = "", 0.0
        self.loss: float | None = None

    def __call__(self, event: Event) -> None:
        with self.lock, suppress(OSError):  # OSError: the driver has ended
            new = event.stage != self.stage
            self.loss = event.loss if new or event.loss is not None else self.loss
            self.stage = event.stage
            if new or event.time - self.sent >= OFTEN:
                self.sent = event.time
                self.send(Event(event.stage, event.done, event.total, self.loss, event.time))


def end_with_parent() -> None:
    """End this process at once when the one that started it is killed: another may resume."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
