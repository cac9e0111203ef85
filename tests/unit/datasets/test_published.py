"""Every published data set: a miniature of its real layout in both split families, and every kind of damage."""

from __future__ import annotations

import importlib
import json
import math
import random
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import layouts
import pytest
from layouts import BUILDERS, Layout

import train
from air_plugin.report.record import RunResult
from air_plugin.utils.errors import UserError
from air_plugin.utils.images import load_rgb
from datasets import splits
from datasets.base import warn_once
from datasets.published import FAMILIES, PublishedDataset
from datasets.splits import MADE, PARTS

ROOT = Path(__file__).resolve().parents[3]
NAMES = list(BUILDERS)
WITH_SPLIT = [name for name in NAMES if name not in ("resisc45", "cub", "fgvc_aircraft", "imagenet")]
WITH_LISTS = [name for name in NAMES if name != "caltech101"]
HELD_OUT = ["cub", "oxford_pets", "stanford_cars", "sun397", "ucf101"]  # CoOp keeps their own test lists
OWN_IS_ZHOU = ["fgvc_aircraft", "imagenet"]
DIVIDED = [name for name in NAMES if name not in [*HELD_OUT, *OWN_IS_ZHOU]]


def class_of(name: str) -> type[PublishedDataset]:
    module = importlib.import_module(f"datasets.{name}")
    (found,) = [kind for kind in vars(module).values() if isinstance(kind, type) and kind.__module__ == module.__name__]
    return found


def load(layout: Layout, **options: Any) -> PublishedDataset:
    from dassl.config import get_cfg_default

    from air_plugin.config import add_air_config

    cfg = get_cfg_default()
    add_air_config(cfg)
    cfg.DATASET.ROOT = str(layout.folder.parent)
    for key, value in options.items():
        assert key in cfg.DATASET
        cfg.DATASET[key] = value
    return class_of(layout.name)(cfg)


