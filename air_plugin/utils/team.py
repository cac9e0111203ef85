"""Workers that stay for several works: what they hold, and how each of them gets the next work once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from air_plugin.utils.spreading import Crew
from air_plugin.utils.units import Message, Task


@dataclass(frozen=True)
class Step:
    """A unit of one of several works.

    unit: of the work.
    task: the work, for a worker that does not hold it yet.
    """

    unit: Any
    task: Task | None = None


def do_step(held: dict[str, Any], step: Step) -> Any:
    """Do a unit. A worker holds one work and its state: the next one replaces them."""
    if step.task is not None:
        held.clear()  # first: two states may exceed the memory
        held["state"] = step.task.setup()
        held["work"] = step.task.work
    return held["work"](held["state"], step.unit)


class Lent:
    """A crew for one of its works: with its first unit, each worker gets the work itself.

    end: ends the crew; is called where this work has failed, and its workers may be in the middle of a unit.
    """

    copies: Callable[[], bool] | None = None

    def __init__(self, crew: Crew, task: Task, end: Callable[[], None]) -> None:
        self.crew, self.task, self.end = crew, task, end
        self.informed: set[int] = set()

    def hire(self, number: int) -> None:
        self.crew.hire(number)

    def begin(self, number: int, unit: Any) -> None:
        self.crew.begin(number, Step(unit, None if number in self.informed else self.task))
        self.informed.add(number)

    def messages(self, timeout: float) -> list[tuple[int, Message]]:
        return self.crew.messages(timeout)

    def dismiss(self, number: int) -> None:
        self.crew.dismiss(number)

    def close(self, *, now: bool) -> None:
        if now:
            self.end()
