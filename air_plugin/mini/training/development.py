"""A target on which settings may be chosen: digits set in handwriting fonts, as coarse as scikit-learn's digits.

    python -m air_plugin.mini.training.development DATA
    DATA=DATA OUTPUT=development bash scripts/air/main.sh digits

writes DATA/digits in the layout of the `digits` data set (1,000 unlabelled, 797 test), so that every script runs on it
unchanged. Its labels may be used to choose settings; those of the real digits are not. It needs the Debian packages of
`DEVELOPMENT_PACKAGES` in fonts.py; no model was trained on these fonts.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.utils import save_image

from air_plugin.mini.training.common import SEED, load_corpus
from air_plugin.utils.files import to_json

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TRAIN, TEST = 1000, 797


def sample_digits(count: int, *, seed: int = SEED) -> tuple[Tensor, list[int]]:
    """White digits on black: (count, 3, 32, 32) in [0, 1], reduced to 8 x 8 and enlarged again, and their classes."""
    generator = torch.Generator().manual_seed(seed + 50)
    with tempfile.TemporaryDirectory() as cache:
        corpus = load_corpus("development", Path(cache))
    images, classes = torch.empty(0, 3, 32, 32), list[int]()
    while len(classes) < count:
        batch, looks = corpus.sample(2000, generator, digits_only=True)
        fits = [index for index, look in enumerate(looks) if (look.ink, look.ground) == ("white", "black")]
        images = torch.cat([images, batch[fits]])
        classes += [int(str(looks[index].character)) for index in fits]
    coarse = F.interpolate(images[:count], size=8, mode="area")
    return F.interpolate(coarse, size=32, mode="bicubic", align_corners=False).clamp(0, 1), classes[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of data sets")
    folder = parser.parse_args().data / "digits"
    (folder / "images").mkdir(parents=True)  # an existing data set is not overwritten
    images, classes = sample_digits(TRAIN + TEST)
    items = []
    for number, (image, label) in enumerate(zip(images, classes, strict=True)):
        save_image(image, folder / "images" / f"{number:04d}.png")
        items.append([f"images/{number:04d}.png", label, NAMES[label]])
    (folder / "split.json").write_text(to_json({"train": items[:TRAIN], "val": [], "test": items[TRAIN:]}))


if __name__ == "__main__":
    main()
