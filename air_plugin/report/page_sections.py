"""What the page shows of one data set, as plain values for its template."""

from __future__ import annotations

import base64
import io
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite, nan
from pathlib import Path
from typing import Any

import numpy as np

from air_plugin.report.charts import COLOURS, GLYPHS, Line, Panel, bar_chart, line_chart
from air_plugin.report.collection import Cell, Method
from air_plugin.report.results import Predictions, load_predictions, settings_of
from air_plugin.report.statistics import accuracies, fusion_of, is_unknown
from air_plugin.utils.errors import UserError
from air_plugin.utils.files import digest
from air_plugin.utils.images import UnreadableImage, load_rgb

CLASSES = 40  # above: a chart of the classes that differ most, and pairs instead of matrices
DIFFERENT, PAIRS, MISTAKES = 20, 15, 12
PICTURE, GALLERY, TINY = 160, 1400, 64  # longest sides in pixels
# What says where and how a run was made, not what it is.
ELSEWHERE = {"SEED", "OUTPUT_DIR", "RESUME", "DATASET.ROOT", "AIR.CACHE", "AIR.THREADS", "DATALOADER.NUM_WORKERS"}

Points = Mapping[float, Sequence[float]]  # x -> values over seeds


def cell(method: Method) -> Cell:
    """What tells a method from others."""
    return method.trainer, method.config


@dataclass
class View:
    """What every part of a data set's section looks at.

    methods: those with a run on the data set, in the table's order.
    baseline: what others are compared with.
    spread: values over seeds -> their mean, and half of the bar to draw; None for one seed.
    faults: takes a line for everything that could not be shown.
    """

    dataset: str
    methods: list[Method]
    baseline: Method | None
    spread: Callable[[Sequence[float]], tuple[float, float | None]]
    faults: list[str]

    @cached_property
    def shown(self) -> list[Method]:
        """What charts have room for, in the table's order: the baseline, zero-shot CLIP and the last ones."""
        first = [*self._references(), *reversed(self.methods)]
        kept = list(dict.fromkeys(map(cell, first)))[:COLOURS]
        return [method for method in self.methods if cell(method) in kept]

    def _references(self) -> list[Method]:
        baseline = [m for m in self.methods if self.baseline and cell(m) == cell(self.baseline)]
        return baseline + [m for m in self.methods if m.trainer == "ZeroshotCLIP"][:1]

    def coloured(self, methods: Sequence[Method]) -> list[tuple[int, Method]]:
        """At most six of these methods with their colours: the same one in every chart for those that are shown."""
        grey = [cell(method) for method in self._references()[:1]]
        others = [cell(method) for method in self.shown if cell(method) not in grey]
        fixed = dict(zip(grey + others, range(0 if grey else 1, COLOURS), strict=False))
        wanted = sorted(map(cell, methods), key=lambda key: key not in fixed)[:COLOURS]  # stable: the shown ones first
        free = [n for n in (*range(1, COLOURS), 0) if n not in [fixed.get(key) for key in wanted]]
        colours = {key: fixed[key] if key in fixed else free.pop(0) for key in wanted}
        return [(colours[cell(method)], method) for method in methods if cell(method) in colours]

    def runs(self, method: Method) -> list[dict[str, Any]]:
        """Results by rising seed."""
        return [run for _, run in sorted(method.runs[self.dataset].items())]

    def line(self, colour: int, points: Points) -> Line:
        """The means over seeds, with their spreads."""
        rising = sorted((x, self.spread(values)) for x, values in points.items() if values)
        return Line(colour, [x for x, _ in rising], [m for _, (m, _) in rising], [s or 0.0 for _, (_, s) in rising])


def sections(view: View) -> dict[str, Any]:
    """Everything below a data set's heading; a part is empty where there is nothing to show."""
    said = {cell(method): _predictions(view, method) for method in view.methods}
    return {
        "name": view.dataset,
        "unknown": all(is_unknown(method, view.dataset) for method in view.methods),
        "classes": _classes(view),
        "confusion": _confusion(view, said),
        "labels": _pseudo_labels(view),
        "generated": _by_drawn(view),
        "weight": _by_weight(view),
        "galleries": _galleries(view),
        "mistakes": _mistakes(view, said),
    }


def _numbers(values: Iterable[Any]) -> list[float]:
    """Those of the values that are finite numbers."""
    return [float(v) for v in values if isinstance(v, (int, float)) and not isinstance(v, bool) and isfinite(v)]


