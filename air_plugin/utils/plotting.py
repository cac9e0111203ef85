"""Names in plots: every text stands as it is, in a font that has its letters, and no picture costs a result."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

log = logging.getLogger(__name__)


@contextmanager
def optional_picture(name: object) -> Iterator[None]:
    """Work on a picture; whatever fails there is a warning (logged), since results must not depend on a picture.

    Args:
        name: of the picture, for the warning.
    """
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        log.warning("%s was not made, the results are complete without it: %s", name, reason)


@contextmanager
def plain_text(texts: Iterable[str]) -> Iterator[None]:
    """Within it, matplotlib draws text without mathematics (a `$` is a dollar) and in fonts that have its letters.

    A letter that no installed font has becomes a box, without a warning. Make the figure within it, and save it there.

    Args:
        texts: names that will be drawn.
    """
    from matplotlib import rc_context

    settings: Any = {"text.usetex": False, "text.parse_math": False, "font.family": font_families(texts)}
    with rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def font_families(texts: Iterable[str]) -> list[str]:
    """matplotlib's own font, then one installed family for each letter that those before it lack.

    Example:
        >>> font_families(["cat"])
        ['DejaVu Sans']
    """
    from matplotlib.font_manager import fontManager, get_font

    families, missing = ["DejaVu Sans"], {letter for text in texts for letter in text if ord(letter) > 127}
    fonts = [font for font in fontManager.ttflist if font.style == "normal"] if missing else []
    # matplotlib cannot draw fonts of coloured bitmaps, and those of last resort hold placeholders only.
    fonts = [font for font in fonts if not any(word in font.name for word in ("Color", "Last Resort", "LastResort"))]
    for font in sorted(fonts, key=lambda font: (font.name not in families, font.name, font.weight != 400)):
        if not missing:
            break
        try:
            found = {letter for letter in missing if get_font(font.fname).get_char_index(ord(letter))}
        except (OSError, RuntimeError):
            continue
        missing -= found
        if found and font.name not in families:
            families.append(font.name)
    return families


def writable_text(text: str) -> str:
    """Lone surrogates, which JSON and paths may hold and no file in UTF-8 can, become question marks."""
    return text.encode("utf-8", "replace").decode()
