"""Finished runs, read back from disk: which belong together, what is wrong with the others, and their statistics."""

from __future__ import annotations

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from air_plugin.errors import UserError, unknown

TRAINERS = ("ZeroshotCLIP", "CoOp", "UPL", "CPL", "ZeroshotAiR", "AiR")  # rows that no methods.json names, in order
TEXTS = ("trainer", "dataset", "config", "backbone", "split_family", "template", "headline")
NEEDED = (*TEXTS, "seed", "heads", "pseudo_labels")
BOOTSTRAP_CELLS = 4_000_000  # resamples x images at once; about 64 MB
LARGE = 1e12  # no count and no lambda is larger, and every plot can hold it

Cell = tuple[str, str]  # trainer, config


@dataclass(frozen=True)
class Predictions:
    """What every head said of every test image (predictions.json).

    images: N paths, relative to `root` where they lie below it.
    labels: (N,) true classes; -1 where nobody has them.
    predicted, confidence: head -> (N,) class, and its probability in [0, 1].
    """

    root: Path
    images: list[str]
    labels: np.ndarray
    classnames: list[str]
    predicted: dict[str, np.ndarray]
    confidence: dict[str, np.ndarray]

    @property
    def labelled(self) -> bool:
        return bool((self.labels >= 0).all())


@dataclass
class Method:
    """One row of a table: a trainer with a config.

    title: what the row is called.
    runs: data set -> seed -> content of result.json, with its `path`.
    """

    trainer: str
    config: str
    title: str
    runs: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)


@dataclass
class Collection:
    """Results that may stand in one table.

    datasets: columns. methods: rows, in order. templates: data set -> template. faults: a line for everything that
    was left out or is incomplete.
    """

    datasets: list[str]
    methods: list[Method]
    backbone: str
    split_family: str
    templates: dict[str, str]
    faults: list[str]


@dataclass(frozen=True)
class Difference:
    """How much more a method gets right than a baseline.

    points: difference of the two accuracies, in percentage points. low, high: its 95 % interval. seeds: the common
    ones. images: number of test images.
    """

    points: float
    low: float
    high: float
    seeds: list[int]
    images: int


# Reading


