"""SUN397 (Xiao et al. 2010): scenes, 397 classes."""

from __future__ import annotations

from dassl.data.datasets import DATASET_REGISTRY

from datasets.published import PublishedDataset
from datasets.sources import File, Source, split_by_zhou
from datasets.splits import Item, Split


@DATASET_REGISTRY.register()
class SUN397(PublishedDataset):
    """Its own lists are the first of its ten published partitions: 50 training and 50 test images a class."""

    dataset_dir = "sun397"
    template = "a photo of a {}."  # CoOp's
    image_dir = "SUN397"
    classes = 397
    split_file = "split_zhou_SUN397.json"
    sizes = {"zhou": (15_880, 3_970, 19_850), "elevater": (19_850, 0, 19_850)}
    balanced = True
    source = Source(
        licence="none stated; for research",
        files=[
            File(
                "http://vision.princeton.edu/projects/2010/SUN/SUN397.tar.gz",
                {"SUN397": "SUN397"},
                "md5:8ca2778205c41d23104230ba66911c7a",
            ),
            File(
                "https://vision.princeton.edu/projects/2010/SUN/download/Partitions.zip",
                {name: name for name in ("ClassName.txt", "Training_01.txt", "Testing_01.txt")},
            ),
        ],
        optional=[split_by_zhou("SUN397", "1y2RD81BYuiyvebdN-JymPfyWYcd8_MUq")],
    )

    def zhou_split(self) -> Split:
        return self.held_out()

    def own_lists(self) -> Split:
        names = self.one_a_class([name for (name,) in self.lines("ClassName.txt", fields=1)])
        labels = {name: label for label, name in enumerate(names)}
        return {
            "train": self._items("Training_01.txt", labels),
            "val": [],
            "test": self._items("Testing_01.txt", labels),
        }

    def _items(self, name: str, labels: dict[str, int]) -> list[Item]:
        """From lines such as `/a/apartment_building/outdoor/sun_x.jpg`, a class named "outdoor apartment_building"."""
        items = []
        for (path,) in self.lines(name, fields=1):
            folder = path.rpartition("/")[0]
            words = folder.split("/")[2:]
            items.append((path.lstrip("/"), labels[folder], " ".join(reversed(words))))
        return items
