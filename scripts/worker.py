"""One run of a script, in this process or in a worker process."""

from __future__ import annotations

import io
import os
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import train
from air_plugin.utils.offline import go_offline, is_offline
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


def work(run: Run) -> Finished:
    """Do one run in this process; what it prints stands in its log.txt, its messages are returned."""
    errors = io.StringIO()
    with (
        isolated(),
        open(os.devnull, "w", encoding="utf-8", errors="backslashreplace") as nowhere,
        redirect_stdout(nowhere),
        redirect_stderr(errors),
    ):
        return Finished(train.contained(lambda: train.run(run.cfg, run.label)), errors.getvalue())


def set_up() -> None:
    """Import what every run needs; the work of a worker before its first run."""
    import_libraries(LIBRARIES)


def work_on(state: None, run: Run) -> Finished:
    """One run in a worker."""
    return work(run)


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