def read_results(output: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Every whole result below a folder, each with its `path`, and a line for everything that is wrong there.

    Links to folders are not followed.
    """
    results, faults = [], []

    def unreadable(error: OSError) -> None:
        faults.append(f"{error.filename} cannot be read: {error.strerror}")

    for folder, folders, files in os.walk(output, onerror=unreadable):
        folders.sort()
        path = Path(folder) / "result.json"
        if path.name in files:
            try:
                result = _read_json(path)
            except UserError as error:
                faults.append(str(error))
                continue
            except FileNotFoundError:  # removed since the folder was listed
                continue
            fault = _fault(result)
            if fault:
                faults.append(f"{path} is no result of ours: {fault}")
            else:
                results.append({**result, "path": path})
        elif "settings.json" in files and re.fullmatch(r"seed\d+", path.parent.name):
            faults.append(f"{path.parent} holds an unfinished run; run the same command again to finish it")
    return results, [" ".join(fault.split()) for fault in faults]


def _read_json(path: Path) -> Any:
    """The content of a file; FileNotFoundError passes, everything else is a UserError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if path.is_symlink():
            raise UserError(f"{path} cannot be read: it links to nothing") from None
        raise
    except RecursionError as error:
        raise UserError(f"{path} cannot be read: it is nested too deeply") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _fault(result: Any) -> str | None:
    """Why the content of a result.json cannot be reported; None where it can."""
    if not isinstance(result, dict):
        return "it is no mapping"
    missing = [key for key in NEEDED if key not in result]
    if missing:
        return f"it has no {missing[0]}"
    for key in TEXTS:
        if not _is_line(result[key]):
            return f"its {key} is no line of text"
    heads, curve, provenance = result["heads"], result.get("by_lambda") or [], result.get("provenance") or {}
    if not isinstance(result["seed"], int) or isinstance(result["seed"], bool):
        return "its seed is no whole number"
    if not isinstance(heads, dict) or not all(map(_is_head, heads.values())):
        return "its heads hold no accuracy in percent"
    if result["headline"] not in heads:
        return f"it has no head {result['headline']}"
    if not _are_label_figures(result["pseudo_labels"]):
        return "its pseudo_labels hold no accuracy in percent"
    rounds = result.get("rounds") or []
    if not isinstance(rounds, list) or not all(map(_are_label_figures, rounds)):
        return "its rounds hold no accuracy in percent"
    if not isinstance(curve, list) or not all(map(_is_point, curve)):
        return "its by_lambda holds no pairs of lambda and percent"
    if not isinstance(provenance, dict) or not isinstance(provenance.get("settings") or {}, dict):
        return "its provenance holds no settings"
    return None


def _is_line(value: Any) -> bool:
    """Text that cannot break a table or a terminal: no control characters, no half of a surrogate pair."""
    return isinstance(value, str) and not re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", value)


def _is_number(value: Any, most: float = LARGE) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= most  # NaN is not


def _is_head(head: Any) -> bool:
    if not isinstance(head, dict) or "accuracy" not in head:
        return False
    by_class = head.get("per_class") or {}
    return (
        all(head.get(key) is None or _is_number(head[key], 100) for key in ("accuracy", "macro_f1"))  # None: no labels
        and isinstance(by_class, dict)
        and all(_is_number(value, 100) for value in by_class.values())
    )


def _are_label_figures(figures: Any) -> bool:
    if not isinstance(figures, dict) or "accuracy" not in figures:
        return False
    most = {"selected": LARGE, "coverage": 100, "accuracy": 100, "candidates": LARGE, "candidate_recall": 100}
    return all(figures.get(key) is None or _is_number(figures[key], limit) for key, limit in most.items())


def _is_point(point: Any) -> bool:
    return isinstance(point, list) and len(point) == 2 and _is_number(point[0]) and _is_number(point[1], 100)


def load_predictions(result: dict[str, Any]) -> Predictions | None:
    """What the heads of a run said of every test image; None where the run has no predictions.json.

    Args:
        result: a result with its `path`, as `read_results` gives it.

    Raises:
        UserError: the file is damaged, or does not fit the result.
    """
    path = result["path"].parent / "predictions.json"
    try:
        predictions = _as_predictions(_read_json(path))
    except FileNotFoundError:
        return None
    except KeyError as error:
        raise UserError(f"{path} is damaged: it has no {error.args[0]}") from error
    except (AttributeError, OverflowError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: {' '.join(str(error).split())}") from error
    for head, figures in result["heads"].items():
        if head not in predictions.predicted:
            raise UserError(f"{path} does not fit the result beside it: it has no {head} head")
        if predictions.labelled == (figures["accuracy"] is None):
            raise UserError(f"{path} does not fit the result beside it: only one of them knows test labels")
        if not predictions.labelled:
            continue
        accuracy = 100.0 * float(np.mean(predictions.predicted[head] == predictions.labels))
        # One image is allowed: two classes may have the same score, and each figure was made from an argmax of its own.
        if abs(accuracy - figures["accuracy"]) > 100.0 / len(predictions.labels) + 1e-6:
            raise UserError(
                f"{path} does not fit the result beside it: its {head} head is right on {accuracy:.1f} % of the "
                f"images, the result says {figures['accuracy']:.1f} %"
            )
    return predictions


def _as_predictions(data: Any) -> Predictions:
    """Raises KeyError, TypeError, ValueError, ... where the content of a predictions.json is not what it must be."""
    if not isinstance(data, dict):
        raise ValueError("it is no mapping")
    root, images, names, heads = data["root"], data["images"], data["classnames"], data["heads"]
    if not isinstance(root, str) or not isinstance(heads, dict):
        raise ValueError("its root is no text, or its heads are no mapping")
    for kind, values in (("images", images), ("classnames", names)):
        if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
            raise ValueError(f"its {kind} are no list of names")
    classes = partial(_column, size=len(images), most=len(names) - 1, kinds="i")
    shares = partial(_column, size=len(images), most=1, kinds="if")
    return Predictions(
        root=Path(root),
        images=images,
        labels=np.full(len(images), -1) if data["labels"] is None else classes("labels", data["labels"]),
        classnames=names,
        predicted={name: classes(f"{name} predictions", head["predicted"]) for name, head in heads.items()},
        confidence={name: shares(f"{name} confidences", head["confidence"]) for name, head in heads.items()},
    )


def _column(name: str, values: Any, *, size: int, most: float, kinds: str) -> np.ndarray:
    """(size,) values in [0, most] of one of the kinds of numpy's dtypes."""
    column = np.asarray(values)
    if column.shape != (size,) or column.dtype.kind not in kinds or not ((column >= 0) & (column <= most)).all():
        raise ValueError(f"its {name} are not {size} numbers from 0 to {most}")
    return column


# What belongs into one table


def collect(
    output: Path,
    *,
    datasets: Sequence[str] = (),
    methods: Sequence[str] = (),
    backbone: str | None = None,
    split_family: str | None = None,
    rows: Mapping[Cell, str] | None = None,
) -> Collection:
    """The results below a folder that may stand in one table.

    Rows stand in the order of methods.json, then the others: the trainers' own order, configs with their numbers
    sorted as numbers.

    Args:
        output: the scripts' OUTPUT, or a folder in it.
        datasets: names of the columns, in order; empty is all of them, sorted.
        methods: titles of rows; empty is all of them.
        backbone, split_family: only results with these; None where all have the same.
        rows: (trainer, config) -> title, empty where it has none of its own: only these rows, in this order.

    Raises:
        UserError: nothing to report, an unknown name, or results that cannot be compared with each other.
    """
    results, faults = read_results(output)
    if not results:
        raise UserError(_nothing(output, faults))
    results = _choose(results, "dataset", "data set", datasets)
    results = _choose(results, "backbone", "backbone", [backbone] if backbone else [])
    results = _choose(results, "split_family", "split family", [split_family] if split_family else [])
    titles, more = _titles(results, rows)
    faults += more
    for title in methods:
        if title not in titles.values():
            raise unknown("method", title, titles.values())
    shown = {cell: Method(*cell, title) for cell, title in titles.items() if not methods or title in methods}
    results = [r for r in results if (r["trainer"], r["config"]) in shown]
    results, more = _unambiguous(results)
    faults += more
    if not results:
        raise UserError(_nothing(output, faults))
    collection = Collection(
        datasets=[name for name in dict.fromkeys(datasets or sorted({r["dataset"] for r in results}))
                  if any(r["dataset"] == name for r in results)],
        methods=[],
        backbone=_same(results, "backbone", "backbones", "--backbone NAME"),
        split_family=_same(results, "split_family", "split families", "--split-family NAME"),
        templates={},
        faults=faults,
    )  # fmt: skip
    for name in collection.datasets:
        columns = [r for r in results if r["dataset"] == name]
        collection.templates[name] = _same(columns, "template", f"templates of {name}", "--method TITLE ...")
    for result in sorted(results, key=lambda r: r["seed"]):
        runs = shown[result["trainer"], result["config"]].runs
        runs.setdefault(result["dataset"], {})[result["seed"]] = result
    collection.methods = [method for method in shown.values() if method.runs]
    faults += _missing_seeds(collection)
    return collection


def _nothing(output: Path, faults: Sequence[str]) -> str:
    if not os.path.isdir(output):
        return f"no results in {output}; there is no such folder"
    return f"no results in {output}" + (f"; left out: {len(faults)}, the first: {faults[0]}" if faults else "")


def _choose(results: list[dict[str, Any]], key: str, kind: str, wanted: Sequence[str]) -> list[dict[str, Any]]:
    """The results whose key is one of the wanted values; all where none is wanted."""
    known = {result[key] for result in results}
    for name in wanted:
        if name not in known:
            raise unknown(kind, name, known)
    return [result for result in results if result[key] in wanted or not wanted]


def _titles(
    results: Sequence[Mapping[str, Any]], rows: Mapping[Cell, str] | None
) -> tuple[dict[Cell, str], list[str]]:
    """What every row is called, in the order of the table; and what is wrong there. See `collect` for `rows`."""
    names, faults = _named_rows(results)
    cells = {(r["trainer"], r["config"]) for r in results}
    order = sorted(cells, key=lambda cell: (_place(names, cell), *_natural(cell)))
    if rows is not None:
        faults += [f"no result of {title or _plain_title(cell)}" for cell, title in rows.items() if cell not in cells]
        order = [cell for cell in rows if cell in cells]
        names |= {cell: title for cell, title in rows.items() if title}
    return _distinct({cell: names.get(cell) or _plain_title(cell) for cell in order}), faults


def _named_rows(results: Iterable[Mapping[str, Any]]) -> tuple[dict[Cell, str], list[str]]:
    """Titles of rows, in order, from the methods.json of every data set's folder; and what is wrong with these."""
    titles: dict[Cell, str] = {}
    faults = []
    # <dataset>/<trainer>/<config>/seed<k>/result.json
    for folder in sorted({folder for r in results for folder in r["path"].absolute().parents[3:4]}):
        path = folder / "methods.json"
        try:
            entries = _read_json(path)
        except FileNotFoundError:
            continue
        except UserError as error:
            faults.append(f"{' '.join(str(error).split())}; rows have plain names")
            continue
        if not isinstance(entries, list) or not all(map(_is_entry, entries)):
            faults.append(f"{path} is no list of trainer, config and title; rows have plain names")
            continue
        for entry in entries:
            titles.setdefault((entry["trainer"], entry["config"]), entry["title"].strip())
    return titles, faults


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and all(_is_line(entry.get(key)) for key in ("trainer", "config", "title"))


def _place(names: Mapping[Cell, str], cell: Cell) -> int:
    """Where methods.json puts a row; behind all of these where it does not name it."""
    return list(names).index(cell) if cell in names else len(names)


def _natural(cell: Cell) -> tuple[int, str, list[tuple[int, str]]]:
    """A sort key: trainers in their usual order, then configs with 4 before 16."""
    trainer, config = cell
    rank = TRAINERS.index(trainer) if trainer in TRAINERS else len(TRAINERS)
    parts = re.split(r"([0-9]+)", config)  # every second part is a number
    return rank, trainer, [(len(part.lstrip("0")) if i % 2 else 0, part) for i, part in enumerate(parts)]


def _plain_title(cell: Cell) -> str:
    return f"{cell[0]} ({cell[1]})"


def _distinct(titles: dict[Cell, str]) -> dict[Cell, str]:
    """Titles that several rows have are told apart by trainer and config."""
    counts = Counter(titles.values())
    return {cell: title if counts[title] == 1 else f"{title}: {_plain_title(cell)}" for cell, title in titles.items()}


def _same(results: Sequence[Mapping[str, Any]], key: str, kinds: str, option: str) -> str:
    """The value that all results have.

    Raises:
        UserError: they have several; the message says which, and how to choose one.
    """
    groups: dict[str, list[Path]] = defaultdict(list)
    for result in results:
        groups[result[key]].append(result["path"])
    if len(groups) > 1:
        parts = [f'"{value}" ({len(paths)} results, one of them {paths[0]})' for value, paths in sorted(groups.items())]
        some = " and ".join(parts[:3]) + (" and others" if len(parts) > 3 else "")
        raise UserError(f"results with different {kinds} cannot stand in one table: {some}; "
                        f"choose one with `air report OUTPUT {option}`")  # fmt: skip
    return next(iter(groups))


def _unambiguous(results: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """The results less those that claim to be the same run, and a line for each of the latter."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for r in results:
        groups[r["dataset"], r["trainer"], r["config"], r["seed"], r["backbone"], r["split_family"]].append(r)
    faults = [
        f"{key[0]}: {len(group)} results claim to be seed {key[3]} of {_plain_title(key[1:3])}, all are left out: "
        f"{', '.join(str(r['path']) for r in group)}"
        for key, group in groups.items() if len(group) > 1
    ]  # fmt: skip
    return [group[0] for group in groups.values() if len(group) == 1], faults


def _missing_seeds(collection: Collection) -> list[str]:
    """A line for every method that lacks a seed which others have on the same data set."""
    faults = []
    for dataset in collection.datasets:
        methods = [method for method in collection.methods if dataset in method.runs]
        seeds = {seed for method in methods for seed in method.runs[dataset]}
        for method in methods:
            missing = sorted(seeds - method.runs[dataset].keys())
            if missing:
                numbers = f"seed{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}"
                faults.append(f"{dataset}: {method.title} lacks {numbers}, which other methods have")
    return faults


# Statistics


def accuracies(method: Method, dataset: str, *, head: str | None = None) -> list[float]:
    """Test accuracy in percent, a seed each, of one head or, by default, of each run's headline head.

    Runs that have no such head, or no test labels, are left out.
    """
    runs = [run for _, run in sorted(method.runs.get(dataset, {}).items())]
    heads = [run["heads"].get(head or run["headline"]) for run in runs]
    return [found["accuracy"] for found in heads if found and found["accuracy"] is not None]


def is_unknown(method: Method, dataset: str, *, head: str | None = None) -> bool:
    """Whether there are runs with such a head (by default: the headline head), and none of them had test labels."""
    runs = method.runs.get(dataset, {}).values()
    heads = [run["heads"].get(head or run["headline"]) for run in runs]
    return any(heads) and all(found["accuracy"] is None for found in heads if found)


def summary(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean of one or more values, and their standard deviation (n - 1 below); None for a single value."""
    return mean(values), stdev(values) if len(values) > 1 else None


def interval(values: Sequence[float]) -> float | None:
    """Half the width of the 95 % interval of the mean (Student's t); None for a single value."""
    from scipy.stats import t

    if len(values) < 2:
        return None
    return float(t.ppf(0.975, len(values) - 1)) * stdev(values) / sqrt(len(values))


def paired_difference(
    method: Method,
    baseline: Method,
    dataset: str,
    *,
    resamples: int = 10_000,
    seed: int = 0,
    reasons: list[str] | None = None,
) -> Difference | None:
    """Headline accuracy of a method less that of a baseline, image by image over their common seeds.

    The interval is the 95 % percentile interval of a bootstrap over test images (Efron and Tibshirani 1993): images
    are resampled, seeds are not. The same call gives the same interval.

    Args:
        method, baseline: what is compared.
        dataset: on which data set.
        resamples: number of bootstrap samples.
        seed: of the resampling.
        reasons: where there is no difference, a line that says why is added here.

    Returns:
        None where no seed is common, predictions are missing or damaged, or the images or labels differ.
    """
    from scipy.stats import bootstrap

    if is_unknown(method, dataset) or is_unknown(baseline, dataset):
        return None  # the report says so of the whole data set
    try:
        values, seeds = image_differences(method, baseline, dataset)
    except UserError as error:
        if reasons is not None:
            reasons.append(f"{dataset}: no difference of {method.title} to {baseline.title}: {error}")
        return None
    low = high = points = float(values.mean())
    if len(values) > 1:
        low, high = bootstrap(
            (values,), np.mean, n_resamples=resamples, batch=max(1, BOOTSTRAP_CELLS // len(values)), vectorized=True,
            confidence_level=0.95, method="percentile", rng=np.random.default_rng(seed),
        ).confidence_interval  # fmt: skip
    return Difference(100.0 * points, 100.0 * float(low), 100.0 * float(high), seeds, len(values))


def image_differences(method: Method, baseline: Method, dataset: str) -> tuple[np.ndarray, list[int]]:
    """(N,) per test image: the share of common seeds on which the method is right, less that of the baseline.

    Values lie in [-1, 1]; the common seeds come second.

    Raises:
        UserError: no seed is common, predictions are missing or damaged, or the images or labels differ.
    """
    seeds = sorted(method.runs.get(dataset, {}).keys() & baseline.runs.get(dataset, {}).keys())
    if not seeds:
        raise UserError("they have no seed in common")
    first: Predictions | None = None
    total = np.zeros(0)
    for seed in seeds:
        for run, sign in ((method.runs[dataset][seed], 1.0), (baseline.runs[dataset][seed], -1.0)):
            said = load_predictions(run)
            if said is None:
                raise UserError(f"{run['path'].parent} has no predictions.json")
            if not said.labelled:
                raise UserError("there are no test labels")
            if first is None:
                first, origin, total = said, run["path"].parent, np.zeros(len(said.labels))
            if said.images != first.images or not np.array_equal(said.labels, first.labels):
                raise UserError(f"{origin} and {run['path'].parent} were not tested on the same images and labels")
            total += sign * (said.predicted[run["headline"]] == said.labels)
    return total / len(seeds), seeds
