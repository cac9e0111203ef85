"""What `AiRClassifier` takes as images: a folder, files, PIL images, arrays; and which class names it takes."""

from __future__ import annotations

import io
import os
import unicodedata
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from air_plugin.utils.class_names import listed, same_prompts
from air_plugin.utils.errors import UserError
from air_plugin.utils.files import digest, write_atomically
from air_plugin.utils.image_files import find_images
from air_plugin.utils.images import READERS, UnreadableImage, load_rgb

Source = Path | Image.Image  # a file, or an image in memory (RGB)


class InputError(UserError, ValueError):
    """Images, class names or parameters that cannot be used; a ValueError, as scikit-learn's estimators raise."""


def clean_names(class_names: Any) -> list[str]:
    """Class names as they are used: composed letters (NFC), single spaces.

    Raises:
        InputError: they are no list of at least two names, or two are the same name to a text tower.

    Example:
        >>> clean_names(["dog", " traffic  light"])
        ['dog', 'traffic light']
    """
    if isinstance(class_names, str | os.PathLike) or not isinstance(class_names, Sequence | np.ndarray):
        raise InputError(
            f"class_names is {class_names!r}; it must be a list of names (air_plugin.read_class_file reads a file)"
        )
    wrong = [name for name in class_names if not isinstance(name, str) or not name.strip()]
    if wrong:
        raise InputError(f"class_names holds {wrong[0]!r}; every name must be a text that is not empty")
    names = [" ".join(unicodedata.normalize("NFC", name).split()) for name in class_names]
    if len(names) < 2:
        raise InputError(f"class_names holds {len(names)} names; a classifier needs at least 2 classes")
    if groups := same_prompts(names):
        pair = " and ".join(map(repr, groups[0][:2]))
        raise InputError(f"class_names holds {pair}, which are one name to a text tower; leave one of them")
    return names


def as_sources(images: Any) -> list[Source]:
    """Images in any accepted form as files and RGB images in memory, in their order.

    Args:
        images: a folder (any nesting, sorted by path; hidden files are left out), a file, or a sequence of files, PIL
            images and (H, W, 3) or (H, W) arrays; or one (N, H, W, 3) or (N, H, W) array. Arrays hold uint8, or floats
            in [0, 1].

    Raises:
        InputError: they are none of these, or there are none.
    """
    if isinstance(images, str | os.PathLike):
        path = Path(images)
        return [path] if path.is_file() else [*find_images(path)]
    if isinstance(images, Image.Image):
        raise InputError("images is one image; give a list of images")
    if hasattr(images, "tocsr"):
        raise InputError("images is a sparse matrix, which is not supported; give a dense array of images")
    if hasattr(images, "__array__"):
        images = np.asarray(images)
    if isinstance(images, np.ndarray) and images.ndim < 3 and not (images.ndim == 1 and images.dtype.kind in "OU"):
        raise InputError(f"the array of images has the shape {images.shape}; it must be (N, H, W, 3) or (N, H, W)")
    try:
        sources = [_as_source(one, place) for place, one in enumerate(images)]
    except TypeError as error:
        raise InputError(
            f"images is a {type(images).__name__}; it must be a folder, or a sequence of files, images or arrays"
        ) from error
    if not sources:
        raise InputError("there are no images")
    return sources


def _as_source(image: Any, place: int) -> Source:
    if isinstance(image, str | os.PathLike):
        return Path(image)
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if not hasattr(image, "__array__") and not isinstance(image, list):
        raise InputError(f"image {place} is a {type(image).__name__}; it must be a file, a PIL image or an array")
    return Image.fromarray(_as_bytes(np.asarray(image), place)).convert("RGB")


def _as_bytes(array: np.ndarray, place: int) -> np.ndarray:
    """(H, W, 3), (H, W, 1) or (H, W) of uint8 or floats in [0, 1] as uint8, (H, W, 3) or (H, W)."""
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3)) or 0 in array.shape:
        raise InputError(f"image {place} has the shape {array.shape}; it must be (H, W, 3) or (H, W)")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind != "f":
        raise InputError(f"image {place} holds {array.dtype}; it must hold uint8, or floats in [0, 1]")
    low, high = float(array.min()), float(array.max())
    if not 0 <= low <= high <= 1:
        raise InputError(f"float pixels must lie in [0, 1]; those of image {place} lie in [{low:.4g}, {high:.4g}]")
    return (array * 255).round().astype(np.uint8)


def as_files(sources: Sequence[Source], folder: Path) -> list[str]:
    """The files of images; an image in memory is written below a folder, once, under the digest of its content."""
    files = []
    for source in sources:
        if isinstance(source, Path):
            files.append(str(source))
            continue
        buffer = io.BytesIO()
        source.save(buffer, format="png")
        path = folder / f"{digest(buffer.getvalue())}.png"
        if not path.exists():
            write_atomically(path, buffer.getvalue())
        files.append(str(path))
    return files


def unreadable(files: Sequence[str]) -> dict[Path, str]:
    """Those of some files that are no whole image, with the reason."""

    def reason(path: str) -> str:
        try:
            load_rgb(path)
        except UnreadableImage as error:
            return " ".join(str(error).split())
        return ""

    with ThreadPoolExecutor(READERS) as pool:
        return {Path(path): why for path, why in zip(files, pool.map(reason, files), strict=True) if why}


def read_batches(sources: Sequence[Source], size: int) -> Iterator[list[Image.Image]]:
    """The images in batches, all of them.

    Raises:
        InputError: files are no whole images; the message names them.
    """

    def read(source: Source) -> Image.Image | str:
        try:
            return load_rgb(source) if isinstance(source, Path) else source
        except UnreadableImage as error:
            return " ".join(str(error).split())

    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(sources), size):
            found = list(pool.map(read, sources[start : start + size]))
            wrong = [one for one in found if isinstance(one, str)]
            if wrong:
                raise InputError(
                    f"{listed(wrong, first=3)}; a row for each image is needed: leave it out, or use "
                    "bundle_.predict, which leaves out and names such files"
                )
            yield [one for one in found if not isinstance(one, str)]
