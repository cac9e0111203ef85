"""Accuracy of each class."""

from __future__ import annotations

from collections import defaultdict
from math import nan
from typing import Any

import numpy as np

from air_plugin.report.charts import bar_chart
from air_plugin.report.sections.view import MANY_CLASSES, View, as_markup, legend, titles

DIFFERENT = 20  # classes in the chart where there are too many


def class_accuracies(view: View) -> dict[str, Any] | None:
    """Mean over seeds: a chart of the methods that charts have room for, a table of all."""
    methods, means = [], {}
    for method in view.methods:
        values: dict[str, list[float]] = defaultdict(list)
        for run in view.runs(method):
            for name, value in run.heads[run.primary].per_class.items():
                values[name].append(value)
        if values:
            methods.append(method)
            means[method.cell] = {name: float(np.mean(found)) for name, found in values.items()}
    if not methods:
        return None
    names = list(dict.fromkeys(name for found in means.values() for name in found))
    coloured = view.coloured([method for method in methods if method in view.shown] or methods)
    bars = np.array([[means[method.cell].get(name, nan) for name in names] for _, method in coloured])
    plotted = np.arange(len(names))
    if len(names) > MANY_CLASSES:
        plotted = np.argsort(-np.ptp(np.nan_to_num(bars), axis=0), kind="stable")[:DIFFERENT]
    alt = f"Accuracy of each class of {view.dataset} in percent: {titles(coloured)}. The numbers follow in a table."
    series = [(colour, row[plotted].tolist()) for (colour, _), row in zip(coloured, bars, strict=True)]
    return {
        "chart": as_markup(bar_chart([names[i] for i in plotted], series, y_label="accuracy (%)", alt=alt)),
        "legend": legend(coloured, bars=True),
        "methods": methods,
        "rows": [(name, [means[method.cell].get(name) for method in methods]) for name in names],
    }
