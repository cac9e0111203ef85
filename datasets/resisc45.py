"""RESISC45 (Cheng, Han and Lu 2017): scenes in aerial images, 45 classes of 700 images."""

from __future__ import annotations

import json

from dassl.data.datasets import DATASET_REGISTRY

from datasets.published import PublishedDataset
from datasets.sources import File, Source, split_of_elevater
from datasets.splits import PARTS, Item, Split

FOLDERS = (
    "airplane airport baseball_diamond basketball_court beach bridge chaparral church circular_farmland cloud "
    "commercial_area dense_residential desert forest freeway golf_course ground_track_field harbor industrial_area "
    "intersection island lake meadow medium_residential mobile_home_park mountain overpass palace parking_lot "
    "railway railway_station rectangular_farmland river roundabout runway sea_ice ship snowberg sparse_residential "
    "stadium storage_tank tennis_court terrace thermal_power_station wetland "
)
NEEDS = " (the split family elevater needs ELEVATER's lists of resisc45_clip: train.json, val.json, test.json)"


@DATASET_REGISTRY.register()
class RESISC45(PublishedDataset):
    """Has no lists of its own, so "elevater" needs ELEVATER's, chosen by CLIP's authors. CoOp has no split of it."""

    dataset_dir = "resisc45"
    template = "a photo of a {}"  # GRIP's and CPL's; CoOp has none
    image_dir = "NWPU-RESISC45"
    classes = 45
    folders = FOLDERS.split()
    sizes = {"elevater": (6_300, 0, 25_200)}
    grip = {}
    source = Source(
        licence="CC BY-NC 4.0 as torchgeo states",
        files=[
            File(
                "https://hf.co/datasets/torchgeo/resisc45/resolve/a826b44d938a883185f11ebe3d512d38b464312f/"
                "NWPU-RESISC45.zip",
                {"NWPU-RESISC45": "NWPU-RESISC45"},
                "md5:75206b2e16446591afa88e2628744886",
            )
        ],
        optional=[split_of_elevater("resisc45_clip", "json")],
    )

    def zhou_split(self) -> Split:
        return self.divided(self.by_folder({folder: folder.replace("_", " ") for folder in self.folders}))

    def own_lists(self) -> Split:
        labels = {folder: label for label, folder in enumerate(self.class_folders())}
        return {part: [self._item(name, labels) for name in self._files(part)] for part in PARTS}

    def _files(self, part: str) -> list[str]:
        """File names of a list in COCO's format, such as `images.zip@airport/airport_001.jpg`."""
        return [
            image["file_name"]
            for image in json.loads(self.need(f"{part}.json", why=NEEDS).read_text("utf-8"))["images"]
        ]

    def _item(self, name: str, labels: dict[str, int]) -> Item:
        file = name.rpartition("/")[2]
        folder = file.rpartition("_")[0]  # the file's name begins with its class
        return f"{folder}/{file}", labels[folder], folder.replace("_", " ")
