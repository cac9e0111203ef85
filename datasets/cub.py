"""Caltech-UCSD Birds 200 (Wah et al. 2011): 200 classes, 11,788 images."""

from __future__ import annotations

from dassl.data.datasets import DATASET_REGISTRY

from datasets.published import PublishedDataset
from datasets.sources import File, Source
from datasets.splits import Split

LISTS = ("images.txt", "image_class_labels.txt", "train_test_split.txt")  # each: the image's number, and a value


@DATASET_REGISTRY.register()
class CUB(PublishedDataset):
    """Class names as in GRIP and CPL, in small letters. CoOp has no split of it."""

    dataset_dir = "cub"
    template = "a photo of a {}"  # GRIP's and CPL's; CoOp has none
    image_dir = "CUB_200_2011/images"
    classes = 200
    sizes = {"elevater": (5_994, 0, 5_794)}
    covered = True
    grip = {}
    source = Source(
        licence="non-commercial research and education",
        files=[
            File(
                "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
                {"CUB_200_2011": "CUB_200_2011"},
                "md5:97eceeb196236b17998738112f37df78",
            )
        ],
    )

    def zhou_split(self) -> Split:
        return self.held_out()

    def own_lists(self) -> Split:
        paths, labels, training = (dict(self.lines(f"CUB_200_2011/{name}", fields=2)) for name in LISTS)
        if not paths.keys() == labels.keys() == training.keys():
            counts = [f"{name} {len(rows)}" for name, rows in zip(LISTS, (paths, labels, training), strict=True)]
            raise ValueError(f"the lists are not of the same images: {', '.join(counts)}")
        split: Split = {"train": [], "val": [], "test": []}
        for number, path in paths.items():
            name = path.partition("/")[0].rpartition(".")[2].replace("_", " ").lower()
            split["train" if int(training[number]) else "test"].append((path, int(labels[number]) - 1, name))
        return split
