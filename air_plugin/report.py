"""From result.json files to a table."""

from __future__ import annotations

import json
import shutil
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

NEEDED = ("trainer", "dataset", "config", "backbone", "split_family", "template", "seed", "heads", "headline",
          "pseudo_labels")  # fmt: skip


def read_results(output: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Every whole result below a folder, each with its `path`, and what is wrong with the others."""
    results, faults = [], []
    for path in sorted(output.rglob("result.json")):
        try:
            result = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            faults.append(f"{path} cannot be read: {error}")
            continue
        fault = _fault(result)
        if fault:
            faults.append(f"{path} is no result of ours: {fault}")
        else:
            results.append({**result, "path": path})
    return results, faults


def _fault(result: Any) -> str | None:
    """Why the content of a result.json cannot be reported; None where it can."""
    if not isinstance(result, dict):
        return "it is no mapping"
    missing = [key for key in NEEDED if key not in result]
    if missing:
        return f"it has no {missing[0]}"
    try:
        numbers = [result["seed"], *(head["accuracy"] for head in result["heads"].values())]
        labels = result["pseudo_labels"]["accuracy"]
    except (AttributeError, KeyError, TypeError):
        return "its heads or pseudo_labels hold no accuracy"
    if not all(isinstance(value, (int, float)) for value in [*numbers, 0 if labels is None else labels]):
        return "its seed or an accuracy is no number"
    return None if result["headline"] in result["heads"] else f"it has no head {result['headline']}"


def table(results: list[dict[str, Any]], *, tablefmt: str = "github") -> str:
    """A row a trainer and config: mean and standard deviation over seeds, in percent, of every head's test accuracy."""
    from tabulate import tabulate

    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        groups[result["dataset"], result["trainer"], result["config"]].append(result)
    order = {"ZeroshotCLIP": 0, "CPL": 1}
    rows = []
    for key in sorted(groups, key=lambda key: (key[0], order.get(key[1], 9), key)):
        (dataset, trainer, config), group = key, groups[key]
        labels = [r["pseudo_labels"]["accuracy"] for r in group if r["pseudo_labels"]["accuracy"] is not None]
        rows.append([
            dataset, f"{trainer} ({config})", group[0]["headline"],
            _spread([r["heads"][r["headline"]]["accuracy"] for r in group]),
            *(_spread([r["heads"][h]["accuracy"] for r in group if h in r["heads"]]) for h in ("text", "fused")),
            _spread(labels), " ".join(str(s) for s in sorted(r["seed"] for r in group)),
        ])  # fmt: skip
    headers = ["data set", "method (config)", "headline", "accuracy", "text head", "fused head", "pseudo-labels",
               "seeds"]  # fmt: skip
    settings = sorted({(r["dataset"], r["backbone"], r["split_family"], r["template"]) for r in results})
    notes = [f"{d}: backbone {b}, split family {s}, template \"{t}\"" for d, b, s, t in settings]
    return "\n".join([*notes, "", tabulate(rows, headers=headers, tablefmt=tablefmt, disable_numparse=True)])


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    return f"{mean(values):.1f} +- {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def place_gallery(results: list[dict[str, Any]], output: Path) -> list[Path]:
    """Copy the first gallery of each data set to `<output>/<dataset folder>/gallery.png`."""
    placed: dict[Path, Path] = {}
    for result in results:
        source = result["path"].parent / "gallery.png"
        relative = result["path"].relative_to(output).parts
        target = output / relative[0] / "gallery.png"
        if len(relative) == 5 and source.is_file() and target not in placed:
            placed[target] = source
    for target, source in placed.items():
        shutil.copyfile(source, target)
    return list(placed)


def report(output: Path, *, only: str | None = None) -> int:
    """Print the table of a folder of results and place its galleries; returns the exit code.

    Args:
        output: the scripts' OUTPUT.
        only: a data set's folder in it; None is all.
    """
    results, faults = read_results(output / only if only else output)
    for fault in faults:
        print(f"warning: {fault}")
    if not results:
        print(f"error: no results in {output}", file=sys.stderr)
        return 2
    print(table(results))
    for path in place_gallery(results, output):
        print(f"gallery: {path}")
    return 0
