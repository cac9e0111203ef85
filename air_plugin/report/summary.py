"""What a script prints at its end: one short table, and where the page and the results are."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from air_plugin.report.collection import Collection, collect, named_rows, natural
from air_plugin.report.comparison import Comparison
from air_plugin.report.formats import as_short_github, place_galleries, write_page_of
from air_plugin.report.results import read_results
from air_plugin.report.titles import Cell
from air_plugin.utils.errors import UserError
from air_plugin.utils.plotting import optional_picture

log = logging.getLogger(__name__)


def summarize_results(
    output: Path,
    dataset: str,
    rows: Mapping[Cell, str],
    *,
    page: Path,
    baseline: Cell | None = None,
    others: bool = False,
) -> str:
    """Write the page of some rows; returns their short table and two lines: the page and the folder of results.

    Everything else is on the page and in `air report --details`. Whatever is left out or incomplete is logged.

    Args:
        output: the scripts' OUTPUT.
        dataset: a data set's folder in it.
        rows: (trainer, config) -> title, empty where it has none of its own.
        page: its file.
        baseline: a row that the others are compared with, if it has a result.
        others: show the results of earlier commands, too, where they are no rows of an experiment and can be compared;
            titles then show what tells all of these apart.

    Raises:
        UserError: nothing to report, or results that cannot be compared.
    """
    folder = output / dataset
    collection = _with_others(folder, rows) if others else collect(folder, rows=rows)
    found = [method for method in collection.methods if method.cell == baseline]
    view = Comparison(collection, found[0] if found else None)
    for fault in [*collection.faults, *view.faults]:
        log.warning("%s", fault)
    place_galleries(collection, output)
    lines = [as_short_github(view)]
    with optional_picture(page):  # a table is worth more than its page
        write_page_of(view, page)
        lines.append(f"page: {page}\n")
    return "".join([*lines, f"results: {folder}\n"])


def _with_others(folder: Path, rows: Mapping[Cell, str]) -> Collection:
    """Some rows, and those of earlier commands where they can be compared; titled rows of experiments are left out."""
    results, _ = read_results(folder)
    titled, _ = named_rows(results)
    every = rows.keys() | {result.row for result in results} - titled.keys()
    try:
        return collect(folder, rows={cell: rows.get(cell, "") for cell in sorted(every, key=natural)}, named=False)
    except UserError:  # other backbones, split families, templates or data
        return collect(folder, rows=rows, named=False)
