"""From results to tables: for the terminal and GitHub, LaTeX, CSV, and the HTML page."""

from __future__ import annotations

import csv
import io
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from air_plugin.collection import Cell, Collection, Method, collect
from air_plugin.comparison import (
    STAGES,
    Comparison,
    Difference,
    accuracies,
    fusion_of,
    is_unknown,
    stage_seconds,
)
from air_plugin.errors import UserError, unknown

Form = Literal["github", "latex", "csv", "html"]
UNKNOWN = "-"  # there are runs, but no test labels
NOT_MEASURED = "-"  # there are runs, but each took the stage from the store
FUSION_NOTES = (
    "Lambda: weight of the auxiliary classifier after the last round; beta: of the loss on drawn images. Both are "
    "chosen without labels, or named by the config (fixed).",
    "Oracle: the fused head with the best lambda of those tried, each seed its own; regret: oracle less fused head, in "
    "points. These two are computed afterwards from test labels that the method never saw.",
    "n0: how many real images EM takes a drawn class mean for. Rounds: of captions, LoRA and drawing. Labels right: "
    "percent of all unlabelled training images after the last round, looked at afterwards, too.",
)
TIME_NOTES = (
    "Seconds: mean over the seeds that did the stage; a + b: the first round and the second. -: every seed took it "
    "from the store, where another run had put it, so the sum is more than is shown (>). An interrupted run tells the "
    "time since it was resumed.",
)


def report(
    output: Path,
    *,
    only: str | None = None,
    rows: Mapping[Cell, str] | None = None,
    datasets: Sequence[str] = (),
    methods: Sequence[str] = (),
    backbone: str | None = None,
    split_family: str | None = None,
    baseline: str | None = None,
    form: Form = "github",
    out: Path | None = None,
    ci95: bool = False,
    details: bool = True,
    page: Path | None = None,
) -> int:
    """Report a folder of results; returns the exit code. What was left out goes to stderr, a line each.

    Tables go to standard output, the page to report.html in `output`, unless `out` names a file. In the form github on
    standard output, the galleries are placed, too.

    Args:
        output: the scripts' OUTPUT.
        only: a data set's folder in it; None is all.
        rows, datasets, methods, backbone, split_family: what to show; see `air_plugin.collection.collect`.
        baseline: title of a row that the others are compared with; it is shown even where `methods` leaves it out.
        form: of the table.
        out: a file to write, whole or not at all.
        ci95: give half of the 95 % interval over seeds instead of the standard deviation.
        details: every head, the pseudo-labels and every seed, too; the page has them anyway.
        page: a file for the page, beside a table in another form: what both show is read and computed once.

    Raises:
        UserError: nothing to report, results that cannot be compared, an unknown name, a file that cannot be written.
    """
    wanted = [*methods, *([baseline] if methods and baseline and baseline not in methods else [])]
    collection = collect(
        output / only if only else output, datasets=datasets, methods=wanted, backbone=backbone,
        split_family=split_family, rows=rows,
    )  # fmt: skip
    view = Comparison(collection, _named(collection, baseline) if baseline else None, ci95=ci95)
    _warn([*collection.faults, *view.faults])
    if form == "html":
        _write_page(view, out or output / "report.html")
    elif out:
        from air_plugin.images import write_atomically

        text = _TEXTS[form](view, details=details)
        _written(out, lambda: write_atomically(out, text.encode("utf-8")))
    else:
        print(_TEXTS[form](view, details=details), end="")
    if form == "github" and not out:
        shown = [run for method in collection.methods for runs in method.runs.values() for run in runs.values()]
        for path in place_gallery(sorted(shown, key=lambda run: run["path"]), output):
            print(f"gallery: {path}")
    if page:
        _write_page(view, page)
    return 0


def _write_page(view: Comparison, target: Path) -> None:
    from air_plugin.page import write_page

    _written(target, lambda: write_page(view, target))
    print(f"page: {target}")


def _named(collection: Collection, title: str) -> Method:
    for method in collection.methods:
        if method.title == title:
            return method
    raise unknown("baseline", title, [method.title for method in collection.methods])


def _warn(faults: Iterable[str]) -> None:
    for fault in faults:
        print(f"warning: {fault}", file=sys.stderr)


def _written(path: Path, write: Callable[[], Any]) -> None:
    try:
        write()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; name another file with --out") from error


# What stands in the tables


