"""Caltech-101 (Fei-Fei, Fergus and Perona 2004): objects, 100 classes as in CoOp."""

from __future__ import annotations

from dassl.data.datasets import DATASET_REGISTRY

from datasets.base import PublishedDataset, Split

IGNORED = ("BACKGROUND_Google", "Faces_easy")
NAMES = {"airplanes": "airplane", "Faces": "face", "Leopards": "leopard", "Motorbikes": "motorbike"}


@DATASET_REGISTRY.register()
class Caltech101(PublishedDataset):
    """Has no train and test lists of its own."""

    dataset_dir = "caltech-101"
    image_dir = "101_ObjectCategories"
    classes = 100
    split_file = "split_zhou_Caltech101.json"
    sizes = {"zhou": (4_128, 1_649, 2_465)}

    def zhou_split(self) -> Split:
        return self.divided(self.by_folder(NAMES, ignored=IGNORED))
