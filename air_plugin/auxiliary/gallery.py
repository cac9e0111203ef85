"""One picture of the generated images, which of them were kept, and what the real images look like."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from air_plugin.auxiliary.stages import Prototypes
from air_plugin.clip.zero_shot import UnlabelledImages
from air_plugin.utils.files import write_atomically
from air_plugin.utils.images import load_rgb
from air_plugin.utils.plotting import plain_text, writable_text

KEPT, DROPPED, REAL, CLASSES = 8, 4, 6, 20
SIDE, GAP, DOTS = 64, 4, 110  # of an image and between two, in pixels; pixels an inch


def plot_gallery(
    prototypes: Prototypes,
    classnames: Sequence[str],
    unlabelled: UnlabelledImages,
    target: Path,
    *,
    source: str = "generated",
) -> None:
    """Write the gallery: a row a class; kept images nearest to the mean first, dropped ones as they were generated.

    The real images are unlabelled ones, the most confident of each zero-shot class: a wrong one may stand among them.

    Args:
        prototypes: images and which of them were kept.
        classnames: C names, plain text; the first 20 are shown.
        unlabelled: N images and their zero-shot probabilities.
        target: the PNG file.
        source: what the prototypes' images are.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = min(len(classnames), CLASSES)
    names = [writable_text(name) for name in classnames[:rows]]
    sheet = Image.new("RGB", (_left(KEPT + DROPPED + REAL + 2) - GAP, rows * (SIDE + GAP) - GAP), "white")
    for row in range(rows):
        for column, path in _row(prototypes, row, unlabelled.paths, unlabelled.probs[:, row]).items():
            sheet.paste(load_rgb(path).resize((SIDE, SIDE)), (_left(column), row * (SIDE + GAP)))
    inches, buffer = [size / DOTS for size in sheet.size], io.BytesIO()
    with plain_text(names):
        figure = Figure(figsize=(inches[0] + 1.5, inches[1] + 0.5), dpi=DOTS, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()  # one for all images: one for each takes longer than plotting the images
        axes.imshow(sheet)
        axes.spines[:].set_visible(False)
        axes.set_xticks([])
        axes.set_yticks([row * (SIDE + GAP) + SIDE / 2 for row in range(rows)], names)
        axes.tick_params(length=0)
        for column, head in ((0, f"{source}, kept"), (KEPT + 1, "dropped"), (KEPT + DROPPED + 2, "real, unlabelled")):
            axes.text(_left(column), -GAP, head)
        figure.savefig(buffer, format="png")
    write_atomically(target, buffer.getvalue())


def _left(column: int) -> int:
    """Where a column of the sheet begins, in pixels; KEPT and KEPT + DROPPED + 1 are narrow and hold no image."""
    narrow = (column > KEPT) + (column > KEPT + DROPPED + 1)
    return (column - narrow) * (SIDE + GAP) + narrow * SIDE // 3


def _row(prototypes: Prototypes, row: int, paths: Sequence[str], confidence: Tensor) -> dict[int, str | Path]:
    """Column -> image of one class."""
    images, kept = prototypes.images[row], prototypes.kept[row].tolist()
    dropped = [image for number, image in enumerate(images) if number not in kept]
    real = [paths[i] for i in confidence.argsort(descending=True, stable=True)[:REAL].tolist()]
    cells: dict[int, str | Path] = dict(enumerate(images[number] for number in kept[:KEPT]))
    cells |= {KEPT + 1 + i: path for i, path in enumerate(dropped[:DROPPED])}
    cells |= {KEPT + DROPPED + 2 + i: path for i, path in enumerate(real)}
    return cells
