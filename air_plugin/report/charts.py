"""Charts as SVG for the report page, in the page's CSS colours, for light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from math import ceil
from typing import Any

from air_plugin.utils.plotting import plain_text, writable_text

COLOURS = 6  # --c0 .. --c5 in page.html.j2; 0 is grey, for the baseline
MARKERS = ("o", "s", "^", "D", "v", "P")
GLYPHS = ("\u25cf", "\u25a0", "\u25b2", "\u25c6", "\u25bc", "\u271a")  # the same marks, for a legend in HTML
INK, SERIES = "#010203", tuple(f"#0{number}0a0b" for number in range(COLOURS))  # placeholders for the page's colours
PER_ROW = 12


@dataclass(frozen=True)
class Line:
    """One series.

    colour: its number, below COLOURS. x, mean: N values. spread: N half-widths, 0 where there is none.
    """

    colour: int
    x: Sequence[float]
    mean: Sequence[float]
    spread: Sequence[float]


@dataclass(frozen=True)
class Panel:
    """One pair of axes with its lines; `whole`: x takes whole numbers only; `rings`: points with a ring around them."""

    x_label: str
    y_label: str
    lines: Sequence[Line]
    whole: bool = False
    rings: Sequence[Line] = ()


@plain_text(())  # the page's fonts take the place of matplotlib's
def bar_chart(names: Sequence[str], series: Sequence[tuple[int, Sequence[float]]], *, y_label: str, alt: str) -> str:
    """Groups of bars, at most 12 a row of the chart.

    Args:
        names: C groups.
        series: (colour, C values in percent); NaN leaves a gap. Bars stand in this order in every group.
        y_label: name of the values, with the unit.
        alt: the chart as a sentence, for those who cannot see it.

    Returns:
        An svg element.
    """
    rows = ceil(len(names) / PER_ROW)
    per_row = ceil(len(names) / rows)
    slanted = max(map(len, names)) > (5 if per_row > 8 else 11)
    figure = _figure(10.5, rows * (2.5 if slanted else 2.1))
    width = 0.82 / len(series)
    for row in range(rows):
        axes = _axes(figure, (rows, 1, row + 1), y_label=y_label)
        part = slice(row * per_row, (row + 1) * per_row)
        shown = [_short(name) for name in names[part]]
        for number, (colour, values) in enumerate(series):
            left = [group - 0.41 + width * number for group in range(len(shown))]
            axes.bar(left, values[part], width=width, align="edge", color=SERIES[colour], zorder=2)
        axes.set_xlim(-0.6, max(per_row, 4) - 0.4)
        axes.set_ylim(0, 100)
        axes.set_yticks([0, 25, 50, 75, 100])
        turn: dict[str, Any] = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if slanted else {}
        axes.set_xticks(range(len(shown)), shown, **turn)
        axes.tick_params(axis="x", length=0)
    return _svg(figure, alt)


@plain_text(())
def line_chart(panels: Sequence[Panel], *, alt: str) -> str:
    """Panels side by side; every point has a mark and its spread a bar.

    Args:
        panels: one or two.
        alt: the chart as a sentence, for those who cannot see it.

    Returns:
        An svg element.
    """
    from matplotlib.ticker import MaxNLocator

    figure = _figure(5.25 * len(panels), 2.9)
    for number, panel in enumerate(panels):
        axes = _axes(figure, (1, len(panels), number + 1), y_label=panel.y_label)
        for line in panel.lines:
            style: dict[str, Any] = {"color": SERIES[line.colour], "marker": MARKERS[line.colour], "markersize": 5}
            bars = line.spread if any(line.spread) else None
            axes.errorbar(line.x, line.mean, bars, linewidth=1.6, elinewidth=1, capsize=2.5, **style)
        for ring in panel.rings:
            edge = SERIES[ring.colour]
            axes.plot(ring.x, ring.mean, "o", color="none", markeredgecolor=edge, markersize=11, zorder=3)
        axes.set_xlabel(panel.x_label, color=INK)
        axes.margins(x=0.06, y=0.12)
        values = sorted({x for line in panel.lines for x in line.x})
        gaps = [after - before for before, after in pairwise(values)]
        if gaps and min(gaps) > 0.05 * sum(gaps):
            axes.set_xticks(values, [f"{x:g}" for x in values])
        elif panel.whole:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _svg(figure, alt)


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure


def _axes(figure: Any, place: tuple[int, int, int], *, y_label: str) -> Any:
    axes = figure.add_subplot(*place, facecolor="none")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(color=INK, alpha=0.45)
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(axis="y", color=INK, alpha=0.14, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_ylabel(y_label, color=INK, fontsize=9)
    axes.xaxis.label.set_fontsize(9)
    return axes


def _short(name: str, longest: int = 22) -> str:
    """A name that fits below a bar."""
    name = " ".join(writable_text(name).split())
    return name if len(name) <= longest else f"{name[: longest - 3]}..."


def _svg(figure: Any, alt: str) -> str:
    """The figure as an HTML element: without prologue or unused ids, in the colours of the page."""
    from matplotlib import rc_context

    buffer, alt = io.StringIO(), writable_text(alt)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": alt}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r'(<text style="font-size: [\d.]+px;) font-family: [^;]*;', r"\1", text)  # the page's font
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text, count=2).replace("xlink:href", "href")
    for placeholder, colour in {INK: "currentColor", **{s: f"var(--c{n})" for n, s in enumerate(SERIES)}}.items():
        text = text.replace(placeholder, colour)
    extent = ' class="wide"' if figure.get_figwidth() > 6 else ""
    return text.replace("<svg ", f'<svg{extent} role="img" aria-label="{escape(alt)}" ', 1)
