"""ImageNet (Deng et al. 2009), ILSVRC 2012: 1,000 classes."""

from __future__ import annotations

from dassl.data.datasets import DATASET_REGISTRY

from datasets.base import Item, PublishedDataset, Split, images_in


@DATASET_REGISTRY.register()
class ImageNet(PublishedDataset):
    """The official val folder is the test part. CoOp uses it as val, too; here there is none to choose models by."""

    dataset_dir = "imagenet"
    classes = 1000
    sizes = {"zhou": (1_281_167, 0, 50_000), "elevater": (1_281_167, 0, 50_000)}
    own_is_zhou = True

    def own_lists(self) -> Split:
        return {"train": self._items("train"), "val": [], "test": self._items("val")}

    def _items(self, part: str) -> list[Item]:
        """Labels in the order of classnames.txt, which is that of the folders: lines such as `n01440764 tench`."""
        rows = sorted(self.lines("classnames.txt", fields=2))
        self.one_a_class([name for _, name in rows])
        folder = self.need(f"images/{part}")
        return [
            (f"{part}/{wnid}/{file}", label, name)
            for label, (wnid, name) in enumerate(rows)
            for file in images_in(folder / wnid)
        ]
