"""The gallery with names that are no plain English: they are drawn as they stand, and a failure costs no result."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from air_plugin.auxiliary.gallery import plot_gallery
from air_plugin.utils.plotting import font_families, optional_picture, plain_text

pytestmark = pytest.mark.public_reports


@pytest.mark.parametrize(
    "name", ["price_$1_$2", "$\\undefined$", "100 %_{x}^", "\u5bff\u53f8", "\U0001f41d bee", "caf\udce9", "a\nb"]
)
def test_any_name_can_stand_in_a_gallery(
    name: str, pictures: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """15: mathtext, missing glyphs and lone surrogates; nothing is written to the terminal."""
    made = SimpleNamespace(images=[[Path(path) for path in pictures[:3]]] * 2, kept=torch.tensor([[0, 1], [1, 2]]))
    unlabelled = SimpleNamespace(paths=pictures, probs=torch.full((len(pictures), 2), 0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_gallery(made, [name, "other"], unlabelled, tmp_path / "gallery.png")
    with Image.open(tmp_path / "gallery.png") as image:
        image.load()
    assert capfd.readouterr() == ("", "")


def test_a_dollar_is_drawn_as_a_dollar() -> None:
    """15: the text takes the room of its own letters, those of no formula."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def width(text: str) -> float:
        with plain_text([text]):
            figure = Figure()
            canvas = FigureCanvasAgg(figure)
            drawn = figure.text(0, 0, text)
            return drawn.get_window_extent(canvas.get_renderer()).width

    assert width("$xx$") > width("xx") + 5


def test_letters_that_one_font_lacks_come_from_another() -> None:
    """15: U+2336 stands in STIXGeneral, which comes with matplotlib, and not in DejaVu Sans; U+5BFF in no such font."""
    assert font_families(["owl"]) == ["DejaVu Sans"]
    first, *others = font_families(["\u2336 beam", "caf\u00e9"])
    assert first == "DejaVu Sans" and len(others) == 1
    assert font_families(["\U0010fffd"]) == ["DejaVu Sans"]


def test_a_picture_that_fails_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """15: whatever the library raises; an interruption is no failure."""
    with optional_picture("gallery.png"):
        raise ValueError("unknown symbol\nat 3")
    (record,) = caplog.records
    assert (
        record.levelno == logging.WARNING
        and "gallery.png" in record.message
        and "unknown symbol at 3" in record.message
    )
    with pytest.raises(KeyboardInterrupt), optional_picture("gallery.png"):
        raise KeyboardInterrupt
