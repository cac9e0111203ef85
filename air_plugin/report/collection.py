"""Which results may share a table, and the order of its rows."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from air_plugin.report.record import USUAL_CLASS_NAMES, RunResult
from air_plugin.report.results import read_results
from air_plugin.report.schema import is_line, read_json
from air_plugin.report.titles import Cell, plain_title, short_titles
from air_plugin.utils.errors import UserError, unknown

TRAINERS = (
    "ZeroshotCLIP",
    "CoOp",
    "UPL",
    "GRIP",
    "CPL",
    "ZeroshotAiR",
    "AiR",
)  # order of the rows that no methods.json names

# Kinds of `Provenance.inputs` that all results of a data set, or all seeds of a row, must share.
DATA = {"images": "images", "lists": "lists of images and labels", "class_names": "class names"}
MODELS = {
    "generator": "weights of the generator",
    "auxiliary_backbone": "weights of AIR.BACKBONE",
    "initial": "weights of MODEL.INIT_WEIGHTS",
}


@dataclass
class Method:
    """One row of a table: a trainer with a config.

    title: the name of the row. runs: data set -> seed -> result.
    """

    trainer: str
    config: str
    title: str
    runs: dict[str, dict[int, RunResult]] = field(default_factory=dict)

    @property
    def cell(self) -> Cell:
        """What tells a method from the others."""
        return self.trainer, self.config

    def on(self, dataset: str) -> list[RunResult]:
        """The results on a data set by rising seed; none where there are none."""
        return [run for _, run in sorted(self.runs.get(dataset, {}).items())]


@dataclass
class Collection:
    """Results that may stand in one table.

    datasets: columns. methods: rows, in order. templates: data set -> template. faults: a line for everything that
    was left out or is incomplete. class_names: data set -> source of its class names, where it is not the usual one.
    """

    datasets: list[str]
    methods: list[Method]
    backbone: str
    split_family: str
    paradigm: str
    templates: dict[str, str]
    faults: list[str]
    class_names: dict[str, str] = field(default_factory=dict)


def collect(
    output: Path,
    *,
    datasets: Sequence[str] = (),
    methods: Sequence[str] = (),
    backbone: str | None = None,
    split_family: str | None = None,
    paradigm: str | None = None,
    rows: Mapping[Cell, str] | None = None,
    named: bool = True,
) -> Collection:
    """The results below a folder that may stand in one table.

    Rows stand in the order of methods.json, then the others: the trainers' own order, configs with their numbers
    sorted as numbers.

    Args:
        output: the scripts' OUTPUT, or a folder in it.
        datasets: names of the columns, in order; empty is all of them, sorted.
        methods: titles of rows, or their trainer and config ("AiR (mini)"); empty is all of them.
        backbone, split_family, paradigm: only results with these; None where all have the same.
        rows: (trainer, config) -> title, empty where it has none of its own: only these rows, in this order.
        named: whether rows have the titles of methods.json.

    Raises:
        UserError: nothing to report, an unknown name, or results that cannot be compared with each other.
    """
    results, faults = read_results(output)
    if not results:
        raise UserError(_nothing(output, faults))
    results = _choose(results, "dataset", "data set", datasets)
    results = _choose(results, "backbone", "backbone", [backbone] if backbone else [])
    results = _choose(results, "split_family", "split family", [split_family] if split_family else [])
    results = _choose(results, "paradigm", "paradigm", [paradigm] if paradigm else [])
    titles, name_faults = _titles(results, rows, named=named)
    for name in methods:
        if name not in (*titles.values(), *map(plain_title, titles)):
            raise unknown("method", name, titles.values())
    titles = {cell: title for cell, title in titles.items() if not methods or {title, plain_title(cell)} & {*methods}}
    results, double = _unambiguous([result for result in results if result.row in titles])
    faults += [*name_faults, *double]
    if not results:
        raise UserError(_nothing(output, faults))
    present = {result.dataset for result in results}
    columns = [name for name in dict.fromkeys(datasets or sorted(present)) if name in present]
    collection = _arrange(results, titles, columns)
    collection.faults += [*faults, *_missing_seeds(collection)]
    return collection


def _arrange(results: Sequence[RunResult], titles: Mapping[Cell, str], datasets: list[str]) -> Collection:
    """Results in their rows and columns.

    Raises:
        UserError: they cannot be compared with each other.
    """
    backbone = _same(results, "backbone", "backbones", "--backbone NAME")
    split_family = _same(results, "split_family", "split families", "--split-family NAME")
    paradigm = _same(results, "paradigm", "paradigms", "--paradigm NAME")
    _require_same_inputs(results, "backbone", "weights of the backbone")
    collection = Collection(datasets, [], backbone, split_family, paradigm, templates={}, faults=[])
    for name in datasets:
        column = [result for result in results if result.dataset == name]
        collection.templates[name] = _same(column, "template", f"templates of {name}", "--method TITLE ...")
        source = _same(column, "class_names", f"class names of {name}", "--method TITLE ...")
        if source != USUAL_CLASS_NAMES:
            collection.class_names[name] = source
        for kind, what in DATA.items():
            _require_same_inputs(column, kind, f"{what} of {name}")
        for cell in {result.row for result in column}:
            row = [result for result in column if result.row == cell]
            for kind, what in MODELS.items():
                _require_same_inputs(row, kind, f"{what} of {plain_title(cell)}")
    methods = {cell: Method(*cell, title) for cell, title in titles.items()}
    for result in sorted(results, key=lambda result: result.seed):
        methods[result.row].runs.setdefault(result.dataset, {})[result.seed] = result
    collection.methods = [method for method in methods.values() if method.runs]
    return collection


def _nothing(output: Path, faults: Sequence[str]) -> str:
    if not os.path.isdir(output):
        return f"no results in {output}; there is no such folder"
    return f"no results in {output}" + (f"; left out: {len(faults)}, the first: {faults[0]}" if faults else "")


def _choose(results: list[RunResult], field: str, kind: str, names: Sequence[str]) -> list[RunResult]:
    """The results whose field has one of these values; all results where `names` is empty."""
    existing = {getattr(result, field) for result in results}
    for name in names:
        if name not in existing:
            raise unknown(kind, name, existing)
    return [result for result in results if getattr(result, field) in names or not names]


def _titles(
    results: Sequence[RunResult], rows: Mapping[Cell, str] | None, *, named: bool
) -> tuple[dict[Cell, str], list[str]]:
    """The title of every row, in the order of the table, and a line for each fault. See `collect` for `rows`."""
    names, faults = named_rows(results) if named else ({}, [])
    cells = {result.row for result in results}
    order = sorted(cells, key=lambda cell: (_place(names, cell), *natural(cell)))
    if rows is not None:
        faults += [f"no result of {title or plain_title(cell)}" for cell, title in rows.items() if cell not in cells]
        order = [cell for cell in rows if cell in cells]
        names |= {cell: title for cell, title in rows.items() if title}
    untitled = [result for result in results if result.row in order and not names.get(result.row)]
    names |= short_titles(untitled)
    return _distinct({cell: names[cell] for cell in order}), faults


def named_rows(results: Iterable[RunResult]) -> tuple[dict[Cell, str], list[str]]:
    """Titles of rows, in order, from the methods.json of every data set's folder, and a line for each fault."""
    titles: dict[Cell, str] = {}
    faults = []
    # <dataset>/<trainer>/<config>/seed<k>/result.json
    for folder in sorted({folder for result in results for folder in result.path.absolute().parents[3:4]}):
        path = folder / "methods.json"
        try:
            entries = read_json(path)
        except FileNotFoundError:
            continue
        except UserError as error:
            faults.append(f"{' '.join(str(error).split())}; rows have plain names")
            continue
        if not isinstance(entries, list) or not all(map(_is_entry, entries)):
            faults.append(f"{path} is not a list of trainer, config and title; rows have plain names")
            continue
        for entry in entries:
            titles.setdefault((entry["trainer"], entry["config"]), entry["title"].strip())
    return titles, faults


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and all(is_line(entry.get(key)) for key in ("trainer", "config", "title"))