def notes(view: Comparison, *, details: bool) -> list[str]:
    """What one has to know to read the tables."""
    collection = view.collection
    spread = "half of the 95 % interval over seeds (Student's t)" if view.ci95 else "the standard deviation over seeds"
    lines = [
        f'{name}: backbone {collection.backbone}, split family {collection.split_family}, template "{template}"'
        + (f", class names in the wording {collection.wordings[name]}" if name in collection.wordings else "")
        for name, template in collection.templates.items()
    ]
    lines += [
        f'{name}: no test labels, so its accuracy is unknown ("-"); what was predicted is in every predictions.json.'
        for name in collection.datasets if any(is_unknown(method, name) for method in collection.methods)
    ]  # fmt: skip
    lines.append(f"Test accuracy of the headline head in percent; +- is {spread}, and is left out for a single seed.")
    lines.append("Headline head: the one that the config names beforehand (AIR.HEADLINE); text for methods without it.")
    if len(collection.datasets) > 1:
        lines.append("mean: of the data sets' means, for methods that have all; seeds: by data set where they differ.")
    if view.baseline:
        lines.append(
            f"Difference to {view.baseline.title}: in points over common seeds, with the 95 % bootstrap interval over "
            "test images (images are resampled, seeds are not)."
        )
    if details:
        lines.append(
            "Pseudo-labels: percent right (likeliest candidate) of the selected training images, in the last round."
        )
        lines += [*(FUSION_NOTES if _any_fusion(view) else []), *(TIME_NOTES if _any_stage(view) else [])]
    return lines


Table = tuple[list[str], list[list[str]]]  # headers, rows


def main_table(view: Comparison) -> Table:
    """A row a method: accuracy on every data set, their mean, number of seeds, differences to the baseline."""
    datasets = view.collection.datasets
    several = len(datasets) > 1
    headers = ["method", *datasets, *(["mean"] if several else []), "seeds"]
    if view.baseline:
        headers += [f"difference to {view.baseline.title}{f', {d}' if several else ''}" for d in datasets]
    rows = []
    for method in view.collection.methods:
        counts = [str(len(method.runs.get(dataset, {}))) for dataset in datasets]
        row = [method.title, *(_accuracy(view, method, dataset) for dataset in datasets)]
        row += [_figure(view.mean(method))] if several else []
        row += [counts[0] if len(set(counts)) == 1 else "/".join(counts)]
        row += [_change(view.difference(method, dataset)) for dataset in datasets] if view.baseline else []
        rows.append(row)
    return headers, rows


def details_table(view: Comparison, dataset: str) -> Table:
    """A row a method: which head is the headline, every head, the pseudo-labels, and every seed."""
    rows = []
    for method in view.collection.methods:
        runs = sorted(method.runs.get(dataset, {}).items())
        if not runs:
            continue
        rows.append([
            method.title, _headline(method, dataset),
            *(_accuracy(view, method, dataset, head=head) for head in ("text", "fused")),
            _spread(view, _label_accuracies(method, dataset)),
            ", ".join(f"{seed}: {_figure(run['heads'][run['headline']]['accuracy']) or UNKNOWN}" for seed, run in runs),
        ])  # fmt: skip
    return ["method", "headline head", "text head", "fused head", "pseudo-labels", "every seed"], rows


def fusion_table(view: Comparison, dataset: str) -> Table:
    """A row a method with the auxiliary classifier: lambda, what it came to, and the rounds that led there."""
    rows = []
    for method in view.collection.methods:
        found = fusion_of(method, dataset)
        if found is None:
            continue
        hidden = is_unknown(method, dataset, head="fused")
        rows.append([
            method.title, _weight(view, found.weights, fixed=found.fixed),
            *(UNKNOWN if hidden else _spread(view, scores) for scores in (found.accuracy, found.oracle, found.regret)),
            _weight(view, found.betas, fixed=found.beta_fixed), _spread(view, found.anchors), _count(found.rounds),
            _spread(view, found.labels) or (UNKNOWN if found.rounds else ""),
        ])  # fmt: skip
    return ["method", "lambda", "fused head", "oracle", "regret", "beta", "n0", "rounds", "labels right"], rows


def _weight(view: Comparison, values: Sequence[float], *, fixed: bool) -> str:
    if fixed and len(set(values)) == 1:
        return f"{values[0]:g} (fixed)"
    return _spread(view, values, digits=2) + (" (fixed)" if fixed and values else "")


