"""Finished runs, read back from disk: what is whole, and what is wrong with the others."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from air_plugin.former_settings import upgrade
from air_plugin.utils.errors import UserError

TEXTS = ("trainer", "dataset", "config", "backbone", "split_family", "template", "primary")
NEEDED = (*TEXTS, "seed", "heads", "pseudo_labels")
USUAL_WORDING = "coop"  # DATASET.CLASS_NAMES of results from before there were two
LARGE = 1e12  # no count and no lambda is larger, and every plot can hold it


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


def read_results(output: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Every whole result below a folder, each with its `path` and `wording`, and a line for everything that is wrong.

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
                result = read_json(path)
            except UserError as error:
                faults.append(str(error))
                continue
            except FileNotFoundError:  # removed since the folder was listed
                continue
            fault = _fault(result)
            if fault:
                faults.append(f"{path} is no result of ours: {fault}")
            else:
                results.append({**result, "path": path, "wording": _wording(result)})
        elif "settings.json" in files and re.fullmatch(r"seed\d+", path.parent.name):
            faults.append(f"{path.parent} holds an unfinished run; run the same command again to finish it")
    return results, [" ".join(fault.split()) for fault in faults]


def read_json(path: Path) -> Any:
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
        if not is_line(result[key]):
            return f"its {key} is no line of text"
    heads, curve, provenance = result["heads"], result.get("by_lambda") or [], result.get("provenance") or {}
    if not isinstance(result["seed"], int) or isinstance(result["seed"], bool):
        return "its seed is no whole number"
    if not isinstance(heads, dict) or not all(map(_is_head, heads.values())):
        return "its heads hold no accuracy in percent"
    if result["primary"] not in heads:
        return f"it has no head {result['primary']}"
    if not _are_label_figures(result["pseudo_labels"]):
        return "its pseudo_labels hold no accuracy in percent"
    rounds = result.get("rounds") or []
    if not isinstance(rounds, list) or not all(map(_are_label_figures, rounds)):
        return "its rounds hold no accuracy in percent"
    if not isinstance(curve, list) or not all(map(_is_point, curve)):
        return "its by_lambda holds no pairs of lambda and percent"
    auxiliary, stages = result.get("auxiliary") or [], result.get("stages") or []
    if not isinstance(auxiliary, list) or not all(map(_is_round, auxiliary)):
        return "its auxiliary holds no lambda and figures of each round"
    if result.get("beta") is not None and not is_number(result["beta"]):
        return "its beta is no number"
    if not isinstance(stages, list) or not all(map(_is_stage, stages)):
        return "its stages hold no names and seconds"
    if not isinstance(provenance, dict) or not isinstance(provenance.get("settings") or {}, dict):
        return "its provenance holds no settings"
    if not is_line(_wording(result)):
        return "its DATASET.CLASS_NAMES is no line of text"
    return None


def _wording(result: Mapping[str, Any]) -> Any:
    """Whose class names (DATASET.CLASS_NAMES), which is a setting of the run alone."""
    return upgrade(settings_of(result)).get("DATASET.CLASS_NAMES", USUAL_WORDING)


def settings_of(run: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting of a run by its full key; empty where the result does not hold them."""
    return (run.get("provenance") or {}).get("settings") or {}


def is_line(value: Any) -> bool:
    """Text that cannot break a table or a terminal: no control characters, no half of a surrogate pair."""
    return isinstance(value, str) and not re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", value)


def is_number(value: Any, most: float = LARGE) -> bool:
    """A finite number from 0 to `most`."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= most  # NaN is not


def _is_head(head: Any) -> bool:
    if not isinstance(head, dict) or "accuracy" not in head:
        return False
    by_class = head.get("per_class") or {}
    return (
        all(head.get(key) is None or is_number(head[key], 100) for key in ("accuracy", "macro_f1"))  # None: no labels
        and isinstance(by_class, dict)
        and all(is_number(value, 100) for value in by_class.values())
    )


def _are_label_figures(figures: Any) -> bool:
    if not isinstance(figures, dict) or "accuracy" not in figures:
        return False
    most = {"selected": LARGE, "coverage": 100, "accuracy": 100, "candidates": LARGE, "candidate_recall": 100}
    return all(figures.get(key) is None or is_number(figures[key], limit) for key, limit in most.items())


def _is_point(point: Any) -> bool:
    return isinstance(point, list) and len(point) == 2 and is_number(point[0]) and is_number(point[1], 100)


def _is_round(figures: Any) -> bool:
    """Whether this is what a round of the auxiliary classifier came to (AuxiliaryMixin.figures)."""
    if not isinstance(figures, dict) or not is_number(figures.get("lambda")):
        return False
    most = {"changed": 100, "accuracy": 100, "scale": LARGE, "prior_strength": LARGE, "iterations": LARGE}
    soft_counts = figures.get("soft_counts") or []
    return (
        all(figures.get(key) is None or is_number(figures[key], limit) for key, limit in most.items())
        and isinstance(figures.get("converged", False), bool)
        and isinstance(soft_counts, list)
        and all(map(is_number, soft_counts))
    )


def _is_stage(stage: Any) -> bool:
    return (
        isinstance(stage, dict)
        and is_line(stage.get("name"))
        and is_number(stage.get("seconds"))
        and isinstance(stage.get("cached"), bool)
    )


def load_predictions(result: dict[str, Any]) -> Predictions | None:
    """What the heads of a run said of every test image; None where the run has no predictions.json.

    Args:
        result: a result with its `path`, as `read_results` gives it.

    Raises:
        UserError: the file is damaged, or does not fit the result.
    """
    path = result["path"].parent / "predictions.json"
    try:
        predictions = _as_predictions(read_json(path))
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
