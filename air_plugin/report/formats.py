"""A folder of results as a report: tables for GitHub and the terminal, LaTeX and CSV, and the HTML page."""

from __future__ import annotations

import csv
import io
import logging
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

from air_plugin.report.collection import Cell, Collection, Method, collect
from air_plugin.report.comparison import Comparison
from air_plugin.report.statistics import is_unknown, scores
from air_plugin.report.tables import (
    label_accuracies,
    mean_column,
    notes,
    primary,
    short_table,
    shown_scores,
    stage_names,
    tables,
    unknown_note,
)
from air_plugin.report.titles import plain_title
from air_plugin.utils.errors import UserError, unknown
from air_plugin.utils.extras import require_extra
from air_plugin.utils.files import csv_text, write_atomically
from air_plugin.utils.plotting import optional_picture

LOG = logging.getLogger(__name__)
Form = Literal["github", "latex", "csv", "html"]


def report(
    output: Path,
    *,
    only: str | None = None,
    rows: Mapping[Cell, str] | None = None,
    datasets: Sequence[str] = (),
    methods: Sequence[str] = (),
    backbone: str | None = None,
    split_family: str | None = None,
    paradigm: str | None = None,
    baseline: str | None = None,
    form: Form = "github",
    out: Path | None = None,
    ci95: bool = False,
    details: bool = True,
    page: Path | None = None,
) -> str:
    """The tables of a folder of results, or its page. Whatever is left out or incomplete is logged as a warning.

    The page goes to report.html in `output`, or to `out`; the form github without `out` copies the galleries, too.

    Args:
        output: the scripts' OUTPUT.
        only: a data set's folder in it; None is all.
        rows, datasets, methods, backbone, split_family, paradigm: what to show; see `collect` in collection.py.
        baseline: title of a row, or its trainer and config ("AiR (mini)"); the others are compared with it, and it is
            shown even where `methods` leaves it out.
        form, out: of the table; a file to write it to, whole or not at all.
        ci95: give half of the 95 % interval over seeds instead of the standard deviation.
        details: every head, the pseudo-labels and every seed, too; the page has them anyway.
        page: a file for the page, beside a table in another form; results are read and statistics computed once.

    Returns:
        The text for the terminal: tables that went to no file, and a line for each page and gallery that was written.

    Raises:
        UserError: nothing to report, results that cannot be compared, an unknown name, a file that cannot be written.
    """
    require_extra("report", purpose="air report")
    shown = [*methods, *([baseline] if methods and baseline and baseline not in methods else [])]
    folder = output / only if only else output
    collection = collect(
        folder,
        datasets=datasets,
        methods=shown,
        backbone=backbone,
        split_family=split_family,
        paradigm=paradigm,
        rows=rows,
    )
    view = Comparison(collection, _named(collection, baseline) if baseline else None, ci95=ci95)
    for fault in [*collection.faults, *view.faults]:
        LOG.warning("%s", fault)
    return _show(view, output, form=form, out=out, details=details, page=page)


def _show(view: Comparison, output: Path, *, form: Form, out: Path | None, details: bool, page: Path | None) -> str:
    """Write what goes to files; returns the text for the terminal. Arguments as in `report`."""
    lines = []
    if form == "html":
        page = out or output / "report.html"
    elif out:
        text = _TEXTS[form](view, details=details)
        _written(out, lambda: write_atomically(out, text.encode("utf-8", "replace")))
    else:
        lines.append(_TEXTS[form](view, details=details))
    if form == "github" and not out:
        lines += [f"gallery: {path}\n" for path in place_galleries(view.collection, output)]
    if page:
        with nullcontext() if form == "html" else optional_picture(page):  # a table is worth more than its page
            write_page_of(view, page)
            lines.append(f"page: {page}\n")
    return "".join(lines)


def write_page_of(view: Comparison, target: Path) -> None:
    from air_plugin.report.page import write_page

    _written(target, lambda: write_page(view, target))


def _named(collection: Collection, title: str) -> Method:
    for method in collection.methods:
        if title in (method.title, plain_title(method.cell)):
            return method
    raise unknown("baseline", title, [method.title for method in collection.methods])


def _written(path: Path, write: Callable[[], Any]) -> None:
    try:
        write()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; name another file with --out") from error


# Forms


def as_github(view: Comparison, *, details: bool) -> str:
    """Markdown that reads as text, too."""
    from tabulate import tabulate

    parts = ["\n".join(markdown(line) for line in notes(view, details=details))]
    for heading, (headers, rows) in tables(view, details=details):
        escaped = [[markdown(cell) for cell in row] for row in [headers, *rows]]
        text = tabulate(escaped[1:], headers=escaped[0], tablefmt="github", disable_numparse=True)
        parts += [markdown(heading), text] if heading else [text]
    return "\n\n".join(parts) + "\n"


def as_short_github(view: Comparison) -> str:
    """The table that a script prints; a note before it where accuracy is unknown."""
    from tabulate import tabulate

    parts = []
    for dataset in view.collection.datasets:
        headers, rows = short_table(view, dataset)
        if any(is_unknown(method, dataset) for method in view.collection.methods):
            parts.append(markdown(unknown_note(view, dataset)))
        escaped = [[markdown(cell) for cell in row] for row in [headers, *rows]]
        parts.append(tabulate(escaped[1:], headers=escaped[0], tablefmt="github", disable_numparse=True))
    return "\n\n".join(parts) + "\n"


def markdown(text: str) -> str:
    """A text with a backslash before what would end a cell or become code, mathematics, HTML or a link."""
    return re.sub(r"([\\|`$*<]|\](?=[(\[]))", r"\\\1", text)


