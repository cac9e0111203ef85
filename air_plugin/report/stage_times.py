"""Seconds of each stage, as means over seeds."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from statistics import mean

from air_plugin.report.collection import Method
from air_plugin.report.record import RunResult

TRAINING, TESTS = "prompt training", ("features of test", "features of val")
# Stages in a table's order; stages of other trainers follow them.
STAGES = (
    "backbone",
    "features of train",
    "generator",
    "lora",
    "generation",
    "prototypes",
    "refinement",
    TRAINING,
    *TESTS,
)


def stage_seconds(method: Method, dataset: str) -> dict[str, list[float | None]]:
    """Stage -> seconds of its first round, its second, ...; means over seeds.

    A stage that came from the store does not count; None where it did so for every seed. A seed that needed no such
    round counts as 0 seconds.
    """
    runs = [_seconds_of(run) for run in method.on(dataset)]
    found: dict[str, list[float | None]] = {}
    for name in dict.fromkeys(name for run in runs for name, _ in run):
        rounds = max(number for run in runs for other, number in run if other == name)
        first = [run[name, 1] for run in runs if (name, 1) in run]
        later = [[run.get((name, number), 0.0) for run in runs] for number in range(2, rounds + 1)]
        found[name] = [_mean_measured(values) for values in [first, *later]]
    return found


def _seconds_of(run: RunResult) -> dict[tuple[str, int], float | None]:
    """(stage, number of its round) -> seconds; None where all of it came from the store."""
    parts: dict[tuple[str, int], list[float]] = defaultdict(list)
    tested = 0.0
    for stage in run.stages:
        later = re.fullmatch(r"(.+), round ([2-9]|[1-9][0-9])", stage.name)
        name, number = (later[1], int(later[2])) if later else (stage.name, 1)
        seconds = stage.seconds
        if name in TESTS:
            tested += seconds
        if name == TRAINING:  # Dassl tests at the end of training: that stage lies within this one
            seconds = max(0.0, seconds - tested)
        parts[name, number] += [] if stage.cached else [seconds]
    return {key: sum(values) if values else None for key, values in parts.items()}


def _mean_measured(values: Sequence[float | None]) -> float | None:
    measured = [value for value in values if value is not None]
    return mean(measured) if measured else None