def _legend(coloured: Iterable[tuple[int, Method]], *, bars: bool = False) -> list[tuple[int, str, str]]:
    """Colour, mark and title of each series."""
    return [(colour, GLYPHS[1 if bars else colour], method.title) for colour, method in coloured]


def _svg(chart: str) -> Any:
    """A chart of ours, in which all text is escaped, for a template that escapes."""
    from markupsafe import Markup

    return Markup(chart)


# Accuracy of each class


def _classes(view: View) -> dict[str, Any] | None:
    """Mean over seeds: a chart of the methods that are shown, a table of all."""
    methods, means = [], {}
    for method in view.methods:
        values: dict[str, list[float]] = defaultdict(list)
        for run in view.runs(method):
            for name, value in (run["heads"][run["primary"]].get("per_class") or {}).items():
                values[name].append(value)
        if values:
            methods.append(method)
            means[cell(method)] = {name: float(np.mean(found)) for name, found in values.items()}
    if not methods:
        return None
    names = list(dict.fromkeys(name for found in means.values() for name in found))
    coloured = view.coloured([method for method in methods if method in view.shown] or methods)
    bars = np.array([[means[cell(method)].get(name, nan) for name in names] for _, method in coloured])
    generated = np.arange(len(names))
    if len(names) > CLASSES:
        generated = np.argsort(-np.ptp(np.nan_to_num(bars), axis=0), kind="stable")[:DIFFERENT]
    alt = f"Accuracy of each class of {view.dataset} in percent: {_titles(coloured)}. The figures follow in a table."
    series = [(colour, row[generated].tolist()) for (colour, _), row in zip(coloured, bars, strict=True)]
    return {
        "chart": _svg(bar_chart([names[i] for i in generated], series, y_label="accuracy (%)", alt=alt)),
        "legend": _legend(coloured, bars=True),
        "methods": methods,
        "rows": [(name, [means[cell(method)].get(name) for method in methods]) for name in names],
    }


def _titles(coloured: Iterable[tuple[int, Method]]) -> str:
    return ", ".join(method.title for _, method in coloured)


# Confusion

Said = Mapping[Cell, dict[int, tuple[Predictions, str]]]


def _predictions(view: View, method: Method) -> dict[int, tuple[Predictions, str]]:
    """Seed -> what the heads said, and which of them is the primary."""
    found = {}
    for seed, run in sorted(method.runs[view.dataset].items()):
        try:
            said = load_predictions(run)
        except UserError as error:
            view.faults.append(str(error))
            continue
        if said is not None and said.labelled:
            found[seed] = said, run["primary"]
    return found


def _confusion(view: View, said: Said) -> list[dict[str, Any]]:
    """Share of each true class that was called each class, in percent, mean over seeds."""
    found = []
    for method in view.methods:
        runs = [*said[cell(method)].values()]
        if not runs:
            continue
        names = runs[0][0].classnames
        alike = [(predictions, head) for predictions, head in runs if predictions.classnames == names]
        matrix = np.mean([confusion_matrix(predictions, head) for predictions, head in alike], axis=0)
        entry = {"title": method.title, "open": method in view.shown, "names": names, "seeds": len(alike)}
        if len(names) <= CLASSES:
            entry["rows"] = [(name, np.rint(row).astype(int).tolist()) for name, row in zip(names, matrix, strict=True)]
        else:
            entry["pairs"] = most_confused(matrix, names)
        found.append(entry)
    return found


def confusion_matrix(predictions: Predictions, head: str) -> np.ndarray:
    """(C, C) percent of the true class, which are the rows; a class without images has a row of zeros."""
    size = len(predictions.classnames)
    cells = predictions.labels * size + predictions.predicted[head]
    counts = np.bincount(cells, minlength=size * size).reshape(size, size)
    return 100.0 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


def most_confused(matrix: np.ndarray, names: Sequence[str]) -> list[tuple[str, str, float]]:
    """True class, what it was called and how often, the worst first, of a (C, C) matrix in percent."""
    mistakes = matrix * (1 - np.eye(len(names)))
    true, called = np.unravel_index(np.argsort(-mistakes, axis=None, kind="stable")[:PAIRS], mistakes.shape)
    return [(names[t], names[c], mistakes[t, c]) for t, c in zip(true, called, strict=True) if mistakes[t, c] > 0]


