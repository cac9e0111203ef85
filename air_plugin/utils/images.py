"""Reading images: any format, mode and orientation to 8-bit RGB, or a refusal that names the file."""

from __future__ import annotations

import os
import stat
import warnings

import numpy as np
from PIL import Image, ImageOps

from air_plugin.utils.errors import UserError

READERS = min(8, os.cpu_count() or 1)  # threads that read images at once
MOST_ELONGATED = 100  # longer side / shorter side; a resize of the shorter side multiplies the longer one, too
SIXTEEN_BITS = ("PNG", "PPM")  # formats whose integer pixels are 16-bit where Pillow calls the mode "I"
SLACK, OUTLIERS = 0.5, 0.01  # float pixels so far outside of [0, 1] may be this share of an image

# Pillow refuses images above 179 million pixels and warns above 89 million, which helps nobody who has such images.
# For the whole process, since `warnings.catch_warnings` is not safe in threads that read images.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class UnreadableImage(UserError):
    """A file that is not a whole image, or whose pixels have no known range."""


def load_rgb(path: str | os.PathLike[str]) -> Image.Image:
    """Read an image of any mode as 8-bit RGB, upright.

    The orientation of EXIF is applied in every format. Transparent pixels lie on white. Of an animation the first
    frame is read. The file's type alone decides how pixels are scaled: 16-bit integers divided by 257, floats in
    [0, 1] (the convention of scikit-image and matplotlib) multiplied by 255 and clipped.

    Args:
        path: a regular file.

    Returns:
        An image of mode RGB.

    Raises:
        UnreadableImage: the file is missing, truncated, no image, more than 100 times as long as wide, or its pixels
            are not finite or of a type without a known range (32-bit integers); the message names it.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("it is not a regular file")
        # Not by its path: Pillow then maps raw TIFFs into memory and mixes up the pixels of those that are turned.
        with open(path, "rb") as file, Image.open(file) as image:
            return _upright_rgb(image)
    except UnreadableImage:
        raise
    except Exception as error:  # a decoder raises whatever its C code meets in a damaged file
        raise UnreadableImage(f"cannot read image {path}: {str(error) or type(error).__name__}") from error


def _upright_rgb(image: Image.Image) -> Image.Image:
    if max(image.size) > MOST_ELONGATED * min(image.size):
        limit = f"the longer side may be {MOST_ELONGATED} times the shorter one"
        raise ValueError(f"it has {image.width} x {image.height} pixels; {limit}")
    image.load()
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I") or upright.mode == "F":
        return _grey_to_rgb(np.asarray(upright, dtype=np.float64), mode=upright.mode, form=image.format or "")
    if "A" in upright.getbands() or "transparency" in upright.info:
        rgba = upright.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return upright.convert("RGB")


def _grey_to_rgb(values: np.ndarray, *, mode: str, form: str) -> Image.Image:
    """(H, W) integers or floats of a mode of Pillow's to RGB."""
    if mode == "F":
        if not np.isfinite(values).all():
            raise ValueError("some of its pixels are not finite")
        if (np.abs(values - 0.5) > 0.5 + SLACK).mean() > OUTLIERS:
            raise ValueError(f"float pixels must lie in [0, 1]; these lie in [{values.min():.4g}, {values.max():.4g}]")
        values = values * 255.0
    elif mode.startswith("I;16") or form in SIXTEEN_BITS:
        values = values / 257.0
    else:
        raise ValueError("32-bit integer pixels have no known range; save it with 8 or 16 bits")
    return Image.fromarray(np.clip(values, 0, 255).round().astype(np.uint8)).convert("RGB")
