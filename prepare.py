"""Fetch a data set, or say what to fetch by hand; lay it out as CoOp does (its DATASETS.md), and verify it."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
sys.path.append(str(ROOT / "compat"))  # last: an installed Dassl wins

from air_plugin.utils.errors import UserError, exit_code, is_disk_full, unknown  # noqa: E402
from air_plugin.utils.extras import require_extra  # noqa: E402
from datasets.download import download, unpack  # noqa: E402

DOWNLOADS = ".downloads"  # below the data root; an archive that was fetched by hand may be put there, too
DRIVE = "https://drive.google.com/file/d/{}/view"
OXFORD = "https://www.robots.ox.ac.uk/~vgg/data"


@dataclass(frozen=True)
class File:
    """A file at a public address.

    takes: path in the archive -> path in the data set's folder; a file that is no archive has the one path "".
    inner: an archive in the archive that holds these.
    checksum: as published (torchvision, torchgeo or the data set's own site); empty: none is.
    """

    address: str
    takes: Mapping[str, str]
    checksum: str = ""
    inner: str = ""

    @property
    def name(self) -> str:
        return self.address.rpartition("/")[2]


@dataclass(frozen=True)
class ByHand:
    """What has no public address that a program may use.

    what: in words. where: the address for people. puts: path in the data set's folder.
    """

    what: str
    where: str
    puts: str


@dataclass(frozen=True)
class Source:
    """Where a data set comes from.

    folder: below the data root. needed: by hand, without it the data set cannot be used. optional: by hand, what for
    is part of `what`.
    """

    folder: str
    files: Sequence[File] = ()
    needed: Sequence[ByHand] = ()
    optional: Sequence[ByHand] = field(default=())


def split_by_zhou(name: str, drive: str) -> ByHand:
    """CoOp's split of a data set, which lies on Google Drive."""
    file = f"split_zhou_{name}.json"
    what = f"CoOp's own split (without it one of the same kind is made, seed 0): {file}"
    return ByHand(what, DRIVE.format(drive), file)


def split_of_elevater(name: str, ending: str) -> ByHand:
    """ELEVATER's lists, for DATASET.SPLIT_FAMILY elevater."""
    files = f"train.{ending}, val.{ending}, test.{ending}"
    where = "https://github.com/Computer-Vision-in-the-Wild/DataDownload"
    return ByHand(f"ELEVATER's lists of {name} (for DATASET.SPLIT_FAMILY elevater only): {files}", where, "")


SOURCES: dict[str, Source] = {
    "eurosat": Source(
        "eurosat",
        [
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
    ),
    "resisc45": Source(
        "resisc45",
        [
            File(
                "https://hf.co/datasets/torchgeo/resisc45/resolve/a826b44d938a883185f11ebe3d512d38b464312f/"
                "NWPU-RESISC45.zip",
                {"NWPU-RESISC45": "NWPU-RESISC45"},
                "md5:75206b2e16446591afa88e2628744886",
            )
        ],
        optional=[split_of_elevater("resisc45_clip", "json")],
    ),
    "oxford_flowers": Source(
        "oxford_flowers",
        [
            File(f"{OXFORD}/flowers/102/102flowers.tgz", {"jpg": "jpg"}, "md5:52808999861908f626f3c1f4e79d11fa"),
            File(
                f"{OXFORD}/flowers/102/imagelabels.mat", {"": "imagelabels.mat"}, "md5:e0620be6f572b9609742df49c70aed4d"
            ),
            File(f"{OXFORD}/flowers/102/setid.mat", {"": "setid.mat"}, "md5:a5357ecc9cb78c4bef273ce3793fc85c"),
        ],
        optional=[
            ByHand(
                "CoOp's class names (without them torchvision's serve): cat_to_name.json",
                DRIVE.format("1AkcxCXeK_RCGCEC_GvmWxjcjaNhu-at0"),
                "cat_to_name.json",
            ),
            split_by_zhou("OxfordFlowers", "1Pp0sRXzZFZq15zVOzKjKBu4A9i01nozT"),
        ],
    ),
    "dtd": Source(
        "dtd",
        [
            File(
                f"{OXFORD}/dtd/download/dtd-r1.0.1.tar.gz",
                {name: name for name in ("images", "imdb", "labels")},
                "md5:fff73e5086ae6bdbea199a49dfb8a4c1",
            )
        ],
        optional=[split_by_zhou("DescribableTextures", "1u3_QfB467jqHgNXC00UIzbLZRQCg2S7x")],
    ),
    "cub": Source(
        "cub",
        [
            File(
                "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
                {"CUB_200_2011": "CUB_200_2011"},
                "md5:97eceeb196236b17998738112f37df78",
            )
        ],
    ),
    "fgvc_aircraft": Source(
        "fgvc_aircraft",
        [
            File(
                f"{OXFORD}/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz",
                {
                    f"data/{name}": name
                    for name in (
                        "images",
                        "variants.txt",
                        "families.txt",
                        "manufacturers.txt",
                        "images_variant_train.txt",
                        "images_variant_val.txt",
                        "images_variant_trainval.txt",
                        "images_variant_test.txt",
                    )
                },
            )
        ],
    ),
    "caltech101": Source(
        "caltech-101",
        [
            File(
                "https://data.caltech.edu/records/mzrjq-6wc02/files/caltech-101.zip",
                {"101_ObjectCategories": "101_ObjectCategories"},
                "md5:3138e1922a9193bfa496528edbbc45d0",
                inner="101_ObjectCategories.tar.gz",
            )
        ],
        optional=[split_by_zhou("Caltech101", "1hyarUivQE36mY6jSomru6Fjd-JzwcCzN")],
    ),
    "oxford_pets": Source(
        "oxford_pets",
        [
            File(f"{OXFORD}/pets/data/images.tar.gz", {"images": "images"}, "md5:5c4f3ee8e5d25df40f4fd59a7f44e54c"),
            File(
                f"{OXFORD}/pets/data/annotations.tar.gz",
                {"annotations": "annotations"},
                "md5:95a8c909bbe2e81eed6a22bccdf3f68f",
            ),
        ],
        optional=[split_by_zhou("OxfordPets", "1501r8Ber4nNKvmlFVQZ8SeUHTcdTTEqs")],
    ),
    "stanford_cars": Source(
        "stanford_cars",
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
    ),
    "food101": Source(
        "food-101",
        [
            File(
                "http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz",
                {"images": "images", "meta": "meta"},
                "md5:85eeb15f3717b99a5da872d97d918f87",
            )
        ],
        optional=[split_by_zhou("Food101", "1QK0tGi096I0Ba6kggatX1ee6dJFIcEJl")],
    ),
    "sun397": Source(
        "sun397",
        [
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
    ),
    "ucf101": Source(
        "ucf101",
        [
            File(
                "https://www.crcv.ucf.edu/data/UCF101/UCF101TrainTestSplits-RecognitionTask.zip",
                {"ucfTrainTestlist": "ucfTrainTestlist"},
            )
        ],
        needed=[
            ByHand(
                "the middle frames, by CoOp's authors: UCF-101-midframes.zip",
                DRIVE.format("10Jqome3vtUA2keJkNanAiFpgbyC9Hc2O"),
                "UCF-101-midframes",
            )
        ],
        optional=[split_by_zhou("UCF101", "1I0S0q91hJfsV9Gf4xDIjgDq4AqBNJb1y")],
    ),
    "imagenet": Source(
        "imagenet",
        needed=[
            *(
                ByHand(
                    f"ILSVRC 2012, a folder of images for each of 1,000 classes (n01440764 ...): {file}",
                    "https://image-net.org/challenges/LSVRC/2012/2012-downloads.php (an account is needed)",
                    path,
                )
                for file, path in (
                    ("ILSVRC2012_img_train.tar", "images/train"),
                    ("ILSVRC2012_img_val.tar", "images/val"),
                )
            ),
            ByHand(
                "the class names: classnames.txt", DRIVE.format("1-61f_ol79pViBFDG_IDlUQSwoLcn2XXF"), "classnames.txt"
            ),
        ],
    ),
}
WRITTEN = ("digits", "digits_inverted", "digits_rotated", "digits_noisy")  # from what scikit-learn brings along
OWN = (*WRITTEN, "folder")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", metavar="DATASET", help=", ".join([*SOURCES, *OWN]))
    parser.add_argument("--root", metavar="DATA", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--check", action="store_true", help="fetch nothing; count images, name what is missing")
    parser.add_argument("--split-family", default="zhou", choices=("zhou", "elevater"), help="whose lists are checked")
    return parser.parse_args(argv)


# Fetching


def fetch(name: str, source: Source, root: Path) -> list[ByHand]:
    """Fetch and lay out what is not there yet; returns what must still be fetched by hand.

    Raises:
        UserError: an address fails, an archive is not what it should be, or the folder cannot be written to.
        OSError: the disk is full.
    """
    from filelock import FileLock

    folder, downloads = root / source.folder, root / DOWNLOADS / name

    def is_there(file: File) -> bool:
        return all((folder / target).exists() for target in file.takes.values())

    try:
        for file in source.files:
            if is_there(file):
                continue
            downloads.mkdir(parents=True, exist_ok=True)
            with FileLock(downloads / "lock"):  # the same command may run twice
                if is_there(file):
                    continue
                print(f"{name}: {file.address}")
                lay_out(download(file.address, downloads / file.name, checksum=file.checksum), file, folder)
                print(f"{name}: {downloads / file.name} may be removed")
    except OSError as error:
        if is_disk_full(error):
            raise
        raise UserError(f"cannot write to {error.filename or root}: {error.strerror}") from error
    return [item for item in source.needed if not (folder / item.puts).exists()]


def lay_out(archive: Path, file: File, folder: Path) -> None:
    """Put what an archive holds where it belongs; what is there already is left as it is.

    A path appears only when it is whole: archives are unpacked beside it and moved.

    Raises:
        UserError: the archive does not hold what it should.
    """
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder.parent / f".{folder.name}.{uuid.uuid4().hex}.tmp"
    try:
        if "" in file.takes:
            beside.mkdir()
            found = {file.takes[""]: Path(shutil.copyfile(archive, beside / archive.name))}
        else:
            opened = unpack(archive, beside / "outer")
            if file.inner:
                opened = unpack(inside(opened, file.inner, archive), beside / "inner")
            found = {target: inside(opened, path, archive) for path, target in file.takes.items()}
        for target, path in found.items():
            if not (folder / target).exists():
                (folder / target).parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, folder / target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def inside(folder: Path, path: str, archive: Path) -> Path:
    """The file or folder with this path at the shallowest level below a folder, for archives differ in what is on top.

    Raises:
        UserError: there is none.
    """
    level = [folder]
    while level:
        for top in level:
            if (top / path).exists():
                return top / path
        level = sorted(below for top in level for below in top.iterdir() if below.is_dir())
    raise UserError(f"{archive} holds no {path}; it is not the published archive: remove it, and it is fetched again")


def by_hand(items: Sequence[ByHand], folder: Path) -> str:
    """What a person has to fetch, from where and where to."""
    lines = []
    for item in items:
        lines += [f"  {item.what}", f"    from {item.where}", f"    to   {folder / item.puts}"]
    return "\n".join(lines)


# Verifying


def load(name: str, root: Path, family: str) -> Any:
    """The data set as a run sees it.

    Raises:
        UserError: something is missing or damaged; the message names the first thing.
    """
    from importlib import import_module

    from dassl.data.datasets import DATASET_REGISTRY

    import train

    for module in train.DATASETS:
        import_module(f"datasets.{module}")
    files = ["--dataset-config-file", str(ROOT / "configs" / "datasets" / f"{name}.yaml")]
    cfg = train.setup_config(train.parse(["--root", str(root), *files, "DATASET.SPLIT_FAMILY", family]))
    return DATASET_REGISTRY.get(cfg.DATASET.NAME)(cfg)


def counts(data: Any) -> list[list[Any]]:
    """A row a class: its name, and how many labelled images there are in train, val and test."""
    parts = [Counter(item.label for item in items or ()) for items in (data.train_x, data.val, data.test)]
    return [[name, *(part[label] for part in parts)] for label, name in enumerate(data.classnames)]


def check(name: str, root: Path, *, family: str) -> None:
    """Print how many images of each class there are.

    Raises:
        UserError: something is missing or damaged.
    """
    from tabulate import tabulate

    data = load(name, root, family)
    rows = counts(data)
    total = ["all", *(sum(row[part] for row in rows) for part in (1, 2, 3))]
    print(tabulate([*rows, total], headers=["class", "train", "val", "test"], disable_numparse=[0]))
    unlabelled = sum(item.label < 0 for item in data.train_x)
    if unlabelled:
        print(f"{unlabelled} images in train/ have no label" + ("" if any(total[1:]) else ", and there is no test/"))
    print(f"{name}: complete; run: DATA={shlex.quote(str(root))} bash scripts/air/main.sh {name}")


def run(args: argparse.Namespace) -> int:
    """Returns the exit code: 0 where the data set is ready, 2 where something is left to do."""
    require_extra("train", purpose="prepare.py")
    name, root = args.dataset, args.root.expanduser().absolute()
    again = f"python prepare.py {name} --root {shlex.quote(str(root))}"
    if name not in SOURCES and name not in OWN:
        raise unknown("data set", name, [*SOURCES, *OWN])
    if not root.is_dir():
        raise UserError(f"data root {root} is missing; make it first: mkdir -p {shlex.quote(str(root))}")
    if name in WRITTEN and args.check and not (root / name).is_dir():
        raise UserError(f"{root / name} is missing; make it: {again}")
    if name in SOURCES and not args.check:
        source = SOURCES[name]
        missing = fetch(name, source, root)
        if missing:
            print(f"{name}: this has no public address, fetch it by hand:\n{by_hand(missing, root / source.folder)}")
            print(f"then: {again}")
            return 2
        wanted = [item for item in source.optional if not item.puts or not (root / source.folder / item.puts).exists()]
        if wanted:
            print(f"{name}: left to your choice, by hand:\n{by_hand(wanted, root / source.folder)}")
    check(name, root, family=args.split_family)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code, 2 for bad input."""
    return exit_code(lambda: run(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
