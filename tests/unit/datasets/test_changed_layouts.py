"""Data sets on disk that are not as they were published, or no longer as they were: faults of public bug reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import layouts
import pytest
from layouts import BUILDERS, Layout
from PIL import Image

import prepare
from air_plugin.utils import class_names
from air_plugin.utils.errors import UserError
from datasets.splits import MADE
from scripts.compose import config_file, dataset_class, resolve

pytestmark = pytest.mark.public_reports


def load(layout: Layout, **flags: str) -> Any:
    settings = {"DATASET.ROOT": str(layout.folder.parent)} | {f"DATASET.{key}": text for key, text in flags.items()}
    cfg, _ = resolve([], dataset_file=config_file("datasets", layout.name, "data set"), flags=settings)
    return dataset_class(cfg.DATASET.NAME)(cfg)


def fault(layout: Layout, **flags: str) -> str:
    with pytest.raises(UserError) as caught:
        load(layout, **flags)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def listed(data: Any) -> list[str]:
    return sorted(item.impath for part in (data.train_x, data.val, data.test) for item in part or ())


# A split that was made from part of the images (item 7)


@pytest.mark.parametrize("name", ["dtd", "caltech101", "resisc45"])
def test_a_made_split_is_refused_once_more_images_are_there(name: str, tmp_path: Path):
    """Item 7: it was kept for ever, and the new images were never used."""
    layout = BUILDERS[name](tmp_path)
    before = listed(load(layout))
    folders = sorted({Path(path).parent for path in layout.items})
    for folder in folders[:5]:
        layouts.put(layout.images / folder, "late_1.jpg", "late_2.jpg")
    said = fault(layout)
    assert said == (
        f"{layout.folder / MADE} was made from {len(before):,} images that were there then; today 10 images are new, "
        f"first {folders[0]}/late_1.jpg; remove it, and it is made again"
    )
    (layout.folder / MADE).unlink()
    assert len(listed(load(layout))) == len(before) + 10


def test_a_made_split_is_refused_once_lists_divide_otherwise(tmp_path: Path):
    """Item 7, where the data set's own lists name the test part."""
    layout = layouts.oxford_pets(tmp_path)
    load(layout)
    lists = {name: layout.folder / "annotations" / name for name in ("trainval.txt", "test.txt")}
    texts = {name: file.read_text().splitlines(keepends=True) for name, file in lists.items()}
    moved = texts["test.txt"].pop(0)
    lists["test.txt"].write_text("".join(texts["test.txt"]))
    lists["trainval.txt"].write_text("".join([*texts["trainval.txt"], moved]))
    said = fault(layout)
    assert "have another class or part" in said and said.endswith("remove it, and it is made again")


def test_the_authors_split_stays_whatever_else_is_there(tmp_path: Path):
    layout = layouts.dtd(tmp_path)
    layout.write_zhou()
    before = listed(load(layout))
    layouts.put(layout.images / "banded", "late_1.jpg")
    assert listed(load(layout)) == before


# Class names by folder (item 8)


@pytest.mark.parametrize(
    ("name", "folder", "new"),
    [("eurosat", "Pasture", "Meadow"), ("resisc45", "church", "abbey"), ("caltech101", "wild_cat", "lynx")],
)
def test_a_renamed_class_folder_is_named_and_gives_no_class_another_name(
    name: str, folder: str, new: str, tmp_path: Path
):
    """Item 8: any folder became a class, and names that go by position moved to other classes."""
    layout = BUILDERS[name](tmp_path)
    (layout.images / folder).rename(layout.images / new)
    for names in ("coop", "grip") if name == "eurosat" else ("coop",):
        said = fault(layout, CLASS_NAMES=names)
        assert said.startswith(
            f"{layout.images}: class folder {folder} is missing and folder {new} is no class's; rename"
        )
    assert not (layout.folder / MADE).exists()


@pytest.mark.parametrize("name", ["dtd", "food101"])
def test_folders_that_the_lists_do_not_name_are_no_classes(name: str, tmp_path: Path):
    """Item 8, where the data set's own lists name the classes."""
    layout = BUILDERS[name](tmp_path)
    folder = sorted(path.name for path in layout.images.iterdir() if path.is_dir())[1]
    (layout.images / folder).rename(layout.images / "strange")
    assert f"class folder {folder} is missing and folder strange is no class's" in fault(layout)


