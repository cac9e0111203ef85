"""EuroSAT (Helber et al. 2019): land use in Sentinel-2 satellite images, 10 classes."""

from __future__ import annotations

from collections.abc import Sequence

from dassl.data.datasets import DATASET_REGISTRY

from datasets.published import PublishedDataset
from datasets.sources import File, Source, split_by_zhou, split_of_elevater
from datasets.splits import PARTS, Item, Split

# Folder: CoOp's class name, that of GRIP and CPL.
CLASSES = {
    "AnnualCrop": ("Annual Crop Land", "annual crop land"),
    "Forest": ("Forest", "forest"),
    "HerbaceousVegetation": ("Herbaceous Vegetation Land", "brushland or shrubland"),
    "Highway": ("Highway or Road", "highway or road"),
    "Industrial": ("Industrial Buildings", "industrial buildings or commercial buildings"),
    "Pasture": ("Pasture Land", "pasture land"),
    "PermanentCrop": ("Permanent Crop Land", "permanent crop land"),
    "Residential": ("Residential Buildings", "residential buildings or homes or apartments"),
    "River": ("River", "river"),
    "SeaLake": ("Sea or Lake", "lake or sea"),
}
COOP = {folder: coop for folder, (coop, _) in CLASSES.items()}
GRIP = dict(CLASSES.values())
NEEDS = " (the split family elevater needs ELEVATER's lists of eurosat_clip: train.txt, val.txt, test.txt)"


@DATASET_REGISTRY.register()
class EuroSAT(PublishedDataset):
    """Has no lists of its own, so "elevater" needs ELEVATER's: 5,000 images each, chosen by CLIP's authors."""

    dataset_dir = "eurosat"
    template = "a centered satellite photo of {}."  # CoOp's
    image_dir = "2750"
    folders = tuple(CLASSES)
    classes = 10
    split_file = "split_zhou_EuroSAT.json"
    sizes = {"zhou": (13_500, 5_400, 8_100), "elevater": (10_000, 0, 5_000)}
    grip = {}
    source = Source(
        licence="MIT",
        files=[
            File(
                "https://huggingface.co/datasets/torchgeo/eurosat/resolve/c877bcd43f099cd0196738f714544e355477f3fd/"
                "EuroSAT.zip",
                {"2750": "2750"},
                "md5:c8fa014336c82ac7804f0398fcb19387",
            )
        ],
        optional=[
            split_by_zhou("EuroSAT", "1Ip7yaCWFi0eaOFUGga0lUdVi_DDQth1o"),
            split_of_elevater("eurosat_clip", "txt"),
        ],
    )

    def zhou_split(self) -> Split:
        return self.divided(self.by_folder(COOP))

    def own_lists(self) -> Split:
        return {part: [self._item(*row) for row in self.lines(f"{part}.txt", fields=2, why=NEEDS)] for part in PARTS}

    def renamed(self, names: list[str], version: str) -> list[str]:
        """GRIP's names follow CoOp's, not the labels, which a split file may number otherwise."""
        names = super().renamed(names, version)
        return [GRIP.get(name, name) for name in names] if version == "grip" else names

    def class_order(self, names: Sequence[str]) -> Sequence[int]:
        """GRIP's order is that of the folders; a split file may number the classes otherwise."""
        places = {name: place for place, pair in enumerate(CLASSES.values()) for name in pair}
        return sorted(range(len(names)), key=lambda label: places[names[label]])

    def _item(self, path: str, label: str) -> Item:
        """From a line such as `2750.zip@2750/Forest/Forest_7.jpg 1`; a file's name begins with its folder's."""
        file = path.rpartition("/")[2]
        folder = file.rpartition("_")[0]
        if int(label) != list(CLASSES).index(folder):
            raise ValueError(f"label {label} of {file} is not {list(CLASSES).index(folder)}")
        return f"{folder}/{file}", int(label), COOP[folder]