def plain(layout: Layout, items: list) -> list[tuple[str, int, str]]:
    return [(Path(item.impath).relative_to(layout.images).as_posix(), item.label, item.classname) for item in items]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Layout]:
    """One miniature a data set for the whole file; a test that changes one makes its own."""
    made: dict[str, Layout] = {}

    def get(name: str) -> Layout:
        if name not in made:
            made[name] = BUILDERS[name](tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture
def without_made(built: Callable[[str], Layout]) -> Callable[[str], Layout]:
    def get(name: str) -> Layout:
        layout = built(name)
        (layout.folder / MADE).unlink(missing_ok=True)
        if layout.split_file:
            (layout.folder / layout.split_file).unlink(missing_ok=True)
        return layout

    return get


def expect_whole(dataset: PublishedDataset, layout: Layout, parts: dict[str, list[str]]) -> None:
    """The lists, labels, names and hidden labels are what a plain loop over the layout says."""
    found = {"train": dataset.train_x, "val": dataset.val or [], "test": dataset.test}
    for part, paths in parts.items():
        want = [(path, *layout.items[path]) for path in paths]
        assert sorted(plain(layout, found[part])) == sorted(want), part
    assert dataset.classnames == layout.names
    assert dataset.num_classes == len(layout.names)
    assert dataset.lab2cname == dict(enumerate(layout.names))
    assert [item.label for item in dataset.train_u] == [-1] * len(parts["train"])
    assert [item.impath for item in dataset.train_u] == sorted(item.impath for item in dataset.train_x)
    assert dataset.hidden_labels == {str(layout.images / path): layout.items[path][0] for path in parts["train"]}


# The two families


@pytest.mark.parametrize("name", WITH_SPLIT)
def test_the_authors_split_is_read_as_it_is(name: str, without_made):
    layout = without_made(name)
    file = layout.write_zhou()
    written = {part: [path for path, _, _ in items] for part, items in json.loads(file.read_text()).items()}
    dataset = load(layout)
    expect_whole(dataset, layout, written)
    assert [path for path, _, _ in plain(layout, dataset.train_x)] == written["train"]  # shots depend on the order
    assert dataset.split_family == "zhou"
    assert not (layout.folder / MADE).exists()


@pytest.mark.parametrize("name", WITH_LISTS)
def test_elevater_is_the_own_train_and_test_lists(name: str, without_made):
    layout = without_made(name)
    before = sorted(path.name for path in layout.folder.iterdir())
    dataset = load(layout, SPLIT_FAMILY="elevater")
    expect_whole(
        dataset, layout, {"train": layout.own["train"] + layout.own["val"], "val": [], "test": layout.own["test"]}
    )
    assert dataset.split_family == "elevater"
    assert sorted(path.name for path in layout.folder.iterdir()) == before


@pytest.mark.parametrize("name", OWN_IS_ZHOU)
def test_where_coop_uses_the_own_lists_nothing_is_made(name: str, without_made):
    layout = without_made(name)
    dataset = load(layout)
    expect_whole(dataset, layout, layout.own)
    assert dataset.split_family == "zhou"
    assert not (layout.folder / MADE).exists()


@pytest.mark.parametrize("name", [*DIVIDED, *HELD_OUT])
def test_a_missing_split_is_made_saved_and_read_again(name: str, without_made):
    layout = without_made(name)
    before = {path.name for path in layout.folder.iterdir()}
    random.seed(5)
    first = load(layout)
    made = {
        part: [path for path, _, _ in plain(layout, items)]
        for part, items in (("train", first.train_x), ("val", first.val), ("test", first.test))
    }
    expect_whole(first, layout, made)
    assert first.split_family == "zhou, made here (seed 0)"
    assert {path.name for path in layout.folder.iterdir()} == before | {MADE}
    assert "zhou" not in MADE
    assert sorted(path for paths in made.values() for path in paths) == sorted(layout.items)
    for label, paths in layout.by_class().items():
        counts = {part: sum(layout.items[path][0] == label for path in some) for part, some in made.items()}
        total = len(paths)
        if name in HELD_OUT:
            own = sum(layout.items[path][0] == label for path in layout.own["train"])
            assert counts == {"train": own - round(own * 0.2), "val": round(own * 0.2), "test": total - own}
        else:
            train, val = round(total * 0.5), round(total * 0.2)
            assert counts == {"train": train, "val": val, "test": total - train - val}
    if name in HELD_OUT:
        assert sorted(made["test"]) == sorted(layout.own["test"])
    written = (layout.folder / MADE).read_bytes()
    again = load(layout)
    assert (layout.folder / MADE).read_bytes() == written
    for part in ("train_x", "train_u", "val", "test"):
        assert plain(layout, getattr(again, part)) == plain(layout, getattr(first, part))
    (layout.folder / MADE).unlink()
    random.seed(6)
    load(layout)
    assert (layout.folder / MADE).read_bytes() == written  # the same, whatever random numbers were used before


def test_a_made_split_is_drawn_and_not_the_order_of_names(tmp_path: Path):
    layout = layouts.eurosat(tmp_path, per_class=20)
    dataset = load(layout)
    train = {path for path, _, _ in plain(layout, dataset.train_x)}
    for paths in layout.by_class().values():
        assert train & set(paths) != set(sorted(paths)[: len(paths) // 2])


def test_a_folder_that_may_not_be_written_still_loads(tmp_path: Path, monkeypatch, caplog):
    layout = layouts.eurosat(tmp_path)
    want = load(layout)
    (layout.folder / MADE).unlink()

    def refuse(*args: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(splits, "write_atomically", refuse)
    found = load(layout)
    assert plain(layout, found.train_x) == plain(layout, want.train_x)
    assert "cannot be written" in caplog.text

    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(splits, "write_atomically", full)
    with pytest.raises(OSError, match="No space"):
        load(layout)


def test_sizes_other_than_the_published_are_warned_about_once(tmp_path: Path, monkeypatch, caplog):
    layout = layouts.oxford_pets(tmp_path)
    for _ in range(2):
        load(layout, SPLIT_FAMILY="elevater")
    says = f"{layout.folder} has 111 + 0 + 111 train + val + test images; published: 3,680 + 0 + 3,669"
    assert caplog.messages == [says]
    caplog.clear()
    warn_once.cache_clear()
    monkeypatch.setattr(class_of("oxford_pets"), "sizes", {"elevater": (111, 0, 111)})
    load(layout, SPLIT_FAMILY="elevater")
    assert not caplog.messages


def test_names_are_registered_and_folders_are_those_of_coop():
    from dassl.data.datasets import DATASET_REGISTRY

    found = {name: (class_of(name).__name__, class_of(name).dataset_dir) for name in NAMES}
    assert found == {
        "eurosat": ("EuroSAT", "eurosat"),
        "resisc45": ("RESISC45", "resisc45"),
        "oxford_flowers": ("OxfordFlowers", "oxford_flowers"),
        "dtd": ("DescribableTextures", "dtd"),
        "cub": ("CUB", "cub"),
        "fgvc_aircraft": ("FGVCAircraft", "fgvc_aircraft"),
        "caltech101": ("Caltech101", "caltech-101"),
        "oxford_pets": ("OxfordPets", "oxford_pets"),
        "stanford_cars": ("StanfordCars", "stanford_cars"),
        "food101": ("Food101", "food-101"),
        "sun397": ("SUN397", "sun397"),
        "ucf101": ("UCF101", "ucf101"),
        "imagenet": ("ImageNet", "imagenet"),
    }
    assert {kind for kind, _ in found.values()} <= set(DATASET_REGISTRY.registered_names())


# Class names


def test_eurosat_has_both_published_sets_of_class_names(without_made):
    layout = without_made("eurosat")
    assert load(layout).classnames == layouts.EUROSAT_NAMES
    grip = [
        "annual crop land",
        "forest",
        "brushland or shrubland",
        "highway or road",
        "industrial buildings or commercial buildings",
        "pasture land",
        "permanent crop land",
        "residential buildings or homes or apartments",
        "river",
        "lake or sea",
    ]
    for family in ("zhou", "elevater"):
        dataset = load(layout, CLASS_NAMES="grip", SPLIT_FAMILY=family)
        assert dataset.classnames == grip
        assert {item.classname for item in dataset.test} == set(grip)
    saved = json.loads((layout.folder / MADE).read_text())
    assert {name for _, _, name in saved["train"]} == set(layouts.EUROSAT_NAMES)  # a split has CoOp's


def test_other_class_names_change_what_differs_only(without_made):
    for name, changed in (
        ("oxford_flowers", {15: "globe flower", 59: "pink and yellow dahlia", 92: "air plant"}),
        ("fgvc_aircraft", {1: "F-16A-B"}),
        ("dtd", {}),
        ("cub", {}),
        ("resisc45", {}),
    ):
        layout = without_made(name)
        want = [changed.get(label, text) for label, text in enumerate(layout.names)]
        assert load(layout, CLASS_NAMES="grip", SPLIT_FAMILY="elevater").classnames == want


@pytest.mark.parametrize(("name", "version"), [("food101", "grip"), ("eurosat", "gripp"), ("sun397", "")])
def test_an_unknown_set_of_class_names_is_refused(name: str, version: str, without_made):
    with pytest.raises(UserError, match=rf"unknown class names \(DATASET.CLASS_NAMES\) of {name} '{version}'; "):
        load(without_made(name), CLASS_NAMES=version)


def test_flowers_names_come_from_torchvision_where_the_file_is_missing(tmp_path: Path):
    layout = layouts.oxford_flowers(tmp_path)
    (layout.folder / "cat_to_name.json").unlink()
    names = load(layout).classnames
    assert names[0] == "pink primrose" and names[59] == "pink-yellow dahlia" and len(set(names)) == 102


# Shots and halves of the classes


@pytest.mark.parametrize("subset", ["all", "base", "new"])
def test_shots_and_subsets_are_those_of_a_plain_loop(subset: str, tmp_path: Path):
    layout = layouts.resisc45(tmp_path, per_class=20)  # 45 classes: the first half is 23
    whole = load(layout)
    random.seed(3)
    found = load(layout, NUM_SHOTS=2, SUBSAMPLE_CLASSES=subset)
    random.seed(3)
    expected = {}
    for part, items, shots in (("train", whole.train_x, 2), ("val", whole.val, 2)):
        chosen = []
        groups: dict[int, list] = {}
        for item in items:
            groups.setdefault(item.label, []).append(item)
        for group in groups.values():
            chosen += random.sample(group, shots) if len(group) >= shots else group
        expected[part] = chosen
    half = math.ceil(45 / 2)
    labels = {"all": list(range(45)), "base": list(range(half)), "new": list(range(half, 45))}[subset]
    number = {label: position for position, label in enumerate(labels)}

    def kept(items: list) -> list[tuple[str, int, str]]:
        return [(path, number[label], text) for path, label, text in plain(layout, items) if label in number]

    assert plain(layout, found.train_x) == kept(expected["train"])
    assert plain(layout, found.val) == kept(expected["val"])
    assert plain(layout, found.test) == kept(whole.test)
    assert found.classnames == [layout.names[label] for label in labels]
    every = {item.impath: number[item.label] for item in whole.train_x if item.label in number}
    assert found.hidden_labels == every  # all training images of these classes, not the shots
    assert [(item.impath, item.label) for item in found.train_u] == [(path, -1) for path in sorted(every)]


@pytest.mark.parametrize(
    ("shots", "train", "val"), [(-1, 150, 60), (1, 10, 10), (2, 20, 20), (8, 80, 40), (16, 150, 40)]
)
def test_val_has_at_most_four_shots_and_no_class_more_than_it_has(shots: int, train: int, val: int, tmp_path: Path):
    found = load(layouts.eurosat(tmp_path, per_class=30), NUM_SHOTS=shots)
    assert (len(found.train_x), len(found.val), len(found.test), len(found.train_u)) == (train, val, 90, 150)


def test_an_unknown_subset_or_family_is_refused(without_made):
    layout = without_made("eurosat")
    with pytest.raises(UserError, match=r"unknown DATASET.SUBSAMPLE_CLASSES 'bas'; did you mean base\?"):
        load(layout, SUBSAMPLE_CLASSES="bas")
    with pytest.raises(UserError, match=r"unknown split family .* 'elevator'; did you mean elevater\?"):
        load(layout, SPLIT_FAMILY="elevator")


# Damage: one line, and what to do


def message(layout: Layout, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(layout, **options)
    said = str(caught.value)
    assert "\n" not in said and said.isascii()
    return said


def command(layout: Layout) -> str:
    return f"python prepare.py {layout.name} --root {shlex.quote(str(layout.folder.parent))}"


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_folder(name: str, tmp_path: Path):
    kind = class_of(name)
    folder = tmp_path / "data" / kind.dataset_dir
    layout = Layout(name, folder, folder / kind.image_dir)
    for family in FAMILIES:
        said = message(layout, SPLIT_FAMILY=family)
        assert said == f"{name}: {tmp_path / 'data'} is missing; fetch it: {command(layout)}"
    folder.parent.mkdir()
    assert message(layout) == f"{name}: {folder} is missing; fetch it: {command(layout)}"
    folder.mkdir()
    first = layout.images if kind.image_dir else folder / "devkit" / "cars_meta.mat"
    assert message(layout) == f"{name}: {first} is missing; fetch it: {command(layout)}"


@pytest.mark.parametrize("name", WITH_LISTS)
def test_a_missing_image_of_the_own_lists(name: str, tmp_path: Path):
    layout = BUILDERS[name](tmp_path)
    if name == "imagenet":  # folders are its lists: a class without images is what can be missing
        shutil.rmtree(layout.images / "val" / "n01440770")
        said = message(layout, SPLIT_FAMILY="elevater")
        assert said.startswith(f"{layout.images / 'val'}: class folder n01440770 is missing; fetch it: ")
        return
    first, second = layout.own["test"][3], layout.own["test"][8]
    (layout.images / second).unlink()
    (layout.images / first).unlink()
    total = len(layout.items)
    said = message(layout, SPLIT_FAMILY="elevater")
    assert f"2 of {total} images are missing, first: {layout.images}" in said and said.endswith(command(layout))
    assert Path(first).name in said or Path(second).name in said


@pytest.mark.parametrize("name", WITH_SPLIT)
def test_a_missing_image_of_the_authors_split(name: str, tmp_path: Path):
    layout = BUILDERS[name](tmp_path)
    split = json.loads(layout.write_zhou().read_text())
    gone = split["train"][4][0]
    (layout.images / gone).unlink()
    said = message(layout)
    assert said == (f"1 of {len(layout.items)} images are missing, first: {layout.images / gone}; {command(layout)}")


@pytest.mark.parametrize("name", [*DIVIDED, *HELD_OUT])
def test_a_missing_image_of_a_split_that_was_made_here(name: str, tmp_path: Path):
    layout = BUILDERS[name](tmp_path)
    gone = Path(load(layout).test[2].impath)
    gone.unlink()
    assert message(layout) == f"1 of {len(layout.items)} images are missing, first: {gone}; {command(layout)}"


@pytest.mark.parametrize("name", NAMES)
def test_a_truncated_image_is_named_when_it_is_read(name: str, built):
    layout = built(name)
    cut = layout.images / next(iter(layout.items))
    whole = cut.read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    try:
        dataset = load(layout)
        assert str(cut) in {item.impath for item in (*dataset.train_x, *(dataset.val or []), *dataset.test)}
        with pytest.raises(UserError, match=f"cannot read image {re.escape(str(cut))}: "):
            load_rgb(cut)
    finally:
        cut.write_bytes(whole)


def test_damage_ends_a_run_with_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    layout = layouts.eurosat(tmp_path / "my data")
    split = json.loads(layout.write_zhou().read_text())
    cut = layout.images / split["test"][0][0]
    line = [
        "--root",
        str(layout.folder.parent),
        "--output-dir",
        str(tmp_path / "run"),
        "--trainer",
        "ZeroshotCLIP",
        "--dataset-config-file",
        str(ROOT / "configs/datasets/eurosat.yaml"),
        "--config-file",
        str(ROOT / "configs/trainers/ZeroshotCLIP/mini.yaml"),
        "AIR.CACHE",
        str(tmp_path / "cache"),
    ]
    prepare = f"python prepare.py eurosat --root '{tmp_path / 'my data'}'"  # to be pasted into a shell
    for damage, says in (
        (lambda: cut.write_bytes(cut.read_bytes()[:200]), f"cannot read image {cut}: "),
        (cut.unlink, f"1 of 60 images are missing, first: {cut}; {prepare}\n"),
        (lambda: shutil.rmtree(layout.folder), f"{layout.folder} is missing; fetch it: {prepare}\n"),
    ):
        damage()
        capsys.readouterr()
        assert train.main(line) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if "published: " not in line]  # it is small
        assert len(lines) == 1 and lines[0].startswith("error: ") and says in f"{lines[0]}\n"


def test_a_folder_in_the_place_of_an_image_is_no_image(tmp_path: Path):
    layout = layouts.eurosat(tmp_path)
    layout.write_zhou()
    gone = layout.images / "River" / "River_1.jpg"
    gone.unlink()
    gone.mkdir()
    assert "1 of 60 images are missing" in message(layout)
    gone.rmdir()
    gone.symlink_to(tmp_path / "nowhere.jpg")
    assert "1 of 60 images are missing" in message(layout)


def change_split(layout: Layout, change: Callable[[dict], Any]) -> None:
    file = layout.write_zhou()
    split = json.loads(file.read_text())
    file.write_text(json.dumps(change(split)))


def without(part: str) -> Callable[[dict], dict]:
    return lambda split: {key: items for key, items in split.items() if key != part}


def with_item(*item: Any) -> Callable[[dict], dict]:
    return lambda split: {**split, "train": [*split["train"], list(item)]}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda split: [], "is damaged or no split file (TypeError"),
        (lambda split: {"names": []}, "is damaged or no split file (KeyError: 'train')"),
        (without("val"), "is damaged or no split file (KeyError: 'val')"),
        (with_item("River/River_1.jpg", 8), "is damaged or no split file (TypeError"),
        (with_item("River/River_1.jpg", "eight", "River"), "is damaged or no split file (ValueError"),
        (with_item(7, 8, "River"), "is damaged or no split file (TypeError: 7 and 'River' must be texts)"),
        (with_item("/etc/River_1.jpg", 8, "River"), "/etc/River_1.jpg leaves the image folder"),
        (with_item("River/../../x.jpg", 8, "River"), "River/../../x.jpg leaves the image folder"),
        (with_item("River/River_1.jpg", 10, "River"), "label 10 of River/River_1.jpg is not within 0 to 9; "),
        (with_item("River/River_1.jpg", -1, "River"), "label -1 of River/River_1.jpg is not within 0 to 9; "),
        (with_item("River/River_1.jpg", 8, "Stream"), "label 8 has two names, 'River' and 'Stream'"),
        (lambda split: {**split, "test": split["test"][:-4]}, "no test image of 2 of 10 classes, first 8 (River)"),
        (lambda split: {**split, "train": []}, "no train image of 10 of 10 classes"),
    ],
)
def test_a_split_file_that_is_foreign_or_wrong(change: Callable[[dict], Any], fault: str, tmp_path: Path):
    layout = layouts.eurosat(tmp_path)
    change_split(layout, change)
    said = message(layout)
    assert fault in said and str(layout.folder / "split_zhou_EuroSAT.json") in said and said.endswith(command(layout))


def test_a_split_file_that_is_cut_short_and_another_data_sets(tmp_path: Path):
    layout = layouts.eurosat(tmp_path)
    file = layout.write_zhou()
    file.write_bytes(file.read_bytes()[:-100])
    said = message(layout)
    assert f"{file} is damaged or no split file (JSONDecodeError" in said
    assert said.endswith(command(layout))
    file.write_bytes(b"\xff\xfe\x00")
    assert f"{file} is damaged or no split file (UnicodeDecodeError" in message(layout)
    shutil.copy(layouts.dtd(tmp_path).write_zhou(), file)
    assert "is not within 0 to 9" in message(layout)


@pytest.mark.parametrize("name", WITH_SPLIT)
def test_every_authors_split_that_is_broken_lacks_a_class_or_is_of_other_classes(name: str, without_made):
    layout = without_made(name)
    file = layout.write_zhou()
    split, number = json.loads(file.read_text()), len(layout.names)
    for change, fault in (
        (file.read_text()[:-100], f"{file} is damaged or no split file (JSONDecodeError"),
        (
            {**split, "test": [item for item in split["test"] if item[1] != 3]},
            f"{file}: no test image of 1 of {number} classes, first 3 ({layout.names[3]}); ",
        ),
        ({**split, "val": [[split["val"][0][0], number, "another"]]}, f"is not within 0 to {number - 1}; "),
        ({**split, "val": [["no/such.jpg", 0, layout.names[0]]]}, "images are missing, first: "),
    ):
        file.write_text(change if isinstance(change, str) else json.dumps(change))
        said = message(layout)
        assert fault in said and said.endswith(command(layout))


def test_a_split_that_was_made_here_and_is_damaged(tmp_path: Path):
    layout = layouts.eurosat(tmp_path)
    load(layout)
    made = layout.folder / MADE
    made.write_bytes(made.read_bytes()[:-9])
    assert message(layout).endswith("remove it, and it is made again")
    split = {"train": [["River/River_1.jpg", 8, "River"]], "val": [], "test": []}
    made.write_text(json.dumps(split))
    said = message(layout)
    assert said.startswith(f"{made}: no train image of 9 of 10 classes") and said.endswith("and it is made again")
    made.unlink()
    load(layout)


@pytest.mark.parametrize("name", [name for name in DIVIDED if name != "oxford_flowers"])
def test_an_empty_and_a_missing_class_folder(name: str, tmp_path: Path):
    layout = BUILDERS[name](tmp_path)
    folder = (layout.images / next(reversed(layout.items))).parent
    for path in folder.iterdir():
        path.unlink()
    put_aside = folder / "notes.txt"
    put_aside.write_text("no image")
    assert message(layout) == f"{folder} has no images; {command(layout)}"
    put_aside.unlink()
    folder.rmdir()
    missing = f"{layout.images}: class folder {folder.name} is missing"
    assert message(layout) == f"{missing}; fetch it: {command(layout)}"
    strange = layout.images / "one_too_many"
    layouts.put(strange, "1.jpg")
    said = message(layout)
    assert said == f"{missing} and folder one_too_many is no class's; rename it, or fetch it: {command(layout)}"
    layouts.put(folder, "1.jpg")
    assert message(layout) == f"{layout.images}: folder one_too_many is no class's; remove it"
    assert not (layout.folder / MADE).exists()


def test_a_class_that_is_too_small_to_be_divided(tmp_path: Path):
    layout = layouts.eurosat(tmp_path, per_class=3)
    said = message(layout)
    assert "(class Annual Crop Land has only 3 images, too few for a test part)" in said
    assert said.endswith(command(layout))


def edit(path: Path, change: Callable[[list[str]], list[str]]) -> None:
    path.write_text("".join(f"{line}\n" for line in change(path.read_text().splitlines())))


LISTS = {
    "eurosat": "test.txt",
    "dtd": "labels/test1.txt",
    "cub": "CUB_200_2011/train_test_split.txt",
    "fgvc_aircraft": "images_variant_test.txt",
    "oxford_pets": "annotations/test.txt",
    "food101": "meta/test.txt",
    "sun397": "Testing_01.txt",
    "ucf101": "ucfTrainTestlist/testlist01.txt",
}
EVERY_LIST = {
    "eurosat": ["train.txt", "val.txt", "test.txt"],
    "resisc45": ["train.json", "val.json", "test.json"],
    "oxford_flowers": ["imagelabels.mat", "setid.mat"],
    "dtd": ["labels/train1.txt", "labels/val1.txt", "labels/test1.txt"],
    "cub": [f"CUB_200_2011/{file}.txt" for file in ("images", "image_class_labels", "train_test_split")],
    "fgvc_aircraft": ["variants.txt", *(f"images_variant_{part}.txt" for part in PARTS)],
    "oxford_pets": ["annotations/trainval.txt", "annotations/test.txt"],
    "stanford_cars": ["devkit/cars_meta.mat", "devkit/cars_train_annos.mat", "cars_test_annos_withlabels.mat"],
    "food101": ["meta/train.txt", "meta/test.txt"],
    "sun397": ["ClassName.txt", "Training_01.txt", "Testing_01.txt"],
    "ucf101": [f"ucfTrainTestlist/{file}.txt" for file in ("classInd", "trainlist01", "testlist01")],
    "imagenet": ["classnames.txt"],
}
NEEDED_BY_ZHOU = {
    **{name: EVERY_LIST[name] for name in [*HELD_OUT, *OWN_IS_ZHOU]},
    "oxford_flowers": ["imagelabels.mat"],
}


@pytest.mark.parametrize("name", [name for name in LISTS if name != "eurosat"])
def test_a_list_with_too_few_lines(name: str, tmp_path: Path):
    layout = BUILDERS[name](tmp_path)
    edit(layout.folder / LISTS[name], lambda lines: lines[:-1])
    said = message(layout, SPLIT_FAMILY="elevater")
    total = len(layout.items)
    assert said.endswith(command(layout))
    assert {
        "cub": f"images.txt {total}, image_class_labels.txt {total}, train_test_split.txt {total - 1}",
        "oxford_pets": f"{total} lines, trainval.txt and test.txt together {total // 2} + {total // 2 - 1}",
        "sun397": "the test list of",
    }.get(name, f"do not name 1 of the images, such as {layout.own['test'][-1]}: one is cut short; ") in said


def without_images(layout: Layout, gone: set[str]) -> None:
    """Take images out of every own list that names them; these become as long as they would be without them."""
    from scipy.io import loadmat, savemat

    folder = layout.folder
    if layout.name == "imagenet":  # folders are its lists
        for path in gone:
            (layout.images / path).unlink()
    elif layout.name == "oxford_flowers":
        ids = {key: value for key, value in loadmat(folder / "setid.mat").items() if key[0] != "_"}
        numbers = [int(path[6:11]) for path in gone]
        savemat(folder / "setid.mat", {key: [[n for n in value[0] if n not in numbers]] for key, value in ids.items()})
    elif layout.name == "stanford_cars":
        notes = loadmat(folder / "cars_test_annos_withlabels.mat")["annotations"]
        kept = [f"cars_test/{one['fname'][0]}" not in gone for one in notes[0]]
        savemat(folder / "cars_test_annos_withlabels.mat", {"annotations": notes[:, kept]})
    elif layout.name == "resisc45":
        said = json.loads((folder / "test.json").read_text())
        images = [image for image in said["images"] if image["file_name"].partition("@")[2] not in gone]
        (folder / "test.json").write_text(json.dumps({**said, "images": images}))
    else:
        unique = {"food101": lambda path: path.removesuffix(".jpg"), "sun397": str}
        marks = {unique.get(layout.name, lambda path: Path(path).stem)(path) for path in gone}
        if layout.name == "cub":  # its other lists speak of numbers
            rows = [line.split(" ") for line in (folder / EVERY_LIST["cub"][0]).read_text().splitlines()]
            marks = {f"{number} " for number, path in rows if path in gone}
        found = str.startswith if layout.name == "cub" else str.__contains__
        for file in [*EVERY_LIST[layout.name], *(["annotations/list.txt"] if layout.name == "oxford_pets" else [])]:
            edit(folder / file, lambda lines: [line for line in lines if not any(found(line, m) for m in marks)])


@pytest.mark.parametrize("name", WITH_LISTS)
def test_own_lists_without_a_class(name: str, tmp_path: Path):
    layout = BUILDERS[name](tmp_path)
    last = len(layout.names) - 1
    without_images(layout, {path for path in layout.own["test"] if layout.items[path][0] == last})
    said = message(layout, SPLIT_FAMILY="elevater")
    assert f"no test image of 1 of {last + 1} classes, first {last} ({layout.names[last]}); " in said
    assert said.endswith(command(layout))


@pytest.mark.parametrize("name", ["eurosat", "cub", "fgvc_aircraft", "oxford_pets"])
def test_a_line_with_too_few_fields(name: str, tmp_path: Path):
    layout = BUILDERS[name](tmp_path)
    edit(layout.folder / LISTS[name], lambda lines: [lines[0], lines[1].split(" ")[0], *lines[2:]])
    said = message(layout, SPLIT_FAMILY="elevater")
    assert said.startswith(f"{layout.folder / LISTS[name]}, line 2 has 1 instead of ")
    assert said.endswith(command(layout))


@pytest.mark.parametrize("name", LISTS)
def test_a_list_of_another_data_set(name: str, tmp_path: Path):
    layout = BUILDERS[name](tmp_path)
    edit(layout.folder / LISTS[name], lambda lines: ["some/where/over the rainbow way up high"] * len(lines))
    said = message(layout, SPLIT_FAMILY="elevater")
    assert said.endswith(command(layout))
    assert "is damaged or of another data set" in said or "missing" in said


def test_the_lists_of_every_data_set_are_known():
    assert [*EVERY_LIST] == WITH_LISTS and EVERY_LIST.keys() > LISTS.keys()
    assert all(LISTS[name] in EVERY_LIST[name] for name in LISTS)


@pytest.mark.parametrize("name", EVERY_LIST)
def test_a_list_that_is_missing_or_no_such_file(name: str, without_made):
    layout = without_made(name)
    for family, files in (("elevater", EVERY_LIST[name]), ("zhou", NEEDED_BY_ZHOU.get(name, []))):
        for file in (layout.folder / file for file in files):
            whole = file.read_bytes()
            try:
                for broken in (b"\xff\xfe\x00\x01", whole[: len(whole) // 2][:-1], b"[]"):
                    file.write_bytes(broken)
                    said = message(layout, SPLIT_FAMILY=family)
                    assert said.endswith(command(layout)), (file, broken[:9])
                    # A list that is cut short may show only where others speak of what it lacks.
                    assert str(layout.folder) in said and (str(file) in said or broken == whole[: len(broken)])
                file.unlink()
                said = message(layout, SPLIT_FAMILY=family)
                assert f"{file} is missing" in said and said.endswith(command(layout))
            finally:
                file.write_bytes(whole)
            assert not (layout.folder / MADE).exists()


def test_imagenets_parts_that_are_missing_and_names_that_are_too_few_or_too_many(tmp_path: Path):
    layout = layouts.imagenet(tmp_path)
    edit(layout.folder / "classnames.txt", lambda lines: [*lines, "n99999999 one too many"])
    file = layout.folder / "classnames.txt"
    assert message(layout) == (
        f"{file} is damaged or of another data set (1001 class names instead of 1000); {command(layout)}"
    )
    edit(file, lambda lines: lines[:-2])
    assert "(999 class names instead of 1000)" in message(layout)
    shutil.rmtree(layout.images / "val")
    edit(file, lambda lines: [*lines, "n01441763 thing 999"])
    assert message(layout) == f"imagenet: {layout.images / 'val'} is missing; fetch it: {command(layout)}"


@pytest.mark.parametrize("text", ["{", "[]", '{"1": "rose"}', '{"one": "rose"}', "\ufffe"])
def test_flowers_names_that_are_broken(text: str, without_made):
    layout = without_made("oxford_flowers")
    file = layout.folder / "cat_to_name.json"
    whole = file.read_text()
    file.write_text(text, encoding="utf-16" if text == "\ufffe" else "utf-8")
    try:
        for family in FAMILIES:
            said = message(layout, SPLIT_FAMILY=family)
            assert "is damaged or of another data set" in said and said.endswith(command(layout))
    finally:
        file.write_text(whole)


@pytest.mark.parametrize(
    ("name", "file", "old", "new"),
    [
        ("eurosat", "test.txt", "Forest_4.jpg 1", "Forest_4.jpg 2"),
        ("eurosat", "test.txt", "Forest_4.jpg 1", "Forest_4.jpg eleven"),
        ("eurosat", "test.txt", "Forest/Forest_4.jpg 1", "Swamp/Swamp_4.jpg 10"),
        ("dtd", "labels/test1.txt", "banded/banded_0003.jpg", "stripy/stripy_0003.jpg"),
        ("food101", "meta/test.txt", "apple_pie/", "pear_pie/"),
        ("fgvc_aircraft", "variants.txt", "707-320\n", ""),
        ("sun397", "ClassName.txt", "/a/abbey\n", ""),
        ("ucf101", "ucfTrainTestlist/classInd.txt", "1 ApplyEyeMakeup\n", ""),
        ("resisc45", "test.json", '"images.zip@airport/airport_004.jpg"', "7"),
        ("cub", "CUB_200_2011/image_class_labels.txt", "1 1", "1 201"),
        ("oxford_pets", "annotations/test.txt", "Abyssinian_4 1", "Abyssinian_4 38"),
        ("oxford_pets", "annotations/test.txt", "Abyssinian_4 1", "Abyssinian_4 0"),
        ("ucf101", "ucfTrainTestlist/classInd.txt", "1 ApplyEyeMakeup", "102 ApplyEyeMakeup"),
        ("resisc45", "test.json", "airport/airport_004.jpg", "airprot/airprot_004.jpg"),
    ],
)
def test_a_wrong_label_in_an_own_list(name: str, file: str, old: str, new: str, tmp_path: Path):
    layout = BUILDERS[name](tmp_path)
    path = layout.folder / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    said = message(layout, SPLIT_FAMILY="elevater")
    assert "is not within 0 to" in said or "is damaged or of another data set" in said
    assert said.endswith(command(layout))


def test_labels_of_matlab_files_out_of_range(tmp_path: Path):
    import numpy as np
    from scipy.io import loadmat, savemat

    cars = layouts.stanford_cars(tmp_path)
    names = loadmat(cars.folder / "devkit/cars_meta.mat")["class_names"]
    savemat(cars.folder / "devkit/cars_meta.mat", {"class_names": names[:, :-1]})
    assert "cars_meta.mat is damaged or of another data set (195 class names instead of 196)" in message(cars)
    flowers = layouts.oxford_flowers(tmp_path)
    labels = loadmat(flowers.folder / "imagelabels.mat")["labels"]
    savemat(flowers.folder / "imagelabels.mat", {"labels": np.where(labels == 102, 103, labels)})
    assert "imagelabels.mat is damaged or of another data set (KeyError: 103)" in message(flowers)
    savemat(flowers.folder / "imagelabels.mat", {"labels": labels[:, :-1]})
    assert "is damaged or of another data set (IndexError" in message(flowers, SPLIT_FAMILY="elevater")


def test_matlab_lists_that_are_cut_short(tmp_path: Path):
    from scipy.io import loadmat, savemat

    flowers = layouts.oxford_flowers(tmp_path)
    ids = {key: value for key, value in loadmat(flowers.folder / "setid.mat").items() if key[0] != "_"}
    savemat(flowers.folder / "setid.mat", {**ids, "tstid": ids["tstid"][:, :-2]})
    said = message(flowers, SPLIT_FAMILY="elevater")
    assert "do not name 2 of the images, such as image_00611.jpg: one is cut short" in said
    savemat(flowers.folder / "setid.mat", {key: value for key, value in ids.items() if key != "valid"})
    said = message(flowers, SPLIT_FAMILY="elevater")
    assert "setid.mat is damaged or of another data set (KeyError: 'valid')" in said
    cars = layouts.stanford_cars(tmp_path)
    notes = loadmat(cars.folder / "cars_test_annos_withlabels.mat")["annotations"]
    savemat(cars.folder / "cars_test_annos_withlabels.mat", {"annotations": notes[:, :-1]})
    said = message(cars, SPLIT_FAMILY="elevater")
    assert "do not name 1 of the images, such as cars_test/00588.jpg: one is cut short" in said


def test_families_that_need_what_is_not_there(tmp_path: Path):
    layout = layouts.caltech101(tmp_path)
    said = message(layout, SPLIT_FAMILY="elevater")
    assert said == "caltech101 has no train and test lists of its own; use DATASET.SPLIT_FAMILY zhou"
    for name, file in (("eurosat", "train.txt"), ("resisc45", "train.json")):
        layout = BUILDERS[name](tmp_path)
        (layout.folder / file).unlink()
        said = message(layout, SPLIT_FAMILY="elevater")
        assert f"{file} is missing (the split family elevater needs ELEVATER's lists of {name}_clip" in said


BROKEN = [b"{", b"[]", b'{"train": []}', b'{"train": [[1]], "val": [], "test": []}', b"\xff\xfe"]


@pytest.mark.parametrize("text", BROKEN)
def test_digits_with_a_split_that_is_broken(text: bytes, tmp_path: Path):
    from datasets.digits import Digits

    cfg = train.set_up(train.parse(["--root", str(tmp_path)]))[0]
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "split.json").write_bytes(text)
    with pytest.raises(UserError) as caught:
        Digits(cfg)
    said = str(caught.value)
    assert said.startswith(f"{tmp_path / 'digits'} is damaged (") and "remove it and it is written again" in said
    cfg.DATASET.ROOT = str(tmp_path / "gone")
    with pytest.raises(UserError, match=f"data root {tmp_path / 'gone'} is missing; make it"):
        Digits(cfg)


KINDS = ("Digits", "DigitsInverted", "DigitsRotated", "DigitsNoisy")


@pytest.fixture(scope="module")
def digits(digits_root: Path) -> dict[str, Any]:
    """Every set of digits."""
    import datasets.digits

    cfg = train.set_up(train.parse(["--root", str(digits_root)]))[0]
    return {kind: getattr(datasets.digits, kind)(cfg) for kind in KINDS}


def grey(data: Any) -> Any:
    """The images as one array (1797, 32, 32), in the order of their numbers."""
    import numpy as np

    paths = sorted(item.impath for item in [*data.train_u, *data.test])
    images = np.stack([np.asarray(load_rgb(path)) for path in paths])
    assert images.shape == (1797, 32, 32, 3) and (images == images[..., :1]).all()
    return images[..., 0].astype(float)


def test_every_set_of_digits_has_the_same_labels_and_split_in_a_folder_of_its_own(digits: dict[str, Any]):
    plain = digits["Digits"]
    folder = Path(plain.test[0].impath).parents[1]
    assert len(plain.train_u) == 1000 and len(plain.test) == 797 and not plain.val
    for kind, data in digits.items():
        own = folder.parent / data.dataset_dir
        assert kind == "".join(part.capitalize() for part in data.dataset_dir.split("_"))
        for part in ("train_x", "train_u", "test"):
            for item, twin in zip(getattr(data, part), getattr(plain, part), strict=True):
                assert Path(item.impath).relative_to(own) == Path(twin.impath).relative_to(folder)
                assert (item.label, item.classname) == (twin.label, twin.classname)
        assert list(data.hidden_labels.values()) == list(plain.hidden_labels.values())
        assert data.classnames == plain.classnames


@pytest.mark.parametrize("kind", KINDS)
def test_digits_are_the_same_files_whenever_they_are_written(kind: str, digits: dict[str, Any], tmp_path: Path):
    import numpy as np

    import datasets.digits

    written = Path(digits[kind].test[0].impath).parents[1]
    np.random.seed(7)
    random.seed(7)
    datasets.digits.write_digits(tmp_path, getattr(datasets.digits, kind).change)
    files = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert len(files) == 1798
    for file in files:
        assert (tmp_path / file).read_bytes() == (written / file).read_bytes(), file


def test_plain_digits_are_scikit_learns_and_nothing_is_done_to_them(digits: dict[str, Any]):
    """Stored features, adapters and images are found again by these files."""
    import io

    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    folder = Path(digits["Digits"].test[0].impath).parent
    for number, values in enumerate(load_digits().images):
        image = Image.new("L", (8, 8))
        image.putdata([round(value * 255 / 16) for value in values.ravel().tolist()])
        buffer = io.BytesIO()
        image.resize((32, 32), Image.Resampling.BICUBIC).convert("RGB").save(buffer, format="png")
        assert (folder / f"{number:04d}.png").read_bytes() == buffer.getvalue(), number
    assert len(np.unique(grey(digits["Digits"])[0])) > 10  # there is something to be seen


def test_inverted_digits_are_dark_on_light(digits: dict[str, Any]):
    plain, inverted = grey(digits["Digits"]), grey(digits["DigitsInverted"])
    assert (plain + inverted == 255).all() and plain.mean() < 100 < 150 < inverted.mean()


def test_rotated_digits_are_all_turned_the_same_way(digits: dict[str, Any]):
    """Ink lies where the same point of the plain image, turned by 25 degrees about the middle, has it."""
    import numpy as np
    from scipy.ndimage import map_coordinates

    plain, rotated = grey(digits["Digits"]), grey(digits["DigitsRotated"])
    cos, sin = math.cos(math.radians(25)), math.sin(math.radians(25))
    y, x = (part - 15.5 for part in np.mgrid[:32, :32])
    inside = x**2 + y**2 < 13**2
    for number in range(0, 1797, 100):
        at = np.array([sin * x + cos * y, cos * x - sin * y]) + 15.5  # counterclockwise, y being downwards
        want = map_coordinates(plain[number], at, order=3)
        assert np.abs(want - rotated[number])[inside].mean() < 6, number
    corners = rotated[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners == 0).all()


def test_noise_is_gaussian_and_another_one_for_every_image(digits: dict[str, Any]):
    import numpy as np

    plain, noisy = grey(digits["Digits"]), grey(digits["DigitsNoisy"])
    middle = (plain >= 120) & (plain <= 135)  # three standard deviations to either end: next to nothing is clipped
    noise = (noisy - plain)[middle]
    assert len(noise) > 10_000 and abs(noise.mean()) < 1 and abs(noise.std() - 40) < 1
    black = plain == 0
    assert abs((noisy[black] == 0).mean() - 0.5) < 0.02  # below: clipped, not wrapped around
    assert abs(noisy[black & (noisy > 0)].mean() - 40 * math.sqrt(2 / math.pi)) < 1
    both = black[0] & black[10]
    assert both.sum() > 100 and np.abs(noisy[0] - noisy[10])[both].mean() > 10


# What a result records


def test_result_records_the_family_that_was_used(monkeypatch, without_made):
    from types import SimpleNamespace

    cfg = train.set_up(train.parse(["--dataset-config-file", str(ROOT / "configs/datasets/eurosat.yaml")]))[0]
    monkeypatch.setattr("air_plugin.utils.provenance.collect", lambda root: {})

    def result(dataset: Any) -> RunResult:
        trainer = SimpleNamespace(
            dm=SimpleNamespace(dataset=dataset),
            results={"text": {"accuracy": None, "macro_f1": None, "per_class": {}}},
            primary="text",
            metrics=lambda: {"pseudo_labels": {"selected": 0, "coverage": 0.0, "accuracy": None}},
            stages=SimpleNamespace(done=[]),
        )
        return train.make_result(cfg, trainer, "c")

    dataset = load(without_made("eurosat"))
    assert result(dataset).split_family == "zhou, made here (seed 0)"
    assert result(dataset).dataset == "eurosat"
    assert result(SimpleNamespace()).split_family == "zhou"
