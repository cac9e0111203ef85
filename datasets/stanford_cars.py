"""Stanford Cars (Krause et al. 2013): 196 classes, 16,185 images."""

from __future__ import annotations

from collections.abc import Sequence

from dassl.data.datasets import DATASET_REGISTRY

from datasets.published import PublishedDataset
from datasets.sources import ByHand, Source, split_by_zhou
from datasets.splits import Item, Split


@DATASET_REGISTRY.register()
class StanfordCars(PublishedDataset):
    """Class names begin with the year, as in CoOp."""

    dataset_dir = "stanford_cars"
    template = "a photo of a {}."  # CoOp's
    image_dir = ""
    classes = 196
    split_file = "split_zhou_StanfordCars.json"
    sizes = {"zhou": (6_509, 1_635, 8_041), "elevater": (8_144, 0, 8_041)}
    covered = True
    source = Source(
        licence="non-commercial research",
        needed=[
            ByHand(
                f"the images: {name}.tgz (the authors' address is gone; this is a mirror)",
                "https://www.kaggle.com/datasets/jessicali9530/stanford-cars-dataset",
                name,
            )
            for name in ("cars_train", "cars_test")
        ]
        + [
            ByHand(f"the labels: {name}", "https://github.com/pytorch/vision/issues/7545", path)
            for name, path in (
                ("car_devkit.tgz", "devkit"),
                ("those of the test images", "cars_test_annos_withlabels.mat"),
            )
        ],
        optional=[split_by_zhou("StanfordCars", "1ObCFbaAgVu0I-k_Au-gIUcefirdAuizT")],
    )

    def zhou_split(self) -> Split:
        return self.held_out()

    def own_lists(self) -> Split:
        models = [name.rpartition(" ") for name in self.matrix("devkit/cars_meta.mat")["class_names"].tolist()]
        names = self.one_a_class([f"{year} {model}" for model, _, year in models])
        return {
            "train": self._items("cars_train", "devkit/cars_train_annos.mat", names),
            "val": [],
            "test": self._items("cars_test", "cars_test_annos_withlabels.mat", names),
        }

    def _items(self, folder: str, file: str, names: Sequence[str]) -> list[Item]:
        notes = self.matrix(file)["annotations"]
        labels = [int(number) - 1 for number in notes["class"].tolist()]
        files = notes["fname"].tolist()
        return [(f"{folder}/{name}", label, names[label]) for name, label in zip(files, labels, strict=True)]
