"""A collection of results as one HTML file that needs nothing else: tables, charts, pictures."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from air_plugin.images import write_atomically
from air_plugin.page_sections import CLASSES, DIFFERENT, MISTAKES, View, cell, sections
from air_plugin.results import Collection, Method, accuracies, interval, is_unknown, paired_difference, summary

Spread = Callable[[Sequence[float]], tuple[float, float | None]]


def write_page(collection: Collection, target: Path, *, baseline: Method | None = None, ci95: bool = False) -> Path:
    """Write the page; returns `target`.

    Args:
        collection: what to show.
        target: the HTML file; its folder is made.
        baseline: a method that the others are compared with, image by image.
        ci95: figures are mean +- half of the 95 % interval over seeds, instead of +- standard deviation.
    """
    from jinja2 import Environment, StrictUndefined

    def spread(values: Sequence[float]) -> tuple[float, float | None]:
        mean, deviation = summary(values)
        return mean, interval(values) if ci95 else deviation

    faults = list(collection.faults)
    table = _table(collection, baseline, spread, faults)
    views = [View(name, [m for m in collection.methods if name in m.runs], baseline, spread, faults)
             for name in collection.datasets]  # fmt: skip
    parts = [sections(view) for view in views]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"figure": _figure, "breakable": _breakable}
    template = environment.from_string(resources.files("air_plugin").joinpath("page.html.j2").read_text("utf-8"))
    text = template.render(
        collection=collection, baseline=baseline, ci95=ci95, table=table, parts=parts,
        faults=list(dict.fromkeys(faults)), most_classes=CLASSES, most_different=DIFFERENT,
        most_mistakes=MISTAKES,
    )  # fmt: skip
    write_atomically(target, text.encode("utf-8", "replace"))
    return target


def _figure(value: tuple[float, float | None] | None, digits: int = 1) -> str:
    """Mean and spread as text, kept on one line; nothing for None."""
    if value is None:
        return ""
    mean, spread = value
    return f"{mean:.{digits}f}" if spread is None else f"{mean:.{digits}f}\u00a0\u00b1\u00a0{spread:.{digits}f}"


def _breakable(name: str) -> Any:
    """A config's name, which has no spaces, with places where a line may end."""
    from markupsafe import Markup

    return Markup("<wbr>").join(re.split(r"(?<=[+._=])", name))


def _table(collection: Collection, baseline: Method | None, spread: Spread, faults: list[str]) -> dict[str, Any]:
    """The main table: a cell a data set, and their mean where there is more than one."""
    datasets = collection.datasets
    rows: list[dict[str, Any]] = []
    for method in collection.methods:
        values = [accuracies(method, dataset) for dataset in datasets]
        cells = [spread(v) if v else None for v in values]
        if len(datasets) > 1:
            cells.append((float(np.mean([np.mean(v) for v in values])), None) if all(values) else None)
        counts = [str(len(method.runs.get(dataset, {}))) for dataset in datasets]
        is_baseline = baseline is not None and cell(method) == cell(baseline)
        rows.append({
            "method": method, "cells": cells, "is_baseline": is_baseline,
            "unknown": [*(is_unknown(method, dataset) for dataset in datasets), False],  # the mean has no mark
            "seeds": counts[0] if len(set(counts)) == 1 else "/".join(counts),
            "differences": [
                paired_difference(method, baseline, dataset, reasons=faults)
                if baseline is not None and not is_baseline and dataset in method.runs else None for dataset in datasets
            ],
        })  # fmt: skip
    columns = [*datasets, *(["mean"] if len(datasets) > 1 else [])]
    best = [
        max((round(row["cells"][column][0], 1) for row in rows if row["cells"][column]), default=None)
        for column in range(len(columns))
    ]
    return {"columns": columns, "rows": rows, "best": best}
