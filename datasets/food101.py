"""Food-101 (Bossard, Guillaumin and Van Gool 2014): 101 dishes of 1,000 images."""

from __future__ import annotations

from collections.abc import Sequence

from dassl.data.datasets import DATASET_REGISTRY

from datasets.published import PublishedDataset
from datasets.sources import File, Source, split_by_zhou
from datasets.splits import Item, Split


@DATASET_REGISTRY.register()
class Food101(PublishedDataset):
    """Lists in meta/."""

    dataset_dir = "food-101"
    template = "a photo of {}, a type of food."  # CoOp's
    classes = 101
    split_file = "split_zhou_Food101.json"
    sizes = {"zhou": (50_500, 20_200, 30_300), "elevater": (75_750, 0, 25_250)}
    covered = True
    source = Source(
        licence="scientific fair use",
        files=[
            File(
                "http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz",
                {"images": "images", "meta": "meta"},
                "md5:85eeb15f3717b99a5da872d97d918f87",
            )
        ],
        optional=[split_by_zhou("Food101", "1QK0tGi096I0Ba6kggatX1ee6dJFIcEJl")],
    )

    def known_folders(self) -> Sequence[str]:
        """From lines such as `apple_pie/1005649`."""
        rows = self.lines("meta/train.txt", fields=1)  # it names images of every class
        return self.one_a_class(sorted({path.partition("/")[0] for (path,) in rows}))

    def own_lists(self) -> Split:
        return {"train": self._items("train.txt"), "val": [], "test": self._items("test.txt")}

    def _items(self, name: str) -> list[Item]:
        """From lines such as `apple_pie/1005649`."""
        labels = {folder: label for label, folder in enumerate(self.class_folders())}
        return [
            (f"{path}.jpg", labels[folder], folder)
            for (path,) in self.lines(f"meta/{name}", fields=1)
            for folder in [path.partition("/")[0]]
        ]
