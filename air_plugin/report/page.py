"""A collection of results as one HTML file that needs nothing else: tables, charts, pictures."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Any

from air_plugin.report.comparison import Comparison
from air_plugin.report.record import USUAL_PARADIGM
from air_plugin.report.sections import sections
from air_plugin.report.sections.classes import DIFFERENT
from air_plugin.report.sections.pictures import MISTAKES
from air_plugin.report.sections.view import MANY_CLASSES, View
from air_plugin.report.statistics import is_unknown
from air_plugin.report.tables import (
    FUSION_NOTES,
    GROUPS_NOTE,
    TIME_NOTES,
    fusion_table,
    mean_column,
    score_columns,
    shown_scores,
    time_table,
)
from air_plugin.utils.files import write_atomically


def write_page(shown: Comparison, target: Path) -> Path:
    """Write the page; returns `target`.

    Args:
        shown: the results with their statistics.
        target: the HTML file; its folder is made.
    """
    from jinja2 import Environment, StrictUndefined

    collection, baseline = shown.collection, shown.baseline
    faults = [*collection.faults, *shown.faults]
    views = [
        View(
            name,
            [m for m in collection.methods if name in m.runs],
            baseline,
            shown.spread,
            faults,
            metric="H" if shown.has_groups else "accuracy",
        )
        for name in collection.datasets
    ]
    parts = [
        {**sections(view), "fusion": fusion_table(shown, view.dataset), "seconds": time_table(shown, view.dataset)}
        for view in views
    ]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": _number, "breakable": _breakable, "typeset": _typeset}
    template = environment.from_string(resources.files("air_plugin.report").joinpath("page.html.j2").read_text("utf-8"))
    text = template.render(
        collection=collection,
        baseline=baseline,
        ci95=shown.ci95,
        table=_table(shown),
        parts=parts,
        faults=list(dict.fromkeys(faults)),
        most_classes=MANY_CLASSES,
        most_different=DIFFERENT,
        most_mistakes=MISTAKES,
        paradigm="" if collection.paradigm == USUAL_PARADIGM else collection.paradigm,
        groups_note=GROUPS_NOTE if shown.has_groups else "",
        fusion_notes=FUSION_NOTES,
        time_notes=TIME_NOTES,
    )
    write_atomically(target, text.encode("utf-8", "replace"))
    return target


def _number(value: tuple[float, float | None] | None, digits: int = 1) -> str:
    """Mean and spread as text, kept on one line; nothing for None."""
    if value is None:
        return ""
    mean, spread = value
    return f"{mean:.{digits}f}" if spread is None else f"{mean:.{digits}f}\u00a0\u00b1\u00a0{spread:.{digits}f}"


def _typeset(text: str) -> str:
    """A cell of a text table as the page writes it."""
    return text.replace("+-", "\u00b1").replace(" ", "\u00a0")


def _breakable(name: str) -> Any:
    """A config's name, which has no spaces, with places where a line may end."""
    from markupsafe import Markup

    return Markup("<wbr>").join(re.split(r"(?<=[+._=])", name))


def _table(shown: Comparison) -> dict[str, Any]:
    """The main table: the scores of each data set, and their mean where there is more than one.

    differences: by column, the place of the data set whose difference to the baseline follows it; else None.
    """
    datasets = shown.collection.datasets
    columns = score_columns(shown)
    each = len(columns) // len(datasets)
    differences = [place // each if place % each == each - 1 else None for place in range(len(columns))]
    rows: list[dict[str, Any]] = []
    for method in shown.collection.methods:
        values = [v for dataset in datasets for _, v in shown_scores(shown, method, dataset)]
        cells = [shown.spread(v) if v else None for v in values]
        unknown = [is_unknown(method, dataset) for dataset in datasets for _ in range(each)]
        if len(datasets) > 1:
            mean = shown.mean(method)
            cells.append(None if mean is None else (mean, None))
        counts = [str(len(method.runs.get(dataset, {}))) for dataset in datasets]
        rows.append(
            {
                "method": method,
                "cells": cells,
                "is_baseline": shown.baseline is not None and method.cell == shown.baseline.cell,
                "unknown": [*unknown, False],  # the mean has no mark
                "seeds": counts[0] if len(set(counts)) == 1 else "/".join(counts),
                "differences": [shown.difference(method, dataset) for dataset in datasets],
            }
        )
    if len(datasets) > 1:
        columns, differences = [*columns, mean_column(shown)], [*differences, None]
    best = [
        max((round(row["cells"][column][0], 1) for row in rows if row["cells"][column]), default=None)
        for column in range(len(columns))
    ]
    return {"columns": columns, "differences": differences, "rows": rows, "best": best}
