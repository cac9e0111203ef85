"""Caltech-101 (Fei-Fei, Fergus and Perona 2004): objects, 100 classes as in CoOp."""

from __future__ import annotations

from dassl.data.datasets import DATASET_REGISTRY

from datasets.published import PublishedDataset
from datasets.sources import File, Source, split_by_zhou
from datasets.splits import Split

IGNORED = ("BACKGROUND_Google", "Faces_easy")
FOLDERS = (
    "accordion airplanes anchor ant barrel bass beaver binocular bonsai brain brontosaurus buddha butterfly camera "
    "cannon car_side ceiling_fan cellphone chair chandelier cougar_body cougar_face crab crayfish crocodile "
    "crocodile_head cup dalmatian dollar_bill dolphin dragonfly electric_guitar elephant emu euphonium ewer Faces "
    "ferry flamingo flamingo_head garfield gerenuk gramophone grand_piano hawksbill headphone hedgehog helicopter "
    "ibis inline_skate joshua_tree kangaroo ketch lamp laptop Leopards llama lobster lotus mandolin mayfly menorah "
    "metronome minaret Motorbikes nautilus octopus okapi pagoda panda pigeon pizza platypus pyramid revolver rhino "
    "rooster saxophone schooner scissors scorpion sea_horse snoopy soccer_ball stapler starfish stegosaurus "
    "stop_sign strawberry sunflower tick trilobite umbrella watch water_lilly wheelchair wild_cat windsor_chair "
    "wrench yin_yang "
)
NAMES = {"airplanes": "airplane", "Faces": "face", "Leopards": "leopard", "Motorbikes": "motorbike"}


@DATASET_REGISTRY.register()
class Caltech101(PublishedDataset):
    """Has no train and test lists of its own."""

    dataset_dir = "caltech-101"
    template = "a photo of a {}."  # CoOp's
    image_dir = "101_ObjectCategories"
    classes = 100
    folders = FOLDERS.split()
    split_file = "split_zhou_Caltech101.json"
    sizes = {"zhou": (4_128, 1_649, 2_465)}
    source = Source(
        licence="CC BY 4.0",
        files=[
            File(
                "https://data.caltech.edu/records/mzrjq-6wc02/files/caltech-101.zip",
                {"101_ObjectCategories": "101_ObjectCategories"},
                "md5:3138e1922a9193bfa496528edbbc45d0",
                inner="101_ObjectCategories.tar.gz",
            )
        ],
        optional=[split_by_zhou("Caltech101", "1hyarUivQE36mY6jSomru6Fjd-JzwcCzN")],
    )

    def zhou_split(self) -> Split:
        return self.divided(self.by_folder(NAMES, ignored=IGNORED))