# Pseudo-labels


def _pseudo_labels(view: View) -> dict[str, Any]:
    """By round as lines where a method has more than one round; of the last round as a table."""
    columns = ("selected", "coverage", "accuracy", "candidates", "candidate_recall")
    rows, several = [], []
    for method in view.methods:
        last = [run["pseudo_labels"] for run in view.runs(method) if run["pseudo_labels"].get("selected")]
        if not last:
            continue
        rounds = max(len(run.get("rounds") or []) for run in view.runs(method))
        values = [_numbers(figures.get(column) for figures in last) for column in columns]
        rows.append((method.title, max(rounds, 1), [view.spread(v) if v else None for v in values]))
        if rounds > 1:
            several.append(method)
    coloured = view.coloured(several)
    panels = []
    for column, title in (("accuracy", "right pseudo-labels (%)"), ("selected", "images selected")):
        lines = [view.line(colour, _by_round(view, method, column)) for colour, method in coloured]
        if any(line.x for line in lines):
            panels.append(Panel("round", title, lines, whole=True))
    alt = f"Pseudo-labels of {view.dataset} by round, their accuracy in percent and number: {_titles(coloured)}."
    chart = _svg(line_chart(panels, alt=alt)) if panels else ""
    return {"chart": chart, "legend": _legend(coloured), "rows": rows, "several": len(several)}


def _by_round(view: View, method: Method, column: str) -> Points:
    points: dict[float, list[float]] = defaultdict(list)
    for run in view.runs(method):
        for number, figures in enumerate(run.get("rounds") or [], start=1):
            points[number] += _numbers([figures.get(column)])
    return points


# Settings


def _series(view: View, key: str, *free: str) -> list[list[tuple[float, Method]]]:
    """Methods of one trainer whose settings differ in `key` (and the free keys) only, by rising value."""
    groups: dict[str, list[tuple[float, Method]]] = defaultdict(list)
    for method in view.methods:
        settings = settings_of(view.runs(method)[0])
        rest = {k: v for k, v in settings.items() if k not in {key, *free} | ELSEWHERE}
        for value in _numbers([settings.get(key)]):
            groups[json.dumps([method.trainer, rest], sort_keys=True)].append((value, method))
    found = [sorted(group, key=lambda entry: entry[0]) for group in groups.values()]
    return [group for group in found if len({value for value, _ in group}) > 1]


def _swept(view: View, series: list[list[tuple[float, Method]]]) -> tuple[list[tuple[int, Method]], list[Line]]:
    """A line a series, under the name and colour of its member with the shortest config."""
    groups = {cell(named): (named, group) for group in series for named in [min((m for _, m in group), key=_plainness)]}
    coloured = view.coloured([named for named, _ in groups.values()])
    lines = []
    for colour, named in coloured:
        points: dict[float, list[float]] = defaultdict(list)
        for value, method in groups[cell(named)][1]:
            points[value] += accuracies(method, view.dataset)
        lines.append(view.line(colour, points))
    return coloured, lines


def _plainness(method: Method) -> tuple[int, str]:
    return len(method.config), method.config


def _by_drawn(view: View) -> dict[str, Any] | None:
    """Accuracy against M, the number of images generated a class; K, how many are kept, may go with it."""
    series = _series(view, "AIR.M", "AIR.K")
    if not series or not any(accuracies(method, view.dataset) for group in series for _, method in group):
        return None
    coloured, lines = _swept(view, series)
    rows = []
    for value, method in (entry for group in series for entry in group):
        found = accuracies(method, view.dataset)
        if not found:
            continue
        kept = _numbers([settings_of(view.runs(method)[0]).get("AIR.K")])
        rows.append((method.title, value, kept[0] if kept else None, view.spread(found), len(found)))
    alt = f"Accuracy on {view.dataset} in percent against M, the number of images generated a class. A table follows."
    chart = line_chart([Panel("M, images generated a class", "accuracy (%)", lines, whole=True)], alt=alt)
    return {"chart": _svg(chart), "legend": _legend(coloured), "rows": rows, "of": len(series)}