def test_a_folder_of_no_class_beside_imagenets_is_named(tmp_path: Path):
    """Item 8: its images were left out without a word."""
    layout = layouts.imagenet(tmp_path)
    layouts.put(layout.images / "train" / "n99999999", "1.JPEG")
    assert f"{layout.images / 'train'}: folder n99999999 is no class's; remove it" == fault(layout)


def test_grips_names_follow_the_classes_not_the_labels_of_a_split(tmp_path: Path):
    """Item 8: a split file may number EuroSAT's classes otherwise."""
    layout = layouts.eurosat(tmp_path)
    file = layout.write_zhou()
    split = json.loads(file.read_text())
    reverse = {part: [[path, 9 - label, name] for path, label, name in items] for part, items in split.items()}
    file.write_text(json.dumps(reverse))
    names = load(layout, CLASS_NAMES="grip").classnames
    assert names[0] == "lake or sea" and names[7] == "brushland or shrubland" and names[9] == "annual crop land"


@pytest.mark.parametrize(("name", "new"), [("eurosat", "EuroSAT_MS"), ("resisc45", "images"), ("caltech101", "101")])
def test_an_image_folder_of_another_name_is_to_be_renamed(name: str, new: str, tmp_path: Path):
    """Item 8: the message told to fetch what was there."""
    layout = BUILDERS[name](tmp_path)
    layout.images.rename(layout.folder / new)
    says = f"{name}: {layout.images} is missing; {layout.folder / new} holds such folders: rename it"
    assert fault(layout) == says


# Which files are images (item 6)


def test_linked_class_folders_and_images_in_other_formats_are_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
):
    """Item 6: they vanished, and so did the rest without a word; prepare.py --check said complete."""
    layout = layouts.resisc45(tmp_path / "data")
    folder = layout.images / "island"
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    picture = Image.new("RGB", (8, 8), "teal")
    picture.save(folder / "island_7.gif")
    picture.save(folder / "island_8.jfif", format="jpeg")
    picture.save(folder / "island_9", format="png")
    (folder / "notes.rst").write_text("no image")
    (folder / "island_10.jpg").symlink_to(tmp_path / "nowhere.jpg")
    names = {Path(path).name for path in listed(load(layout)) if "/island/" in path}
    assert names == {*(f"island_{n:03d}.jpg" for n in range(1, 7)), "island_7.gif", "island_8.jfif", "island_9"}
    says = f"{layout.images}: left out 1 .rst files, 1 broken links; 273 images are used"
    assert says in caplog.messages

    root = tmp_path / "mine"
    for name in ("train/a.png", "train/sub/b.bmp"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(root / name)
    (root / "train/linked").symlink_to(tmp_path / "elsewhere")
    (root / "train/c.svg").write_text("<svg/>")
    (root / "classes.txt").write_text("hill\nlake\n")
    assert prepare.main(["folder", "--root", str(root), "--check"]) == 0
    told = capsys.readouterr()
    assert "11 images in train/ have no label" in told.out
    assert f"warning: {root}/train: left out 1 .rst files, 1 .svg files, 1 broken links; 11 images" in told.err


# Classes with one and the same prompt (item 11)


def test_classes_with_the_same_prompt_are_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Item 11: text encoders of CLIP read neither case nor underscores."""
    assert class_names.same_prompts(["Oak", "tea_pot", "elm", "tea pot", "oak", "Tea  Pot"]) == [
        ["Oak", "oak"],
        ["tea_pot", "tea pot", "Tea  Pot"],
    ]
    file = tmp_path / "names.txt"
    file.write_text("Beech\nfir\nbeech\npine_cone\npine cone\n")
    for _ in range(2):
        class_names.read_class_file(file)
    says = "4 of the classes have the prompt of another class: 'Beech' = 'beech'; 'pine_cone' = 'pine cone'"
    assert caplog.messages == [says]


def test_a_data_set_with_two_classes_of_one_name_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Item 11, as ImageNet has two classes of one name; each stays a class."""
    layout = layouts.stanford_cars(tmp_path)
    file = layout.write_zhou()
    split = json.loads(file.read_text())
    for item in (item for items in split.values() for item in items if item[1] in (3, 90)):
        item[2] = "2009 Roadster"
    file.write_text(json.dumps(split))
    data = load(layout)
    assert data.num_classes == 196 and data.classnames[3] == data.classnames[90]
    assert "2 of the classes have the prompt of another class: '2009 Roadster' = '2009 Roadster'" in caplog.messages