def _place(names: Mapping[Cell, str], cell: Cell) -> int:
    """Where methods.json puts a row; behind all of these where it does not name it."""
    return list(names).index(cell) if cell in names else len(names)


def natural(cell: Cell) -> tuple[int, str, list[tuple[int, str]]]:
    """A sort key: trainers in their usual order, then configs with 4 before 16."""
    trainer, config = cell
    rank = TRAINERS.index(trainer) if trainer in TRAINERS else len(TRAINERS)
    parts = re.split(r"([0-9]+)", config)  # every second part is a number
    return rank, trainer, [(len(part.lstrip("0")) if i % 2 else 0, part) for i, part in enumerate(parts)]


def _distinct(titles: dict[Cell, str]) -> dict[Cell, str]:
    """Titles that several rows have are told apart by trainer and config."""
    counts = Counter(titles.values())
    return {cell: title if counts[title] == 1 else f"{title}: {plain_title(cell)}" for cell, title in titles.items()}


def _same(results: Sequence[RunResult], field: str, kinds: str, option: str) -> str:
    """The value that all results have.

    Raises:
        UserError: they have several; the message says which, and how to choose one.
    """
    groups: dict[str, list[Path]] = defaultdict(list)
    for result in results:
        groups[getattr(result, field)].append(result.path)
    if len(groups) > 1:
        parts = [f'"{value}" ({len(paths)} results, one of them {paths[0]})' for value, paths in sorted(groups.items())]
        some = " and ".join(parts[:3]) + (" and others" if len(parts) > 3 else "")
        raise UserError(
            f"results with different {kinds} cannot stand in one table: {some}; "
            f"choose one with `air report OUTPUT {option}`"
        )
    return next(iter(groups))


def _require_same_inputs(results: Sequence[RunResult], kind: str, what: str) -> None:
    """Compare what results were made from; those from before this was recorded are taken as equal.

    Raises:
        UserError: a kind of input differs; the message names two of the results.
    """
    groups: dict[str, list[Path]] = defaultdict(list)
    for result in results:
        if kind in result.provenance.inputs:
            groups[result.provenance.inputs[kind]].append(result.path)
    if len(groups) > 1:
        (first, *_), (second, *_) = sorted(sorted(paths) for paths in groups.values())[:2]
        raise UserError(
            f"the {what} differ between {first.parent} and {second.parent}; such results are neither averaged nor put "
            "in one table; move some of them to another folder"
        )


def _unambiguous(results: Sequence[RunResult]) -> tuple[list[RunResult], list[str]]:
    """The results less those that claim to be the same run, and a line for each of the latter."""
    groups: dict[tuple[Any, ...], list[RunResult]] = defaultdict(list)
    for r in results:
        groups[r.dataset, r.trainer, r.config, r.seed, r.backbone, r.split_family, r.paradigm].append(r)
    faults = [
        f"{key[0]}: {len(group)} results claim to be seed {key[3]} of {plain_title(key[1:3])}, all are left out: "
        f"{', '.join(str(r.path) for r in group)}"
        for key, group in groups.items()
        if len(group) > 1
    ]
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
