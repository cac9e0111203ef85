"""Work for tests of the engines: functions of a module, which workers import."""

from __future__ import annotations

import atexit
import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from air_plugin.engine import chosen
from air_plugin.utils.errors import UserError
from air_plugin.utils.progress import report


def set_up(folder: Path) -> dict[str, Any]:
    """Notes that a worker was set up; its state."""
    (folder / f"setup-{os.getpid()}").touch()
    return {"folder": folder, "base": 100}


def square(state: dict[str, Any], unit: int) -> tuple[int, int]:
    """(unit squared + 100, process)."""
    return unit**2 + state["base"], os.getpid()


def die_once(state: dict[str, Any], unit: int) -> tuple[int, int]:
    """As `square`; the first worker that does unit 2 is killed in the middle."""
    mark = state["folder"] / "died"
    if unit == 2 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return square(state, unit)


def die_always(state: dict[str, Any], unit: int) -> tuple[int, int]:
    """As `square`; unit 2 kills every worker."""
    if unit == 2:
        with open(state["folder"] / "deaths", "a") as file:
            file.write("x")
        os.kill(os.getpid(), signal.SIGKILL)
    return square(state, unit)


def refuse(state: dict[str, Any], unit: int) -> int:
    """Raises a UserError at unit 1."""
    if unit == 1:
        raise UserError("AIR.LAMBDA is 2; it must be at most 1")
    return unit


class Odd(Exception):
    """An error that cannot be made again from its pickle."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__("odd")


def raise_odd(state: dict[str, Any], unit: int) -> int:
    raise Odd(1, 2)


def describe_process(state: dict[str, Any], unit: int) -> dict[str, Any]:
    """What a worker finds in its process."""
    with_others = [result for _, result in chosen().map(partial(int, 0), os_pid, [0, 0], workers=2)]
    return {
        "threads": torch.get_num_threads(),
        "offline": os.environ.get("AIR_OFFLINE"),
        "cards": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "alone": set(with_others) == {os.getpid()},
    }


def os_pid(state: int, unit: int) -> int:
    return os.getpid()


def report_and_wait(state: dict[str, Any], unit: int) -> int:
    """Reports, and ends when the driver has seen it."""
    report("lora", unit, 10)
    wait_for(state["folder"] / f"seen-{unit}")
    return unit


def sleep_long(state: dict[str, Any], unit: int) -> int:
    (state["folder"] / f"began-{unit}").write_text(str(os.getpid()))
    time.sleep(600)
    return unit


def wait_for(path: Path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > end:
            raise TimeoutError(path)
        time.sleep(0.01)


def sleep_unless_first(state: dict[str, Any], unit: int) -> int:
    return sleep_long(state, unit) if unit else unit


def kill_me() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def generate_and_die_once(place: Any, portion: Any) -> list[tuple[str, int, str]]:
    """A batch of images; the first worker is killed when its files are written, before anybody knows."""
    from air_plugin.diffusion.spread import generate_portion

    written = generate_portion(place, portion)
    mark = place.recipe.folder.parent / "died"
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return written


def encode_and_die_once(place: Any, chunk: Any) -> list[str]:
    """A chunk of features; the first worker is killed when its file is written, before anybody knows."""
    from air_plugin.clip.spread import encode_chunk

    with open(chunk.file.parents[1] / "encoded", "a") as file:
        file.write(f"{chunk.start} {chunk.file.exists()}\n")
    errors = encode_chunk(place, chunk)
    mark = chunk.file.parents[1] / "died"
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return errors


def clean_up_slowly(state: dict[str, Any], unit: int) -> None:
    """Its process takes a second for its end; then it leaves a file."""
    atexit.register(_leave_file, state["folder"] / "cleaned")
    (state["folder"] / "began").touch()
    time.sleep(600)


def _leave_file(path: Path) -> None:
    time.sleep(1)
    path.touch()