def _by_weight(view: View) -> list[dict[str, Any]]:
    """Accuracy against lambda: of the fused head of finished runs, and of runs that were trained with another one."""
    curves: dict[Cell, dict[float, list[float]]] = {}
    for method in view.methods:
        points: dict[float, list[float]] = defaultdict(list)
        for run in view.runs(method):
            for weight, accuracy in run.get("by_lambda") or []:
                points[weight].append(accuracy)
        if points:  # a lambda that was chosen without labels is one seed's alone; the others' curves go on without it
            seeds = max(map(len, points.values()))
            curves[cell(method)] = {weight: values for weight, values in points.items() if len(values) == seeds}
    found = []
    if curves:
        coloured = view.coloured([method for method in view.methods if cell(method) in curves])
        lines = [view.line(colour, curves[cell(method)]) for colour, method in coloured]
        rings = [ring for colour, method in coloured for ring in _rings(view, colour, method)]
        found.append(_weight_chart(view, coloured, lines, of=len(curves), trained=False, rings=rings))
    series = _series(view, "AIR.LAMBDA")
    if any(accuracies(method, view.dataset) for group in series for _, method in group):
        found.append(_weight_chart(view, *_swept(view, series), of=len(series), trained=True))
    return found


def _rings(view: View, colour: int, method: Method) -> list[Line]:
    """The lambda that the runs used, and what it came to, as means over seeds: one point, or none."""
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
    alt = f"Accuracy on {view.dataset} in percent against lambda, {head}: {_titles(coloured)}."
    label = "accuracy (%)" if trained else "accuracy of the fused head (%)"
    chart = line_chart([Panel("lambda", label, lines, rings=rings)], alt=alt)
    return {"chart": _svg(chart), "legend": _legend(coloured), "of": of, "trained": trained, "rings": len(rings)}


# Pictures


def _embedded(path: Path, *, longest: int, lossless: bool) -> tuple[str, int, int]:
    """An image file as data: URI, shrunk where it is larger, with its width and height.

    Raises:
        UnreadableImage: the file is missing or no whole image.
    """
    if not os.path.isfile(path):  # false, too, for a name that no file can have
        raise UnreadableImage(f"{path} is missing")
    image = load_rgb(path)
    lossless = lossless and max(image.size) <= longest
    image.thumbnail((longest, longest))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG" if lossless else "JPEG", optimize=True, quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f"data:image/{'png' if lossless else 'jpeg'};base64,{data}", *image.size


def _galleries(view: View) -> list[dict[str, Any]]:
    """What the generator drew, for the first seed of each method; methods with the same picture share it."""
    found: dict[str, dict[str, Any]] = {}
    for method in view.methods:
        for seed, run in sorted(method.runs[view.dataset].items())[:1]:
            path = Path(run["path"]).parent / "gallery.png"
            if not os.path.isfile(path):
                continue
            entry = {"titles": [], "seed": seed}
            try:
                known = found.setdefault(digest(path.read_bytes()), entry)
                if known is entry:
                    entry["image"], entry["width"], entry["height"] = _embedded(path, longest=GALLERY, lossless=False)
            except (OSError, UnreadableImage) as error:
                view.faults.append(f"gallery {path}: {error}")
                continue
            known["titles"].append(method.title)
    return [entry for entry in found.values() if "image" in entry]


def _mistakes(view: View, said: Said) -> list[dict[str, Any]]:
    """The wrong test images of highest confidence, for the first seed of each method."""
    found = []
    for method in view.methods:
        for seed, (predictions, head) in [*said[cell(method)].items()][:1]:
            predicted, confidence = predictions.predicted[head], predictions.confidence[head]
            wrong = np.flatnonzero(predicted != predictions.labels)
            surest = wrong[np.argsort(-confidence[wrong], kind="stable")][:MISTAKES]
            found.append(
                {
                    "title": method.title,
                    "seed": seed,
                    "head": head,
                    "open": method in view.shown,
                    "wrong": len(wrong),
                    "of": len(predicted),
                    "images": [_mistake(predictions, head, i) for i in surest],
                }
            )
    return found


def _mistake(predictions: Predictions, head: str, index: int) -> dict[str, Any]:
    name, classes = predictions.images[index], predictions.classnames
    entry = {
        "name": name,
        "said": classes[predictions.predicted[head][index]],
        "true": classes[predictions.labels[index]],
        "confidence": 100.0 * predictions.confidence[head][index],
    }
    try:
        image, width, height = _embedded(predictions.root / name, longest=PICTURE, lossless=True)
    except UnreadableImage:
        return entry | {"image": None, "tiny": False}
    return entry | {"image": image, "tiny": max(width, height) <= TINY}
