"""Food-101 (Bossard, Guillaumin and Van Gool 2014): 101 dishes of 1,000 images."""

from __future__ import annotations

from dassl.data.datasets import DATASET_REGISTRY

from datasets.base import Item, PublishedDataset, Split


@DATASET_REGISTRY.register()
class Food101(PublishedDataset):
    """Lists in meta/."""

    dataset_dir = "food-101"
    classes = 101
    split_file = "split_zhou_Food101.json"
    sizes = {"zhou": (50_500, 20_200, 30_300), "elevater": (75_750, 0, 25_250)}
    covered = True

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
