"""Oxford Flowers (Nilsback and Zisserman 2008): 102 classes, 8,189 images."""

from __future__ import annotations

import json

from dassl.data.datasets import DATASET_REGISTRY

from datasets.published import PublishedDataset
from datasets.sources import DRIVE, OXFORD, ByHand, File, Source, split_by_zhou
from datasets.splits import Item, Split


@DATASET_REGISTRY.register()
class OxfordFlowers(PublishedDataset):
    """Class names are in cat_to_name.json; where that is missing, torchvision's list of them serves."""

    dataset_dir = "oxford_flowers"
    template = "a photo of a {}, a type of flower."  # CoOp's
    image_dir = "jpg"
    classes = 102
    split_file = "split_zhou_OxfordFlowers.json"
    sizes = {"zhou": (4_093, 1_633, 2_463), "elevater": (2_040, 0, 6_149)}
    covered = True
    grip = {15: "globe flower", 59: "pink and yellow dahlia", 92: "air plant"}
    source = Source(
        licence="none stated",
        files=[
            File(f"{OXFORD}/flowers/102/102flowers.tgz", {"jpg": "jpg"}, "md5:52808999861908f626f3c1f4e79d11fa"),
            File(
                f"{OXFORD}/flowers/102/imagelabels.mat", {"": "imagelabels.mat"}, "md5:e0620be6f572b9609742df49c70aed4d"
            ),
            File(f"{OXFORD}/flowers/102/setid.mat", {"": "setid.mat"}, "md5:a5357ecc9cb78c4bef273ce3793fc85c"),
        ],
        optional=[
            ByHand(
                "CoOp's class names (without them torchvision's serve): cat_to_name.json",
                DRIVE.format("1AkcxCXeK_RCGCEC_GvmWxjcjaNhu-at0"),
                "cat_to_name.json",
            ),
            split_by_zhou("OxfordFlowers", "1Pp0sRXzZFZq15zVOzKjKBu4A9i01nozT"),
        ],
    )

    def zhou_split(self) -> Split:
        return self.divided(self._items())

    def own_lists(self) -> Split:
        items = self._items()
        numbers = self.matrix("setid.mat")
        keys = {"train": "trnid", "val": "valid", "test": "tstid"}
        return {part: [items[number - 1] for number in numbers[key].tolist()] for part, key in keys.items()}

    def _items(self) -> list[Item]:
        names = self._numbered_names()
        labels = self.matrix("imagelabels.mat")["labels"].tolist()  # from 1
        return [(f"image_{n:05d}.jpg", label - 1, names[label]) for n, label in enumerate(labels, start=1)]

    def _numbered_names(self) -> dict[int, str]:
        """Class number, from 1, -> name."""
        if (self.folder / "cat_to_name.json").is_file():
            return {
                int(key): name for key, name in json.loads(self.need("cat_to_name.json").read_text("utf-8")).items()
            }
        from torchvision.datasets import Flowers102

        return {number: name.rstrip("?") for number, name in enumerate(Flowers102.classes, start=1)}
