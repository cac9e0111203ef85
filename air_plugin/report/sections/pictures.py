"""Pictures: galleries of synthetic images, and the most confident mistakes."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from air_plugin.report.collection import Cell
from air_plugin.report.predictions import Predictions
from air_plugin.report.sections.confusion import SeedPredictions
from air_plugin.report.sections.view import View
from air_plugin.utils.files import digest
from air_plugin.utils.images import UnreadableImage, load_rgb

MISTAKES = 12
PICTURE, GALLERY, TINY = 160, 1400, 64  # longest sides in pixels


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


def galleries(view: View) -> list[dict[str, Any]]:
    """The synthetic images of the first seed of each method; methods with the same picture share it."""
    found: dict[str, dict[str, Any]] = {}
    for method in view.methods:
        for run in view.runs(method)[:1]:
            path = run.folder / "gallery.png"
            if not os.path.isfile(path):
                continue
            entry = {"titles": [], "seed": run.seed}
            try:
                shared = found.setdefault(digest(path.read_bytes()), entry)
                if shared is entry:
                    entry["image"], entry["width"], entry["height"] = _embedded(path, longest=GALLERY, lossless=False)
            except (OSError, UnreadableImage) as error:
                view.faults.append(f"gallery {path}: {error}")
                continue
            shared["titles"].append(method.title)
    return [entry for entry in found.values() if "image" in entry]


def mistakes(view: View, predictions: Mapping[Cell, SeedPredictions]) -> list[dict[str, Any]]:
    """The wrong predictions of the highest confidence, for the first seed of each method."""
    found = []
    for method in view.methods:
        for seed, (made, name) in [*predictions[method.cell].items()][:1]:
            head = made.heads[name]
            wrong = np.flatnonzero(head.predicted != made.labels)
            most_confident = wrong[np.argsort(-head.confidence[wrong], kind="stable")][:MISTAKES]
            found.append(
                {
                    "title": method.title,
                    "seed": seed,
                    "head": name,
                    "open": method in view.shown,
                    "wrong": len(wrong),
                    "of": len(head.predicted),
                    "images": [_mistake(made, name, i) for i in most_confident],
                }
            )
    return found


def _mistake(predictions: Predictions, head: str, index: int) -> dict[str, Any]:
    if predictions.labels is None:
        raise ValueError("mistakes need test labels")
    name, classes, found = predictions.images[index], predictions.classnames, predictions.heads[head]
    entry = {
        "name": name,
        "predicted": classes[found.predicted[index]],
        "true": classes[predictions.labels[index]],
        "confidence": 100.0 * found.confidence[index],
    }
    try:
        image, width, height = _embedded(Path(predictions.root) / name, longest=PICTURE, lossless=True)
    except UnreadableImage:
        return entry | {"image": None, "tiny": False}
    return entry | {"image": image, "tiny": max(width, height) <= TINY}
