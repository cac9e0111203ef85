"""One picture of what the generator drew, what was kept of it, and what the real images look like."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from air_plugin.auxiliary import Auxiliary
from air_plugin.images import load_rgb, write_atomically

KEPT, DROPPED, REAL, CLASSES = 8, 4, 6, 20


def draw_gallery(
    auxiliary: Auxiliary,
    classnames: Sequence[str],
    paths: Sequence[str],
    probs: Tensor,
    target: Path,
    *,
    source: str = "generated",
) -> None:
    """Write the gallery: a row a class; kept images nearest to the mean first, dropped ones as they were drawn.

    The real images are unlabelled ones, the most confident of each zero-shot class: a wrong one may stand among them.

    Args:
        auxiliary: images and which of them were kept.
        classnames: C names; the first 20 are drawn.
        paths: N unlabelled images.
        probs: (N, C) their zero-shot probabilities.
        target: the PNG file.
        source: what the auxiliary classifier's images are.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = min(len(classnames), CLASSES)
    columns = KEPT + DROPPED + REAL
    figure = Figure(figsize=(0.62 * (columns + 2.5), 0.62 * (rows + 1.2)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(rows, columns + 2, width_ratios=[1] * KEPT + [0.4] + [1] * DROPPED + [0.4] + [1] * REAL)
    heads = {0: f"{source}, kept", KEPT + 1: "dropped", KEPT + DROPPED + 2: "real, unlabelled"}
    for row in range(rows):
        cells = _row(auxiliary, row, paths, probs[:, row])
        for column, path in cells.items():
            axes = figure.add_subplot(grid[row, column])
            axes.imshow(load_rgb(path).resize((96, 96)))
            axes.set_xticks([])
            axes.set_yticks([])
            if column == 0:
                axes.set_ylabel(classnames[row], rotation=0, ha="right", va="center")
            if row == 0 and column in heads:
                axes.set_title(heads[column], loc="left", fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomically(target, buffer.getvalue())


def _row(auxiliary: Auxiliary, row: int, paths: Sequence[str], confidence: Tensor) -> dict[int, str | Path]:
    """Column -> image of one class."""
    images, kept = auxiliary.images[row], auxiliary.kept[row].tolist()
    dropped = [image for number, image in enumerate(images) if number not in kept]
    real = [paths[i] for i in confidence.argsort(descending=True, stable=True)[:REAL].tolist()]
    cells: dict[int, str | Path] = dict(enumerate(images[number] for number in kept[:KEPT]))
    cells |= {KEPT + 1 + i: path for i, path in enumerate(dropped[:DROPPED])}
    cells |= {KEPT + DROPPED + 2 + i: path for i, path in enumerate(real)}
    return cells