def _count(values: Sequence[float]) -> str:
    """A whole number where all are the same."""
    return _figure(sum(values) / len(values)).removesuffix(".0") if values else ""


def time_table(view: Comparison, dataset: str) -> Table:
    """A row a method: seconds in all, and by stage."""
    found = [(method, stage_seconds(method, dataset)) for method in view.collection.methods]
    names = _stages(seconds for _, seconds in found)
    rows = []
    for method, seconds in found:
        if seconds:
            cells = [" + ".join(_figure(value) or NOT_MEASURED for value in seconds.get(name, [])) for name in names]
            rows.append([method.title, _total(seconds), *cells])
    return ["method", "sum", *names], rows


def _stages(found: Iterable[Mapping[str, Any]]) -> list[str]:
    """Names of stages in the order of a table."""
    names = dict.fromkeys(name for seconds in found for name in seconds)
    return [*(name for name in STAGES if name in names), *(name for name in names if name not in STAGES)]


def _total(seconds: Mapping[str, Sequence[float | None]]) -> str:
    values = [value for parts in seconds.values() for value in parts]
    known = [value for value in values if value is not None]
    return f"{'> ' if len(known) < len(values) else ''}{sum(known):.1f}" if known else NOT_MEASURED


def _any_fusion(view: Comparison) -> bool:
    return any(fusion_table(view, name)[1] for name in view.collection.datasets)


def _any_stage(view: Comparison) -> bool:
    return any(time_table(view, name)[1] for name in view.collection.datasets)


def _headline(method: Method, dataset: str) -> str:
    return "/".join(sorted({run["headline"] for run in method.runs.get(dataset, {}).values()}))


def _label_accuracies(method: Method, dataset: str) -> list[float]:
    figures = [run["pseudo_labels"]["accuracy"] for run in method.runs.get(dataset, {}).values()]
    return [value for value in figures if value is not None]


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _spread(view: Comparison, values: Sequence[float], *, digits: int = 1) -> str:
    if not values:
        return ""
    average, spread = view.spread(values)
    return f"{average:.{digits}f}" + ("" if spread is None else f" +- {spread:.{digits}f}")


def _accuracy(view: Comparison, method: Method, dataset: str, *, head: str | None = None) -> str:
    return UNKNOWN if is_unknown(method, dataset, head=head) else _spread(view, accuracies(method, dataset, head=head))


def _change(difference: Difference | None) -> str:
    if difference is None:
        return ""
    # Plus 0.0: what rounds to nothing has no minus.
    points, low, high = (round(value, 1) + 0.0 for value in (difference.points, difference.low, difference.high))
    return f"{points:+.1f} [{low:.1f}, {high:.1f}]"


def _tables(view: Comparison, *, details: bool) -> list[tuple[str, Table]]:
    """The main table, and by data set the details, each with its heading."""
    tables = [("", main_table(view))]
    for name in view.collection.datasets if details else []:
        tables.append((f"{name}, every head and seed", details_table(view, name)))
        more = [(f"{name}, lambda and rounds", fusion_table(view, name)), (f"{name}, seconds", time_table(view, name))]
        tables += [(heading, table) for heading, table in more if table[1]]
    return tables


# Forms


def as_github(view: Comparison, *, details: bool) -> str:
    """Markdown that reads as text, too."""
    from tabulate import tabulate

    parts = ["\n".join(notes(view, details=details))]
    for heading, (headers, rows) in _tables(view, details=details):
        escaped = [[cell.replace("|", "\\|") for cell in row] for row in [headers, *rows]]
        text = tabulate(escaped[1:], headers=escaped[0], tablefmt="github", disable_numparse=True)
        parts += [heading, text] if heading else [text]
    return "\n\n".join(parts) + "\n"


def as_latex(view: Comparison, *, details: bool) -> str:
    """Tabulars for booktabs; the notes are comments."""
    from tabulate import tabulate

    parts = ["\n".join(f"% {line}" for line in notes(view, details=details))]
    for heading, (headers, rows) in _tables(view, details=details):
        text = tabulate(rows, headers=headers, tablefmt="latex_booktabs", disable_numparse=True)
        # Whole cells behind the first that are figures; tabulate has escaped every & of a title.
        text = re.sub(r"(?<!\\)& ([+-]?\d[\d., +\[\]-]*?) *(?=&|\\\\)", _as_math, text)
        text = re.sub(r"(?m)^( *)([\[*])", r"\1{}\2", text)  # behind a line's end they would be its options
        parts.append(f"% {heading}\n{text}" if heading else text)
    return "\n\n".join(parts) + "\n"


