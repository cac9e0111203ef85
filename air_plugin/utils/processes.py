"""Workers that are processes of this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

from air_plugin.utils.errors import UserError
from air_plugin.utils.units import Bench, Died, Message, Task, end_with_parent, pack, unpack


class ProcessWorker:
    """A process that does units, and this process's end of the pipe to it."""

    def __init__(self, context: Any, task: Task, environment: dict[str, str]) -> None:
        self.pipe, end = context.Pipe()
        self.process = context.Process(target=serve, args=(end, task, environment))
        self.process.start()
        end.close()  # the worker has the only one now, so its end is the pipe's

    def begin(self, unit: Any) -> None:
        with suppress(OSError):  # it was killed, which `messages` notices
            self.pipe.send_bytes(pack([unit]))

    def messages(self) -> list[Message]:
        """What has come from it."""
        alive = self.process.is_alive()  # asked first: what it sent before its end is in the pipe
        received: list[Message] = []
        try:
            while self.pipe.poll():
                received.append(unpack(self.pipe.recv_bytes()))
        except (EOFError, OSError):
            alive = False
        if not alive:
            self.process.join(10)
            code = self.process.exitcode
            killed = code is not None and code < 0
            received.append(Died(f"was killed by signal {-code}" if killed else f"ended with exit code {code}"))
        return received

    def end(self, *, now: bool) -> None:
        """Let it end; now: also where it works on a unit."""
        if now:
            self.process.terminate()
        with suppress(OSError):
            self.pipe.send_bytes(pack([]))
        self.pipe.close()
        self.process.join()


class Processes:
    """Starts workers and waits for their messages.

    copies: asked before each start whether the worker may be a copy of this process (fork); else it is a new process.
        None, or if it may not from the beginning: new processes (spawn), each of which does one unit after another.
    gpus: of a worker; the machine's cards are handed out in turn. 0: every worker sees all of them.
    """

    method = "spawn"

    def __init__(self, task: Task, *, copies: Callable[[], bool] | None = None, gpus: float = 0.0) -> None:
        self.task, self.gpus = task, gpus
        self.copies = copies if copies is not None and copies() else None
        self.workers: dict[int, ProcessWorker] = {}
        self.slots: dict[int, int] = {}
        self.cards = visible_cards() if gpus else []
        if len(self.cards) < gpus:
            raise UserError(f"{gpus:g} GPUs are asked for each worker, and this machine has {len(self.cards)}")

    def hire(self, number: int) -> None:
        """Start a worker; it inherits that Ctrl-C is blocked: this process ends it, and it alone writes a message."""
        slot = min(set(range(len(self.slots) + 1)) - {*self.slots.values()})
        self.slots[number] = slot
        environment = {"CUDA_VISIBLE_DEVICES": self._cards_of(slot)} if self.gpus else {}
        context = multiprocessing.get_context("fork" if self.copies and self.copies() else self.method)
        if not hasattr(signal, "pthread_sigmask"):  # Windows
            self.workers[number] = ProcessWorker(context, self.task, environment)
            return
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.workers[number] = ProcessWorker(context, self.task, environment)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _cards_of(self, slot: int) -> str:
        """The cards of a worker: several whole ones, or a part of one."""
        if self.gpus < 1:
            return self.cards[int(slot * self.gpus) % len(self.cards)]
        first = slot * int(self.gpus)
        return ",".join(self.cards[(first + offset) % len(self.cards)] for offset in range(int(self.gpus)))

    def begin(self, number: int, unit: Any) -> None:
        self.workers[number].begin(unit)

    def messages(self, timeout: float) -> list[tuple[int, Message]]:
        """Messages with the numbers of their workers, as soon as there are any."""
        wait([worker.pipe for worker in self.workers.values()], timeout)
        return [(number, message) for number, worker in self.workers.items() for message in worker.messages()]

    def dismiss(self, number: int) -> None:
        """End a worker that has nothing to do, or has died."""
        if number in self.workers:
            del self.slots[number]
            self.workers.pop(number).end(now=False)

    def close(self, *, now: bool) -> None:
        for worker in self.workers.values():
            if now:
                worker.process.terminate()  # all of them, before any is waited for
        for worker in self.workers.values():
            worker.end(now=now)
        self.workers = {}


def visible_cards() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [card for card in named.split(",") if card]
    return [str(card) for card in range(torch.cuda.device_count())]


def leave(number: int, frame: Any) -> None:
    """The driver ends this process: it cleans up, and is not interrupted in that."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(1)


def serve(pipe: Connection, task: Task, environment: dict[str, str]) -> None:
    """A worker's life: units come through the pipe, their progress and results go back."""
    signal.signal(signal.SIGTERM, leave)
    os.environ.update(environment)
    end_with_parent()
    bench = Bench(task, lambda event: pipe.send_bytes(pack(event)))
    with suppress(EOFError, BrokenPipeError):  # the driver has ended
        pipe.send_bytes(bench.set_up())
        while units := unpack(pipe.recv_bytes()):
            pipe.send_bytes(bench.do(units[0]))
