"""One run of a script, in this process or in a worker process."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any

import train
from air_plugin.utils.offline import go_offline, is_offline
from air_plugin.utils.progress import Event, handled_by
from scripts.compose import register_all, uses_generator

# What runs import; GENERATING: those that generate images.
LIBRARIES = ("dassl.engine", "open_clip", "torchvision.transforms", "sklearn.metrics", "torch.utils.tensorboard")
GENERATING = (
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "diffusers.schedulers.scheduling_ddpm",
    "peft",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
)
OFTEN = 0.5  # seconds between two events of one stage


@dataclass(frozen=True)
class Run:
    """One run: its name for people, its config, and the config's label."""

    name: str
    cfg: Any
    label: str

    @property
    def generates(self) -> tuple[Any, ...] | None:
        """What stands for the adapter and images that it makes or takes from the store; None where it needs none."""
        cfg = self.cfg
        if not uses_generator(cfg.TRAINER.NAME) or cfg.AIR.PROTOTYPES != "synthetic":
            return None
        return (cfg.AIR.GENERATOR, cfg.AIR.LORA.ENABLED, cfg.SEED if cfg.AIR.GENERATION_PER_SEED else 0)


@dataclass(frozen=True)
class Finished:
    """The end of a run: its exit code, and what it wrote to stderr."""

    code: int
    messages: str = ""


def work(run: Run, *, quiet: bool) -> Finished:
    """Do one run in this process; its messages are returned where it is quiet."""
    with isolated():
        if not quiet:
            return Finished(train.contained(lambda: train.run(run.cfg, run.label)))
        errors = io.StringIO()
        with (
            open(os.devnull, "w", encoding="utf-8", errors="backslashreplace") as nowhere,
            redirect_stdout(nowhere),
            redirect_stderr(errors),
        ):
            return Finished(train.contained(lambda: train.run(run.cfg, run.label)), errors.getvalue())


@contextmanager
def isolated() -> Iterator[None]:
    """Undo afterwards what a run changes in its process, so that the next one finds what it would find alone.

    Random states are left out: every run sets its own.
    """
    import torch

    environment, filters = dict(os.environ), warnings.filters[:]
    threads, kind = torch.get_num_threads(), torch.get_default_dtype()
    benchmark = torch.backends.cudnn.benchmark
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        warnings.filters[:] = filters  # type: ignore[index]
        torch.set_num_threads(threads)
        torch.set_default_dtype(kind)
        torch.backends.cudnn.benchmark = benchmark


# Processes


def import_libraries(names: Iterable[str]) -> None:
    """Import modules without the use of a GPU. What cannot be imported is left to the run that needs it."""
    if is_offline():
        go_offline()  # before any library asks the hub
    check = "PYTORCH_NVML_BASED_CUDA_CHECK"
    before = os.environ.get(check)
    os.environ[check] = "1"  # a library that asks for GPUs at its import does not begin to use them by that
    try:
        register_all("trainers")
        for name in names:
            with suppress(ImportError):
                import_module(name)
    finally:
        os.environ.pop(check)
        os.environ.update({} if before is None else {check: before})


def may_copy() -> bool:
    """Whether copies of this process work: on Linux, without other threads, and before CUDA is used.

    Counting GPUs uses CUDA, too, where torch cannot ask NVIDIA's management library (NVML) instead.
    """
    import torch

    if sys.platform != "linux" or threading.active_count() > 1 or torch.cuda.is_initialized():
        return False
    asks_nvml = getattr(torch.cuda, "_device_count_nvml", lambda: -1)() >= 0
    return asks_nvml or torch.cuda.device_count() == 0


class Worker:
    """A process that does runs, and this process's end of the pipe to it.

    is_copy: of this process, for one run; else it imports everything by itself and does several runs.
    """

    def __init__(self, *, is_copy: bool) -> None:
        self.is_copy = is_copy
        context: Any = multiprocessing.get_context("fork" if is_copy else "spawn")
        self.pipe, end = context.Pipe()
        self.process = context.Process(target=serve, args=(end,))
        self.process.start()
        end.close()  # the worker has the only one now, so its end is the pipe's
        self.run: Run | None = None

    def begin(self, run: Run) -> None:
        self.run = run
        with suppress(OSError):  # it was killed, which `messages` notices
            self.pipe.send(run)

    def messages(self) -> Iterator[Event | Finished | None]:
        """What has come from it; None where it was killed."""
        alive = self.process.is_alive()  # asked first: what it sent before its end is in the pipe
        try:
            while self.pipe.poll():
                yield self.pipe.recv()
        except (EOFError, OSError):
            alive = False
        if not alive:
            yield None

    def end(self) -> None:
        """Let it end after its run."""
        with suppress(OSError):
            self.pipe.send(None)
        self.pipe.close()
        self.process.join()


def serve(pipe: Connection) -> None:
    """A worker's life: runs come through the pipe, their progress and end go back."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the script ends it: it cleans up
    end_with_parent()
    while (run := pipe.recv()) is not None:
        reporter = Reporter(pipe.send)
        with handled_by(reporter):
            finished = work(run, quiet=True)
        with reporter.lock:  # not within an event of another thread
            pipe.send(finished)


def end_with_parent() -> None:
    """End at once when the script is killed: another may resume."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Reporter:
    """Sends a run's progress: every new stage, and of one stage an event now and then, with the last loss."""

    def __init__(self, send: Callable[[Event], None]) -> None:
        self.send, self.lock = send, threading.Lock()
        self.stage, self.sent = "", 0.0
        self.loss: float | None = None

    def __call__(self, event: Event) -> None:
        with self.lock, suppress(OSError):  # OSError: the script has ended
            new = event.stage != self.stage
            self.loss = event.loss if new or event.loss is not None else self.loss
            self.stage = event.stage
            if new or event.time - self.sent >= OFTEN:
                self.sent = event.time
                self.send(Event(event.stage, event.done, event.total, self.loss, event.time))