def _as_math(cell: re.Match[str]) -> str:
    return f"& ${cell[1].replace('+-', chr(92) + 'pm')}$ "


def as_csv(view: Comparison, *, details: bool) -> str:
    """One table, numbers in columns of their own; the notes stand before it, behind `#`."""
    text = io.StringIO()
    text.writelines(f"# {line}\n" for line in notes(view, details=details))
    rows = [_csv_row(view, method, details=details) for method in view.collection.methods]
    # Quotes around all that is no number: readers that know comments take a # inside of quotes for text.
    writer = csv.DictWriter(text, list(rows[0]), quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


FUSION_COLUMNS = {
    "lambda": "weights", "oracle": "oracle", "regret": "regret", "beta": "betas", "n0": "anchors", "rounds": "rounds",
    "labels right": "labels",
}  # fmt: skip


def _csv_row(view: Comparison, method: Method, *, details: bool) -> dict[str, Any]:
    """Column -> value; every method has the same columns."""
    datasets, kind = view.collection.datasets, "ci95" if view.ci95 else "std"
    row: dict[str, Any] = {"method": method.title, "trainer": method.trainer, "config": method.config}
    methods = view.collection.methods

    def add(name: str, values: Sequence[float]) -> None:
        average, spread = view.spread(values) if values else (None, None)
        row[f"{name} mean"], row[f"{name} {kind}"] = _rounded(average), _rounded(spread)

    for dataset in datasets:
        add(dataset, accuracies(method, dataset))
        row[f"{dataset} seeds"] = len(method.runs.get(dataset, {}))
    if len(datasets) > 1:
        row["mean"] = _rounded(view.mean(method))
    for dataset in datasets if view.baseline else []:
        found = view.difference(method, dataset)
        for key in ("points", "low", "high"):
            row[f"{dataset} difference {key}"] = _rounded(getattr(found, key)) if found else None
    for dataset in datasets if details else []:
        row[f"{dataset} headline head"] = _headline(method, dataset)
        for head in ("text", "fused"):
            add(f"{dataset} {head} head", accuracies(method, dataset, head=head))
        add(f"{dataset} pseudo-labels", _label_accuracies(method, dataset))
        for seed in sorted({seed for other in methods for seed in other.runs.get(dataset, {})}):
            run = method.runs.get(dataset, {}).get(seed)
            row[f"{dataset} seed {seed}"] = _rounded(run["heads"][run["headline"]]["accuracy"]) if run else None
        if any(fusion_of(other, dataset) for other in methods):
            fusion = fusion_of(method, dataset)
            row[f"{dataset} lambda is fixed"] = ("yes" if fusion.fixed else "no") if fusion else None
            for column, key in FUSION_COLUMNS.items():
                add(f"{dataset} {column}", getattr(fusion, key) if fusion else [])
        every, own = [stage_seconds(other, dataset) for other in methods], stage_seconds(method, dataset)
        for name in _stages(every):
            for number in range(max(len(seconds.get(name, [])) for seconds in every)):
                values = own.get(name, [])[number:]
                row[f"{dataset} seconds {name}{f', round {number + 1}' if number else ''}"] = (
                    _rounded(values[0]) if values else None
                )
    return row


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


_TEXTS: dict[str, Callable[..., str]] = {"github": as_github, "latex": as_latex, "csv": as_csv}


# Pictures


def place_gallery(results: Iterable[Mapping[str, Any]], output: Path) -> list[Path]:
    """Copy the first gallery of each data set to `<output>/<dataset folder>/gallery.png`; returns these.

    What cannot be copied is told on stderr.
    """
    placed: dict[Path, Path] = {}
    for result in results:
        source = result["path"].parent / "gallery.png"
        relative = result["path"].relative_to(output).parts
        target = output / relative[0] / "gallery.png"
        if len(relative) == 5 and source.is_file() and target not in placed:
            placed[target] = source
    for target, source in list(placed.items()):
        try:
            shutil.copyfile(source, target)
        except OSError as error:
            _warn([f"cannot copy {source} to {target}: {error.strerror or error}"])
            del placed[target]
    return list(placed)
