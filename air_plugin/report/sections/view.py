"""What the parts of a data set's section share: its methods, their colours and error bars."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from air_plugin.report.charts import COLOURS, GLYPHS, Line
from air_plugin.report.collection import Method
from air_plugin.report.record import RunResult

MANY_CLASSES = 40  # above: a chart of the classes that differ most, and pairs instead of matrices
Points = Mapping[float, Sequence[float]]  # x -> values over seeds


@dataclass
class View:
    """What every part of a data set's section uses.

    methods: those with a run on the data set, in the table's order.
    baseline: the method that others are compared with.
    spread: values over seeds -> their mean, and half of the error bar; None for one seed.
    faults: takes a line for everything that could not be shown.
    metric: name of the score that runs are compared by.
    """

    dataset: str
    methods: list[Method]
    baseline: Method | None
    spread: Callable[[Sequence[float]], tuple[float, float | None]]
    faults: list[str]
    metric: str = "accuracy"

    @cached_property
    def shown(self) -> list[Method]:
        """What charts have room for, in the table's order: the baseline, zero-shot CLIP and the last methods."""
        first = [*self._references(), *reversed(self.methods)]
        kept = list(dict.fromkeys(method.cell for method in first))[:COLOURS]
        return [method for method in self.methods if method.cell in kept]

    def _references(self) -> list[Method]:
        baseline = [m for m in self.methods if self.baseline and m.cell == self.baseline.cell]
        return baseline + [m for m in self.methods if m.trainer == "ZeroshotCLIP"][:1]

    def coloured(self, methods: Sequence[Method]) -> list[tuple[int, Method]]:
        """At most six of these methods with their colours: the same one in every chart for those that are shown."""
        grey = [method.cell for method in self._references()[:1]]
        others = [method.cell for method in self.shown if method.cell not in grey]
        fixed = dict(zip(grey + others, range(0 if grey else 1, COLOURS), strict=False))
        cells = sorted([method.cell for method in methods], key=lambda key: key not in fixed)[
            :COLOURS
        ]  # stable: the shown ones first
        free = [n for n in (*range(1, COLOURS), 0) if n not in [fixed.get(key) for key in cells]]
        colours = {key: fixed[key] if key in fixed else free.pop(0) for key in cells}
        return [(colours[method.cell], method) for method in methods if method.cell in colours]

    def runs(self, method: Method) -> list[RunResult]:
        """Results by rising seed."""
        return method.on(self.dataset)

    def line(self, colour: int, points: Points) -> Line:
        """The means over seeds, with their spreads."""
        rising = sorted((x, self.spread(values)) for x, values in points.items() if values)
        return Line(colour, [x for x, _ in rising], [m for _, (m, _) in rising], [s or 0.0 for _, (_, s) in rising])


def legend(coloured: Iterable[tuple[int, Method]], *, bars: bool = False) -> list[tuple[int, str, str]]:
    """Colour, mark and title of each series."""
    return [(colour, GLYPHS[1 if bars else colour], method.title) for colour, method in coloured]


def titles(coloured: Iterable[tuple[int, Method]]) -> str:
    return ", ".join(method.title for _, method in coloured)


def as_markup(chart: str) -> Any:
    """A chart of ours, in which all text is escaped, for a template that escapes."""
    from markupsafe import Markup

    return Markup(chart)