def as_latex(view: Comparison, *, details: bool) -> str:
    """Tabulars for booktabs; the notes are comments."""
    from tabulate import tabulate

    parts = ["\n".join(f"% {line}" for line in notes(view, details=details))]
    for heading, (headers, rows) in tables(view, details=details):
        text = tabulate(rows, headers=headers, tablefmt="latex_booktabs", disable_numparse=True)
        # Whole cells after the first that are numbers; tabulate has escaped every & of a title.
        text = re.sub(r"(?<!\\)& ([+-]?\d[\d., +\[\]-]*?) *(?=&|\\\\)", _as_math, text)
        text = re.sub(r"(?m)^( *)([\[*])", r"\1{}\2", text)  # after the end of a line they would be its options
        parts.append(f"% {heading}\n{text}" if heading else text)
    return "\n\n".join(parts) + "\n"


def _as_math(cell: re.Match[str]) -> str:
    return f"& ${cell[1].replace('+-', chr(92) + 'pm')}$ "


def as_csv(view: Comparison, *, details: bool) -> str:
    """One table, numbers in columns of their own; the notes stand before it, behind `#`.

    Texts that a spreadsheet would run as a formula have a quote in front.
    """
    text = io.StringIO()
    text.writelines(f"# {line}\n" for line in notes(view, details=details))
    rows = [_csv_row(view, method, details=details) for method in view.collection.methods]
    # Quotes around all that is no number: readers that know comments take a # inside of quotes for text.
    writer = csv.writer(text, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    writer.writerows(
        [csv_text(cell) if isinstance(cell, str) else cell for cell in row]
        for row in [list(rows[0]), *(row.values() for row in rows)]
    )
    return text.getvalue()


FUSION_COLUMNS = {
    "lambda": "weights",
    "oracle": "oracle",
    "regret": "regret",
    "beta": "betas",
    "prior strength": "prior_strengths",
    "rounds": "rounds",
    "correct labels": "labels",
}


def _csv_row(view: Comparison, method: Method, *, details: bool) -> dict[str, Any]:
    """Column -> value; every method has the same columns."""
    datasets = view.collection.datasets
    row: dict[str, Any] = {"method": method.title, "trainer": method.trainer, "config": method.config}
    for dataset in datasets:
        for label, values in shown_scores(view, method, dataset):
            row |= _spread_columns(view, f"{dataset}{label}", values)
        row[f"{dataset} seeds"] = len(method.runs.get(dataset, {}))
    if len(datasets) > 1:
        row[mean_column(view)] = _rounded(view.mean(method))
    for dataset in datasets if view.baseline else []:
        found = view.difference(method, dataset)
        for key in ("points", "low", "high"):
            row[f"{dataset} difference {key}"] = _rounded(getattr(found, key)) if found else None
    for dataset in datasets if details else []:
        row |= _csv_details(view, method, dataset)
    return row


def _csv_details(view: Comparison, method: Method, dataset: str) -> dict[str, Any]:
    """Column -> value: the heads, pseudo-labels, seeds, auxiliary classifier and seconds of a method on a data set."""
    methods = view.collection.methods
    row: dict[str, Any] = {f"{dataset} primary classifier": primary(method, dataset)}
    for head in ("text", "fused"):
        row |= _spread_columns(view, f"{dataset} {head} head", scores(method, dataset, head=head))
    row |= _spread_columns(view, f"{dataset} pseudo-labels", label_accuracies(method, dataset))
    for seed in sorted({run.seed for other in methods for run in other.on(dataset)}):
        run = method.runs.get(dataset, {}).get(seed)
        row[f"{dataset} seed {seed}"] = _rounded(run.score()) if run else None
    if any(view.fusion(other, dataset) for other in methods):
        fusion = view.fusion(method, dataset)
        row[f"{dataset} lambda is fixed"] = ("yes" if fusion.fixed else "no") if fusion else None
        for column, key in FUSION_COLUMNS.items():
            row |= _spread_columns(view, f"{dataset} {column}", getattr(fusion, key) if fusion else [])
    every, seconds = [view.seconds(other, dataset) for other in methods], view.seconds(method, dataset)
    for name in stage_names(every):
        for number in range(max(len(found.get(name, [])) for found in every)):
            values = seconds.get(name, [])[number:]
            column = f"{dataset} seconds {name}{f', round {number + 1}' if number else ''}"
            row[column] = _rounded(values[0]) if values else None
    return row


def _spread_columns(view: Comparison, name: str, values: Sequence[float]) -> dict[str, float | None]:
    average, spread = view.spread(values) if values else (None, None)
    return {f"{name} mean": _rounded(average), f"{name} {'ci95' if view.ci95 else 'std'}": _rounded(spread)}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


_TEXTS: dict[str, Callable[..., str]] = {"github": as_github, "latex": as_latex, "csv": as_csv}


# Galleries


def place_galleries(collection: Collection, output: Path) -> list[Path]:
    """Copy the first gallery of each data set to `<output>/<dataset folder>/gallery.png`; returns these."""
    runs = [run for method in collection.methods for dataset in collection.datasets for run in method.on(dataset)]
    placed: dict[Path, Path] = {}
    for run in sorted(runs, key=lambda run: run.path):
        source = run.folder / "gallery.png"
        parts = run.path.relative_to(output).parts
        if len(parts) == 5 and source.is_file():
            placed.setdefault(output / parts[0] / "gallery.png", source)
    for target, source in list(placed.items()):
        try:
            shutil.copyfile(source, target)
        except OSError as error:
            LOG.warning("cannot copy %s to %s: %s", source, target, error.strerror or error)
            del placed[target]
    return list(placed)
