"""The README's picture of the method: python docs/figures/method.py writes docs/method.svg.

The digits in it are cut out of docs/gallery-digits.png, which `bash scripts/air/main.sh digits` makes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch
from PIL import Image

DOCS = Path(__file__).resolve().parents[1]
INK, WORDS, PICTURES, BOTH = "#1f2430", "#dbe7fb", "#fde6cf", "#dcf0dc"
COLUMNS = (10.5, 37.0, 62.5, 88.0, 114.0)
TOP, MIDDLE, BOTTOM = 41.0, 24.5, 8.5
WIDTH, HEIGHT = 20.5, 10.8
CELL, STEP, FIRST_ROW = 67, 71, 20  # of the gallery's images, in pixels
GENERATED, REAL = 60, 957  # left edge of the first image of a kind


def box(axes: Axes, x: float, y: float, title: str, text: str, color: str) -> None:
    """A box around (x, y) with a bold title and lines of text."""
    corner = (x - WIDTH / 2, y - HEIGHT / 2)
    style = "round,pad=0,rounding_size=1.2"
    axes.add_patch(FancyBboxPatch(corner, WIDTH, HEIGHT, boxstyle=style, facecolor=color, edgecolor=INK, linewidth=0.9))
    axes.text(x, y + HEIGHT / 2 - 1.2, title, ha="center", va="top", fontsize=9.5, weight="bold", color=INK)
    axes.text(x, y - 1.6, text, ha="center", va="center", fontsize=8.6, color=INK, linespacing=1.45)


def pictures(axes: Axes, x: float, y: float, title: str, *, left: int, color: str) -> None:
    """A box with two rows of four digits from the gallery."""
    box(axes, x, y, title, "", color)
    gallery = np.asarray(Image.open(DOCS / "gallery-digits.png").convert("RGB"))
    side = 3.1
    for row in range(2):
        for column in range(4):
            top, start = FIRST_ROW + STEP * (2 * column + row + 1), left + STEP * (2 * row + column % 3)
            cell = gallery[top : top + CELL, start : start + CELL]
            corner_x = x + (column - 2) * (side + 0.35) + 0.18
            corner_y = y + 2.2 - (row + 1) * (side + 0.3)
            axes.imshow(cell, extent=(corner_x, corner_x + side, corner_y, corner_y + side), zorder=3, aspect="auto")


def arrow(axes: Axes, *points: tuple[float, float], label: str = "", at: tuple[float, float] | None = None) -> None:
    """A line through points with a head at its end, and a label whose middle is `at`."""
    xs, ys = zip(*points[:-1], strict=True)
    axes.plot(xs, ys, color=INK, linewidth=1.2, solid_capstyle="butt", zorder=2)
    props = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 11}
    axes.annotate("", xy=points[-1], xytext=points[-2], arrowprops=props, zorder=2)
    if at:
        axes.text(*at, label, ha="center", va="center", fontsize=8, color=INK, linespacing=1.3, zorder=4)


def draw() -> plt.Figure:
    """The whole picture."""
    figure, axes = plt.subplots(figsize=(11, 4.3), dpi=100)
    figure.subplots_adjust(left=0, right=1, bottom=0, top=1)
    one, two, three, four, five = COLUMNS
    half = WIDTH / 2
    pictures(axes, one, TOP, "unlabelled images", left=REAL, color="white")
    box(axes, two, TOP, "generator + LoRA", "diffusion, adapted to\nunlabelled images", PICTURES)
    pictures(axes, three, TOP, "M images a class", left=GENERATED, color=PICTURES)
    box(axes, four, TOP, "auxiliary classifier", "the K most typical:\nprototypes of a class", PICTURES)
    box(axes, two, MIDDLE, "CLIP image encoder", "frozen; image\nfeatures $f$", "white")
    box(axes, four, MIDDLE, "fusion", "$p^* = p + \\lambda\\,\\hat{p}$\nalso classifies at test", BOTH)
    box(axes, five, MIDDLE, "pseudo-labels", "of the most confident\nimages of each class", BOTH)
    box(axes, one, BOTTOM, "class names", "“a photo of the\ndigit zero.”", "white")
    box(axes, two, BOTTOM, "CLIP text encoder", "frozen, but for a\nlearned context", WORDS)
    box(axes, three, BOTTOM, "text classifier", "$p$: softmax over cosines\nof image and text", WORDS)
    box(
        axes, five, BOTTOM, "prompt training", "$L = L_r + \\beta\\,L_s$\n$L_s$: generated images,\nor two views", WORDS
    )

    edge = HEIGHT / 2
    arrow(axes, (one + half, TOP), (two - half, TOP), label="zero-\nshot\ncaptions", at=((one + two) / 2, TOP + 3.4))
    arrow(axes, (two + half, TOP), (three - half, TOP))
    arrow(axes, (three + half, TOP), (four - half, TOP))
    arrow(axes, (one, TOP - edge), (one, MIDDLE), (two - half, MIDDLE))
    turn = (three + four) / 2
    arrow(axes, (two + half, MIDDLE), (turn, MIDDLE), (turn, TOP - 3), (four - half, TOP - 3))
    arrow(axes, (three, MIDDLE), (three, BOTTOM + edge), label="$f$", at=(three + 1.5, MIDDLE + 1.6))
    arrow(axes, (four, TOP - edge), (four, MIDDLE + edge), label="$\\hat{p}$", at=(four + 1.6, (TOP + MIDDLE) / 2))
    arrow(axes, (three + half, BOTTOM), (four, BOTTOM), (four, MIDDLE - edge), label="$p$", at=(four - 3, BOTTOM + 1.5))
    arrow(axes, (one + half, BOTTOM), (two - half, BOTTOM))
    arrow(axes, (two + half, BOTTOM), (three - half, BOTTOM))
    arrow(axes, (four + half, MIDDLE), (five - half, MIDDLE), label="$p^*$", at=((four + five) / 2 - 0.3, MIDDLE + 1.6))
    arrow(axes, (five, MIDDLE - edge), (five, BOTTOM + edge))
    low = BOTTOM - edge - 1.8
    arrow(axes, (five, BOTTOM - edge), (five, low), (two, low), (two, BOTTOM - edge))
    axes.text(four, low + 1.2, "updates the context alone", ha="center", fontsize=8, color=INK)
    for line, (color, meaning) in enumerate(((PICTURES, "from images"), (WORDS, "from words"), (BOTH, "from both"))):
        y = TOP + 3 - 3.2 * line
        axes.add_patch(
            FancyBboxPatch((five - 7, y - 0.9), 2.6, 1.8, boxstyle="round,pad=0", facecolor=color, edgecolor=INK)
        )
        axes.text(five - 3, y, meaning, va="center", fontsize=8.6, color=INK)
    axes.set(xlim=(-0.5, 125), ylim=(-0.6, 47.8))
    axes.axis("off")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=DOCS / "method.svg", help="an .svg or .png file")
    out = parser.parse_args().out
    matplotlib.rcParams["svg.hashsalt"] = "air"  # the same file at each run
    metadata = {"Date": None} if out.suffix == ".svg" else {}
    draw().savefig(out, facecolor="white", dpi=150, metadata=metadata)


if __name__ == "__main__":
    main()
