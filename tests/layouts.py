"""Miniatures of the data sets' real layouts on disk: real folders, lists and file formats, with few small images."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

EUROSAT = [
    "AnnualCrop",
    "Forest",
    "HerbaceousVegetation",
    "Highway",
    "Industrial",
    "Pasture",
    "PermanentCrop",
    "Residential",
    "River",
    "SeaLake",
]
EUROSAT_NAMES = [
    "Annual Crop Land",
    "Forest",
    "Herbaceous Vegetation Land",
    "Highway or Road",
    "Industrial Buildings",
    "Pasture Land",
    "Permanent Crop Land",
    "Residential Buildings",
    "River",
    "Sea or Lake",
]


@dataclass
class Layout:
    """What was written: paths are relative to the image folder.

    items: path -> (label, class name) of every image that is of a class.
    own: the data set's own lists; None where it has none.
    """

    name: str
    folder: Path
    images: Path
    split_file: str = ""
    items: dict[str, tuple[int, str]] = field(default_factory=dict)
    own: dict[str, list[str]] | None = field(default_factory=lambda: {"train": [], "val": [], "test": []})

    @property
    def names(self) -> list[str]:
        """Class names by label."""
        return [name for _, name in sorted(set(self.items.values()))]

    def by_class(self) -> dict[int, list[str]]:
        """Label -> paths."""
        groups: dict[int, list[str]] = {}
        for path, (label, _) in self.items.items():
            groups.setdefault(label, []).append(path)
        return groups

    def write_zhou(self) -> Path:
        """CoOp's split file: of every class the first half is train, one image val, the rest test."""
        split: dict[str, list] = {"train": [], "val": [], "test": []}
        for label, paths in self.by_class().items():
            half = len(paths) // 2
            for part, some in (("train", paths[:half]), ("val", paths[half : half + 1]), ("test", paths[half + 1 :])):
                split[part] += [[path, label, self.items[path][1]] for path in some]
        file = self.folder / self.split_file
        file.write_text(json.dumps(split))
        return file


def picture(number: int, *, size: int = 16) -> bytes:
    """A small picture of random colours."""
    colours = np.random.default_rng(number).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(colours).resize((size, size)).save(file, format="jpeg")
    return file.getvalue()


PICTURE = picture(0)


def put(folder: Path, *paths: str, data: bytes = PICTURE) -> None:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)


