"""Accuracy against one setting: the number of generated images, and lambda."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from air_plugin.report.charts import Line, Panel, line_chart
from air_plugin.report.collection import Cell, Method
from air_plugin.report.fusion import fusion_of
from air_plugin.report.sections.view import View, as_markup, legend, titles
from air_plugin.report.statistics import scores
from air_plugin.utils.files import to_json

# Settings that tell where and how a run was made, not what it computes.
ELSEWHERE = {
    "SEED",
    "OUTPUT_DIR",
    "RESUME",
    "DATASET.ROOT",
    "AIR.CACHE",
    "AIR.THREADS",
    "AIR.CUDA_GRAPHS",
    "DATALOADER.NUM_WORKERS",
}


def _series(view: View, key: str, *free: str) -> list[list[tuple[float, Method]]]:
    """Methods of one trainer whose settings differ in `key` (and the free keys) only, by rising value."""
    groups: dict[str, list[tuple[float, Method]]] = defaultdict(list)
    for method in view.methods:
        run = view.runs(method)[0]
        rest = {k: v for k, v in run.settings.items() if k not in {key, *free} | ELSEWHERE}
        value = run.number_setting(key)
        if value is not None:
            groups[to_json([method.trainer, rest], sort_keys=True)].append((value, method))
    found = [sorted(group, key=lambda entry: entry[0]) for group in groups.values()]
    return [group for group in found if len({value for value, _ in group}) > 1]


def _swept(view: View, series: list[list[tuple[float, Method]]]) -> tuple[list[tuple[int, Method]], list[Line]]:
    """A line a series, under the name and colour of its member with the shortest config."""
    groups = {named.cell: (named, group) for group in series for named in [min((m for _, m in group), key=_plainness)]}
    coloured = view.coloured([named for named, _ in groups.values()])
    lines = []
    for colour, named in coloured:
        points: dict[float, list[float]] = defaultdict(list)
        for value, method in groups[named.cell][1]:
            points[value] += scores(method, view.dataset)
        lines.append(view.line(colour, points))
    return coloured, lines


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _plainness(method: Method) -> tuple[int, str]:
    return len(method.config), method.config


def by_generated(view: View) -> dict[str, Any] | None:
    """Accuracy against M, the number of images generated a class; K, how many are kept, may go with it."""
    series = _series(view, "AIR.M", "AIR.K")
    if not series or not any(scores(method, view.dataset) for group in series for _, method in group):
        return None
    coloured, lines = _swept(view, series)
    rows = []
    for value, method in (entry for group in series for entry in group):
        found = scores(method, view.dataset)
        if not found:
            continue
        kept = view.runs(method)[0].number_setting("AIR.K")
        rows.append((method.title, value, kept, view.spread(found), len(found)))
    subject = f"{_capital(view.metric)} on {view.dataset} in percent"
    alt = f"{subject} against M, the number of images generated a class. A table follows."
    chart = line_chart([Panel("M, images generated a class", f"{view.metric} (%)", lines, whole=True)], alt=alt)
    return {"chart": as_markup(chart), "legend": legend(coloured), "rows": rows, "of": len(series)}


def by_weight(view: View) -> list[dict[str, Any]]:
    """Accuracy against lambda: of the fused head of finished runs, and of runs that were trained with another one."""
    curves: dict[Cell, dict[float, list[float]]] = {}
    for method in view.methods:
        points: dict[float, list[float]] = defaultdict(list)
        for run in view.runs(method):
            for weight, accuracy in run.by_lambda:
                points[weight].append(accuracy)
        if points:  # a lambda chosen without labels belongs to one seed alone; it is no point of the mean curve
            seeds = max(map(len, points.values()))
            curves[method.cell] = {weight: values for weight, values in points.items() if len(values) == seeds}
    found = []
    if curves:
        coloured = view.coloured([method for method in view.methods if method.cell in curves])
        lines = [view.line(colour, curves[method.cell]) for colour, method in coloured]
        rings = [ring for colour, method in coloured for ring in _rings(view, colour, method)]
        found.append(_weight_chart(view, coloured, lines, of=len(curves), trained=False, rings=rings))
    series = _series(view, "AIR.LAMBDA")
    if any(scores(method, view.dataset) for group in series for _, method in group):
        found.append(_weight_chart(view, *_swept(view, series), of=len(series), trained=True))
    return found


def _rings(view: View, colour: int, method: Method) -> list[Line]:
    """The lambda of the runs and its accuracy, as means over seeds: one point, or none."""
    found = fusion_of(method, view.dataset)
    if found is None or not found.weights or not found.accuracy:
        return []
    return [Line(colour, [view.spread(found.weights)[0]], [view.spread(found.accuracy)[0]], [0.0])]


def _weight_chart(
    view: View,
    coloured: list[tuple[int, Method]],
    lines: list[Line],
    *,
    of: int,
    trained: bool,
    rings: Sequence[Line] = (),
) -> dict[str, Any]:
    head = "primary classifier, trained with each lambda" if trained else "fused head, trained once"
    alt = f"{_capital(view.metric)} on {view.dataset} in percent against lambda, {head}: {titles(coloured)}."
    label = f"{view.metric} (%)" if trained else f"{view.metric} of the fused head (%)"
    chart = line_chart([Panel("lambda", label, lines, rings=rings)], alt=alt)
    return {"chart": as_markup(chart), "legend": legend(coloured), "of": of, "trained": trained, "rings": len(rings)}
