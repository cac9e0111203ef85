"""Pseudo-labels by round."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from air_plugin.report.charts import Panel, line_chart
from air_plugin.report.collection import Method
from air_plugin.report.record import PseudoLabelMetrics
from air_plugin.report.sections.view import Points, View, as_markup, legend, titles


def pseudo_labels(view: View) -> dict[str, Any]:
    """By round as lines where a method has more than one round; of the last round as a table."""
    columns = ("selected", "coverage", "accuracy", "candidates", "candidate_recall")
    rows, several = [], []
    for method in view.methods:
        last = [run.pseudo_labels for run in view.runs(method) if run.pseudo_labels.selected]
        if not last:
            continue
        rounds = max(len(run.rounds) for run in view.runs(method))
        values = [_column(last, column) for column in columns]
        rows.append((method.title, max(rounds, 1), [view.spread(v) if v else None for v in values]))
        if rounds > 1:
            several.append(method)
    coloured = view.coloured(several)
    panels = []
    for column, title in (("accuracy", "correct pseudo-labels (%)"), ("selected", "images selected")):
        lines = [view.line(colour, _by_round(view, method, column)) for colour, method in coloured]
        if any(line.x for line in lines):
            panels.append(Panel("round", title, lines, whole=True))
    alt = f"Pseudo-labels of {view.dataset} by round, their accuracy in percent and number: {titles(coloured)}."
    chart = as_markup(line_chart(panels, alt=alt)) if panels else ""
    return {"chart": chart, "legend": legend(coloured), "rows": rows, "several": len(several)}


def _by_round(view: View, method: Method, column: str) -> Points:
    points: dict[float, list[float]] = defaultdict(list)
    for run in view.runs(method):
        for number, metrics in enumerate(run.rounds, start=1):
            points[number] += _column([metrics], column)
    return points


def _column(rounds: Iterable[PseudoLabelMetrics], name: str) -> list[float]:
    """One of the metrics, of those rounds that have it."""
    values = [getattr(metrics, name) for metrics in rounds]
    return [float(value) for value in values if value is not None]