def write_list(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def parts(number: int, total: int, *, val: bool) -> str:
    """The own list that an image of a class is on: of six, three are train (or two train and one val)."""
    if number >= total // 2:
        return "test"
    return "val" if val and number == 0 else "train"


def fill(
    layout: Layout,
    per_class: int,
    classes: list[tuple[str, str]],
    file: Callable[[str, int], str],
    *,
    val: bool = False,
) -> None:
    """Write the images of folder classes (folder, name) and note them; lists are written by the caller."""
    for label, (folder, name) in enumerate(classes):
        for number in range(per_class):
            path = file(folder, number)
            put(layout.images, path)
            layout.items[path] = (label, name)
            if layout.own is not None:
                layout.own[parts(number, per_class, val=val)].append(path)


def eurosat(root: Path, per_class: int = 6, *, distinct: bool = False) -> Layout:
    folder = root / "eurosat"
    layout = Layout("eurosat", folder, folder / "2750", "split_zhou_EuroSAT.json")
    fill(
        layout, per_class, list(zip(EUROSAT, EUROSAT_NAMES, strict=True)), lambda c, n: f"{c}/{c}_{n + 1}.jpg", val=True
    )
    for part, paths in layout.own.items():
        write_list(folder / f"{part}.txt", [f"2750.zip@2750/{path} {layout.items[path][0]}" for path in paths])
    if distinct:
        for number, path in enumerate(layout.items):
            put(layout.images, path, data=picture(number, size=64))
    return layout


RESISC = [
    "airplane",
    "airport",
    "baseball_diamond",
    "basketball_court",
    "beach",
    "bridge",
    "chaparral",
    "church",
    "circular_farmland",
    "cloud",
    "commercial_area",
    "dense_residential",
    "desert",
    "forest",
    "freeway",
    "golf_course",
    "ground_track_field",
    "harbor",
    "industrial_area",
    "intersection",
    "island",
    "lake",
    "meadow",
    "medium_residential",
    "mobile_home_park",
    "mountain",
    "overpass",
    "palace",
    "parking_lot",
    "railway",
    "railway_station",
    "rectangular_farmland",
    "river",
    "roundabout",
    "runway",
    "sea_ice",
    "ship",
    "snowberg",
    "sparse_residential",
    "stadium",
    "storage_tank",
    "tennis_court",
    "terrace",
    "thermal_power_station",
    "wetland",
]


def resisc45(root: Path, per_class: int = 6) -> Layout:
    folder = root / "resisc45"
    layout = Layout("resisc45", folder, folder / "NWPU-RESISC45")
    classes = [(name, name.replace("_", " ")) for name in RESISC]
    fill(layout, per_class, classes, lambda c, n: f"{c}/{c}_{n + 1:03d}.jpg", val=True)
    categories = [{"id": number + 1, "name": name} for number, name in enumerate(RESISC)]
    for part, paths in layout.own.items():
        images = [{"id": number, "file_name": f"images.zip@{path}"} for number, path in enumerate(paths)]
        (folder / f"{part}.json").write_text(json.dumps({"images": images, "categories": categories}))
    return layout


def dtd(root: Path, per_class: int = 6) -> Layout:
    folder = root / "dtd"
    layout = Layout("dtd", folder, folder / "images", "split_zhou_DescribableTextures.json")
    names = ["banded", "blotchy", *(f"texture{number:02d}" for number in range(44)), "zigzagged"]
    fill(layout, per_class, [(name, name) for name in names], lambda c, n: f"{c}/{c}_{n:04d}.jpg", val=True)
    put(layout.images, "zigzagged/.directory")  # the published archive has such a file, too
    for part, paths in layout.own.items():
        write_list(folder / "labels" / f"{part}1.txt", paths)
    return layout


def oxford_flowers(root: Path, per_class: int = 6) -> Layout:
    from scipy.io import savemat

    folder = root / "oxford_flowers"
    layout = Layout("oxford_flowers", folder, folder / "jpg", "split_zhou_OxfordFlowers.json")
    names = {number: f"flower {number}" for number in range(1, 103)} | {1: "pink primrose", 102: "blackberry lily"}
    numbers = iter(range(1, 102 * per_class + 1))
    fill(
        layout,
        per_class,
        [("", name) for name in names.values()],
        lambda _, n: f"image_{next(numbers):05d}.jpg",
        val=True,
    )
    savemat(folder / "imagelabels.mat", {"labels": [[label + 1 for label, _ in layout.items.values()]]})
    position = {path: number for number, path in enumerate(layout.items, start=1)}
    ids = {
        key: [[position[path] for path in layout.own[part]]]
        for part, key in (("train", "trnid"), ("val", "valid"), ("test", "tstid"))
    }
    savemat(folder / "setid.mat", ids)
    (folder / "cat_to_name.json").write_text(json.dumps({str(key): name for key, name in names.items()}))
    return layout


def cub(root: Path, per_class: int = 6) -> Layout:
    folder = root / "cub"
    layout = Layout("cub", folder, folder / "CUB_200_2011" / "images")
    birds = ["Black_footed_Albatross", "Laysan_Albatross", *(f"Bird_{number}" for number in range(3, 201))]
    classes = [(f"{number:03d}.{bird}", bird.replace("_", " ").lower()) for number, bird in enumerate(birds, start=1)]
    fill(layout, per_class, classes, lambda c, n: f"{c}/{c.partition('.')[2]}_{n + 1:04d}.jpg")
    lists = folder / "CUB_200_2011"
    numbered = list(enumerate(layout.items, start=1))
    write_list(lists / "images.txt", [f"{number} {path}" for number, path in numbered])
    write_list(lists / "image_class_labels.txt", [f"{number} {layout.items[path][0] + 1}" for number, path in numbered])
    training = set(layout.own["train"])
    write_list(lists / "train_test_split.txt", [f"{number} {int(path in training)}" for number, path in numbered])
    return layout


def fgvc_aircraft(root: Path, per_class: int = 6) -> Layout:
    folder = root / "fgvc_aircraft"
    layout = Layout("fgvc_aircraft", folder, folder / "images")
    names = ["707-320", "F-16A/B", *(f"Type {number}" for number in range(98))]
    numbers = iter(range(34_000, 99_000))
    fill(layout, per_class, [("", name) for name in names], lambda _, n: f"{next(numbers):07d}.jpg", val=True)
    write_list(folder / "variants.txt", names)
    for part, paths in layout.own.items():
        lines = [f"{path.removesuffix('.jpg')} {layout.items[path][1]}" for path in paths]
        write_list(folder / f"images_variant_{part}.txt", lines)
    return layout


CALTECH = (
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


def caltech101(root: Path, per_class: int = 6) -> Layout:
    folder = root / "caltech-101"
    layout = Layout("caltech101", folder, folder / "101_ObjectCategories", "split_zhou_Caltech101.json", own=None)
    renamed = {"Faces": "face", "Leopards": "leopard", "Motorbikes": "motorbike", "airplanes": "airplane"}
    folders = CALTECH.split()
    classes = [(name, renamed.get(name, name)) for name in sorted(folders)]
    fill(layout, per_class, classes, lambda c, n: f"{c}/image_{n + 1:04d}.jpg")
    put(layout.images, "BACKGROUND_Google/image_0001.jpg", "Faces_easy/image_0001.jpg")
    return layout


def oxford_pets(root: Path, per_class: int = 6) -> Layout:
    folder = root / "oxford_pets"
    layout = Layout("oxford_pets", folder, folder / "images", "split_zhou_OxfordPets.json")
    breeds = ["Abyssinian", "american_bulldog", *(f"breed_{number:02d}" for number in range(35))]
    fill(layout, per_class, [(breed, breed.lower()) for breed in breeds], lambda c, n: f"{c}_{n + 1}.jpg")

    def line(path: str) -> str:
        return f"{path.removesuffix('.jpg')} {layout.items[path][0] + 1} 1 1"

    write_list(folder / "annotations" / "trainval.txt", [line(path) for path in layout.own["train"]])
    write_list(folder / "annotations" / "test.txt", [line(path) for path in layout.own["test"]])
    head = ["#Image CLASS-ID SPECIES BREED ID", "#ID: 1:37 Class ids"]
    write_list(folder / "annotations" / "list.txt", [*head, *(line(path) for path in layout.items)])
    return layout


def stanford_cars(root: Path, per_class: int = 6) -> Layout:
    from scipy.io import savemat

    folder = root / "stanford_cars"
    layout = Layout("stanford_cars", folder, folder, "split_zhou_StanfordCars.json")
    models = ["AM General Hummer SUV 2000", *(f"Maker Model {number} 2012" for number in range(195))]
    counts = {"cars_train": iter(range(1, 9_999)), "cars_test": iter(range(1, 9_999))}

    def file(_: str, number: int) -> str:
        part = "cars_train" if parts(number, per_class, val=False) == "train" else "cars_test"
        return f"{part}/{next(counts[part]):05d}.jpg"

    fill(layout, per_class, [(model, f"{model[-4:]} {model[:-5]}") for model in models], file)
    (folder / "devkit").mkdir()
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": np.array([models], dtype=object)})
    for part, name in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        notes = np.zeros((1, len(layout.own[part])), dtype=[("bbox_x1", "O"), ("class", "O"), ("fname", "O")])
        for column, path in enumerate(layout.own[part]):
            notes[0, column] = (1, layout.items[path][0] + 1, Path(path).name)
        savemat(folder / name, {"annotations": notes})
    return layout


def food101(root: Path, per_class: int = 6) -> Layout:
    folder = root / "food-101"
    layout = Layout("food101", folder, folder / "images", "split_zhou_Food101.json")
    names = ["apple_pie", *(f"dish_{number:03d}" for number in range(100))]
    fill(layout, per_class, [(name, name) for name in names], lambda c, n: f"{c}/{1_000_000 + n}.jpg")
    for part in ("train", "test"):
        lines = [path.removesuffix(".jpg") for path in layout.own[part]]
        write_list(folder / "meta" / f"{part}.txt", lines)
    return layout


def sun397(root: Path, per_class: int = 6) -> Layout:
    folder = root / "sun397"
    layout = Layout("sun397", folder, folder / "SUN397", "split_zhou_SUN397.json")
    classes = [
        ("a/abbey", "abbey"),
        ("a/apartment_building/outdoor", "outdoor apartment_building"),
        *((f"b/scene_{number:03d}", f"scene_{number:03d}") for number in range(395)),
    ]
    fill(layout, per_class, classes, lambda c, n: f"{c}/sun_{n}.jpg")
    write_list(folder / "ClassName.txt", [f"/{name}" for name, _ in classes])
    write_list(folder / "Training_01.txt", [f"/{path}" for path in layout.own["train"]])
    write_list(folder / "Testing_01.txt", [f"/{path}" for path in layout.own["test"]])
    return layout


def ucf101(root: Path, per_class: int = 6) -> Layout:
    folder = root / "ucf101"
    layout = Layout("ucf101", folder, folder / "UCF-101-midframes", "split_zhou_UCF101.json")
    second = [f"{chr(65 + number // 26)}{chr(97 + number % 26)}" for number in range(100)]
    actions = ["Apply_Eye_Makeup", *(f"Play_{word}" for word in second)]
    fill(
        layout,
        per_class,
        [(action, action) for action in actions],
        lambda c, n: f"{c}/v_{c.replace('_', '')}_g01_c{n:02d}.jpg",
    )
    lists = folder / "ucfTrainTestlist"
    write_list(lists / "classInd.txt", [f"{n} {action.replace('_', '')}" for n, action in enumerate(actions, start=1)])

    def video(path: str) -> str:
        action, name = path.split("/")
        return f"{action.replace('_', '')}/{name.replace('.jpg', '.avi')}"

    training = [f"{video(path)} {layout.items[path][0] + 1}" for path in layout.own["train"]]
    write_list(lists / "trainlist01.txt", training)
    write_list(lists / "testlist01.txt", [video(path) for path in layout.own["test"]])
    return layout


def imagenet(root: Path, per_class: int = 2) -> Layout:
    folder = root / "imagenet"
    layout = Layout("imagenet", folder, folder / "images")
    classes = [(f"n{1_440_764 + number:08d}", f"thing {number}") for number in range(1000)]
    fill(layout, per_class, classes, lambda c, n: f"{'train' if n < per_class // 2 else 'val'}/{c}/{c}_{n}.JPEG")
    write_list(folder / "classnames.txt", [f"{wnid} {name}" for wnid, name in classes])
    return layout


BUILDERS: dict[str, Callable[..., Layout]] = {
    build.__name__: build
    for build in (
        eurosat,
        resisc45,
        oxford_flowers,
        dtd,
        cub,
        fgvc_aircraft,
        caltech101,
        oxford_pets,
        stanford_cars,
        food101,
        sun397,
        ucf101,
        imagenet,
    )
}
