"""Reading images whatever their mode."""

from __future__ import annotations

import os

import numpy as np
from PIL import Image

from air_plugin.utils.errors import UserError


class UnreadableImage(UserError):
    """A file that is not a complete image."""


def load_rgb(path: str | os.PathLike[str]) -> Image.Image:
    """Read an image of any mode as 8-bit RGB; 16-bit grey is scaled, and transparent pixels become white.

    Raises:
        UnreadableImage: the file is missing, truncated or no image; the message names it.
    """
    try:
        with Image.open(path) as image:
            image.load()
            if image.mode.startswith("I") or image.mode == "F":
                return _grey_to_rgb(np.asarray(image, dtype=np.float64))
            if "A" in image.getbands() or "transparency" in image.info:
                rgba = image.convert("RGBA")
                return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UnreadableImage(f"cannot read image {path}: {error}") from error


def _grey_to_rgb(values: np.ndarray) -> Image.Image:
    """(H, W) grey values of 8 bits, 16 bits or in [0, 1] to an RGB image."""
    top = values.max(initial=0.0)
    scale = 255.0 if top <= 1.0 else 1.0 if top <= 255.0 else 255.0 / 65535.0
    grey = np.clip(values * scale, 0, 255).round().astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


READERS = min(8, os.cpu_count() or 1)  # threads that read images at once
