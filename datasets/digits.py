"""scikit-learn's handwritten digits (Alpaydin and Kaynak 1998; UCI): 1,797 real images, 8x8, enlarged to 32x32.

Beside them the same images changed in one way, as other kinds of target: light and dark exchanged, turned, in noise.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dassl.data.datasets import DATASET_REGISTRY, Datum

from air_plugin.utils.errors import UserError
from air_plugin.utils.files import to_json, write_atomically
from datasets.base import SplitDataset
from datasets.sources import Source

if TYPE_CHECKING:
    from PIL.Image import Image

CLASSES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SPLIT = "split.json"
ANGLE = 25  # degrees, counterclockwise
NOISE = 40  # standard deviation, in levels of 255


@DATASET_REGISTRY.register()
class Digits(SplitDataset):
    """1,000 training images (unlabelled as train_u) and 797 test images, stratified, always the same."""

    dataset_dir = "digits"
    template = "a photo of the digit {}."
    source = Source(generated=True)

    def __init__(self, cfg: Any) -> None:
        root = Path(os.path.abspath(os.path.expanduser(cfg.DATASET.ROOT)))
        if not root.is_dir():
            raise UserError(f"data root {root} is missing; make it, or name another with --root (scripts: DATA=...)")
        folder = root / self.dataset_dir
        if not (folder / SPLIT).exists():
            from air_plugin.utils.seeding import randomness_kept  # it imports torch, which no script needs

            with randomness_kept():  # otherwise the very first run samples other shots
                write_digits(folder, self.change)
        try:
            split = json.loads((folder / SPLIT).read_text("utf-8"))
            train, val, test = (self._read(folder, split[name]) for name in ("train", "val", "test"))
        except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
            raise UserError(f"{folder} is damaged ({error}); remove it and it is written again") from error
        super().__init__(cfg, CLASSES, train=train, val=val, test=test)

    @staticmethod
    def change(image: Image, number: int) -> Image:
        """The change of an image of 32x32 before it is written; always the same for the same number."""
        return image

    @staticmethod
    def _read(folder: Path, items: list[list[Any]]) -> list[Datum]:
        return [Datum(impath=str(folder / path), label=int(label), classname=name) for path, label, name in items]


@DATASET_REGISTRY.register()
class DigitsInverted(Digits):
    """Dark on light."""

    dataset_dir = "digits_inverted"

    @staticmethod
    def change(image: Image, number: int) -> Image:
        from PIL import ImageOps

        return ImageOps.invert(image)


@DATASET_REGISTRY.register()
class DigitsRotated(Digits):
    """Rotated by ANGLE; corners that come in from outside are black, as the background is."""

    dataset_dir = "digits_rotated"

    @staticmethod
    def change(image: Image, number: int) -> Image:
        from PIL.Image import Resampling

        return image.rotate(ANGLE, Resampling.BICUBIC, fillcolor=0)


@DATASET_REGISTRY.register()
class DigitsNoisy(Digits):
    """With Gaussian noise, which depends on the image's number alone."""

    dataset_dir = "digits_noisy"

    @staticmethod
    def change(image: Image, number: int) -> Image:
        import numpy as np
        from PIL.Image import fromarray

        noise = np.random.RandomState(number).normal(0, NOISE, (image.height, image.width))  # numpy never changes it
        return fromarray(np.round(np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


def write_digits(folder: Path, change: Callable[[Image, int], Image] = Digits.change) -> None:
    """Write images and split below a folder; the split comes last, so an interrupted writing begins again.

    Args:
        folder: of the data set.
        change: of every image, called with the image and its number.
    """
    import numpy as np
    from PIL.Image import Resampling, fromarray
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    for number, values in enumerate(data.images):
        small = fromarray(np.round(values * 255 / 16).astype(np.uint8))
        buffer = io.BytesIO()
        image = small.resize((32, 32), Resampling.BICUBIC)
        change(image, number).convert("RGB").save(buffer, format="png")
        write_atomically(folder / "images" / f"{number:04d}.png", buffer.getvalue())
    numbers = np.arange(len(data.target))
    train, test = train_test_split(numbers, train_size=1000, stratify=data.target, random_state=0)
    items = {
        name: [[f"images/{i:04d}.png", int(data.target[i]), CLASSES[data.target[i]]] for i in sorted(chosen)]
        for name, chosen in (("train", train), ("val", []), ("test", test))
    }
    write_atomically(folder / SPLIT, to_json(items).encode(), durable=True)
