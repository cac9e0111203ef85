"""Labelled and unlabelled images, seen and unseen classes: of published layouts, digits and a person's folder."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import layouts
import numpy as np
import pytest
from dassl.data.datasets import Datum
from layouts import Layout, put
from test_published import class_of

import train
from air_plugin.utils.errors import UserError
from datasets.base import SplitDataset
from datasets.folder import Folder

GRIP_SEEN = [  # of EuroSAT, seed 500
    "industrial buildings or commercial buildings",
    "brushland or shrubland",
    "lake or sea",
    "highway or road",
    "annual crop land",
    "pasture land",
]
COOP_SEEN = [
    "Industrial Buildings",
    "Herbaceous Vegetation Land",
    "Sea or Lake",
    "Highway or Road",
    "Annual Crop Land",
    "Pasture Land",
]


def make(kind: Any, root: Path, *, seed: int = -1, **options: Any) -> Any:
    cfg = train.set_up(train.parse(["--root", str(root)]))[0]
    cfg.SEED = seed
    for key, value in options.items():
        assert key in cfg.DATASET
        cfg.DATASET[key] = value
    return kind(cfg)


def load(layout: Layout, **options: Any) -> Any:
    return make(class_of(layout.name), layout.folder.parent, **options)


def pairs(items: list | None) -> list[tuple[str, int]]:
    return [(item.impath, item.label) for item in items or ()]


@pytest.fixture(scope="module")
def eurosat(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    layout = layouts.eurosat(tmp_path_factory.mktemp("eurosat"), per_class=20)
    layout.write_zhou()
    return layout


@pytest.fixture
def digits_of(digits_root: Path) -> Callable[..., Any]:
    from datasets.digits import Digits

    return lambda **options: make(Digits, digits_root, **options)


def expect_parts(data: SplitDataset, everything: dict[str, int]) -> None:
    """Every training image is labelled or unlabelled, each with its true label in one place only."""
    labelled = dict(pairs(data.train_x))
    assert len(labelled) == len(data.train_x) and labelled.items() <= everything.items()
    paths = [item.impath for item in data.train_u]
    assert paths == sorted(paths) and {item.label for item in data.train_u} == {-1}
    assert not labelled.keys() & set(paths)
    assert data.hidden_labels == {path: everything[path] for path in paths}
    assert sorted([*data.seen, *data.unseen]) == list(range(data.num_classes))


# Unsupervised


def test_without_a_paradigm_every_image_is_unlabelled(eurosat: Layout):
    data = load(eurosat)
    assert data.paradigm == "ul" and data.seen == data.unlabelled_classes == list(range(10)) and data.unseen == []
    assert [item.impath for item in data.train_u] == sorted(item.impath for item in data.train_x)


@pytest.mark.parametrize("name", ["eurosat", "dtd", "resisc45", "oxford_flowers"])
def test_the_unlabelled_images_of_any_data_set_may_lack_classes(name: str, tmp_path: Path):
    layout = layouts.BUILDERS[name](tmp_path, per_class=10)
    whole, count = load(layout).hidden_labels, len(layout.names)
    lacking = load(layout, NUM_MISSING_CLASSES=1)
    assert len(set(lacking.hidden_labels.values())) == count - 1
    assert lacking.hidden_labels == {path: whole[path] for path in lacking.hidden_labels}
    assert lacking.num_classes == count and pairs(lacking.test) == pairs(load(layout).test)
    rare = Counter(load(layout, IMBALANCE_RATIO=5.0).hidden_labels.values())
    for label, number in Counter(whole.values()).items():
        assert rare[label] == (max(1, round(number / 5)) if label % 2 == 0 else number)


# Semi-supervised


@pytest.mark.parametrize("name", ["eurosat", "dtd", "resisc45", "oxford_flowers", "ucf101"])
@pytest.mark.parametrize("family", ["zhou", "elevater"])
def test_ssl_has_two_labelled_images_of_every_class(name: str, family: str, tmp_path: Path):
    layout = layouts.BUILDERS[name](tmp_path, per_class=10)
    whole = load(layout, SPLIT_FAMILY=family)
    everything = whole.hidden_labels
    data = load(layout, SPLIT_FAMILY=family, PARADIGM="ssl")
    expect_parts(data, everything)
    counts = Counter(item.label for item in data.train_x)
    assert counts == dict.fromkeys(range(len(layout.names)), 2)
    assert len(data.train_u) == len(everything) - 2 * len(layout.names)
    assert data.seen == data.unlabelled_classes == list(range(len(layout.names))) and data.unseen == []
    assert pairs(data.test) == pairs(whole.test) and pairs(data.val) == pairs(whole.val)
    rng, expected = np.random.RandomState(0), []  # plain: sorted paths, class by class
    for label in range(len(layout.names)):
        paths = sorted(path for path, true in everything.items() if true == label)
        expected += [paths[place] for place in rng.choice(len(paths), 2, replace=False)]
    assert {item.impath for item in data.train_x} == set(expected)


def test_the_labelled_images_depend_neither_on_the_seed_nor_on_the_order_on_disk(
    eurosat: Layout, monkeypatch: pytest.MonkeyPatch
):
    first = load(eurosat, PARADIGM="ssl", seed=1)
    split = json.loads((eurosat.folder / eurosat.split_file).read_text())
    (eurosat.folder / eurosat.split_file).write_text(json.dumps({part: items[::-1] for part, items in split.items()}))
    np.random.seed(7)
    again = load(eurosat, PARADIGM="ssl", seed=2)
    (eurosat.folder / eurosat.split_file).write_text(json.dumps(split))
    assert pairs(again.train_x) == pairs(first.train_x) and pairs(again.train_u) == pairs(first.train_u)


def test_more_labels_shots_and_halves_of_the_classes(eurosat: Layout):
    two, four = (load(eurosat, PARADIGM="ssl", LABELS_PER_CLASS=number) for number in (2, 4))
    assert Counter(item.label for item in four.train_x) == dict.fromkeys(range(10), 4)
    shot = load(eurosat, PARADIGM="ssl", NUM_SHOTS=1)
    assert Counter(item.label for item in shot.train_x) == dict.fromkeys(range(10), 1)
    assert set(pairs(shot.train_x)) < set(pairs(two.train_x))
    assert pairs(shot.train_u) == pairs(two.train_u)  # a labelled image that is no shot is left out
    new = load(eurosat, PARADIGM="ssl", SUBSAMPLE_CLASSES="new")
    assert pairs(new.train_x) == [(path, label - 5) for path, label in pairs(two.train_x) if label >= 5]
    assert new.hidden_labels == {path: label - 5 for path, label in two.hidden_labels.items() if label >= 5}
    assert new.seen == new.unlabelled_classes == list(range(5))


def test_a_class_with_too_few_images_for_ssl_is_named(tmp_path: Path):
    layout = layouts.eurosat(tmp_path, per_class=4)  # two training images of every class
    with pytest.raises(UserError, match=r"DATASET.PARADIGM ssl needs 3 .*class 'annual crop land' has 2$"):
        load(layout, SPLIT_FAMILY="elevater", CLASS_NAMES="grip", PARADIGM="ssl")
    load(layout, SPLIT_FAMILY="elevater", PARADIGM="ssl", LABELS_PER_CLASS=1)


# Transductive zero-shot


@pytest.mark.parametrize("family", ["zhou", "elevater"])
@pytest.mark.parametrize("names", ["grip", "coop"])
def test_the_seen_classes_of_eurosat_are_the_published_ones(eurosat: Layout, family: str, names: str):
    data = load(eurosat, SPLIT_FAMILY=family, CLASS_NAMES=names, PARADIGM="trzsl")
    assert [data.classnames[label] for label in data.seen] == (GRIP_SEEN if names == "grip" else COOP_SEEN)
    assert data.unseen == data.unlabelled_classes == [1, 6, 7, 8]


def test_a_split_file_with_another_order_of_classes_has_the_same_seen_classes(tmp_path: Path):
    layout = layouts.eurosat(tmp_path, per_class=20)
    file = layout.write_zhou()
    split = {
        part: [[path, (label + 3) % 10, name] for path, label, name in items]
        for part, items in json.loads(file.read_text()).items()
    }
    file.write_text(json.dumps(split))
    for names, expected in (("grip", GRIP_SEEN), ("coop", COOP_SEEN)):
        data = load(layout, CLASS_NAMES=names, PARADIGM="trzsl")
        assert [data.classnames[label] for label in data.seen] == expected
        assert data.seen == [7, 5, 2, 6, 3, 8]
    assert {Path(item.impath).parent.name for item in data.train_u} <= {
        "Forest",
        "PermanentCrop",
        "Residential",
        "River",
    }


@pytest.mark.parametrize("seed", [500, 0, 200])
@pytest.mark.parametrize("name", ["dtd", "resisc45", "oxford_flowers", "cub", "fgvc_aircraft"])
def test_no_image_of_an_unseen_class_is_labelled(name: str, seed: int, tmp_path: Path):
    layout = layouts.BUILDERS[name](tmp_path)
    for family in ("elevater", "zhou"):
        whole = load(layout, SPLIT_FAMILY=family)
        everything = whole.hidden_labels
        data = load(layout, SPLIT_FAMILY=family, PARADIGM="trzsl", SPLIT_SEED=seed)
        expect_parts(data, everything)
        number = len(layout.names)
        seen = np.random.RandomState(seed).choice(range(number), int(0.62 * number), replace=False).tolist()
        assert data.seen == seen
        assert data.unseen == data.unlabelled_classes == [label for label in range(number) if label not in seen]
        assert dict(pairs(data.train_x)) == {path: label for path, label in everything.items() if label in seen}
        assert set(data.hidden_labels.values()) == set(data.unseen)
        assert pairs(data.val) == [pair for pair in pairs(whole.val) if pair[1] in seen]
        assert pairs(data.test) == pairs(whole.test)


def test_a_share_of_the_seen_images_is_labelled_and_the_others_are_val(eurosat: Layout):
    whole = load(eurosat, SPLIT_FAMILY="elevater", PARADIGM="trzsl")
    data = load(eurosat, SPLIT_FAMILY="elevater", PARADIGM="trzsl", SEEN_LABELLED=0.8)
    assert whole.val is None and data.seen == whole.seen and pairs(data.train_u) == pairs(whole.train_u)
    assert Counter(item.label for item in data.train_x) == dict.fromkeys(data.seen, 8)
    assert Counter(item.label for item in data.val) == dict.fromkeys(data.seen, 2)
    assert sorted(pairs(data.train_x) + pairs(data.val)) == sorted(pairs(whole.train_x))
    other = load(eurosat, SPLIT_FAMILY="elevater", PARADIGM="trzsl", SEEN_LABELLED=0.8, seed=3)
    assert pairs(other.train_x) == pairs(data.train_x)
    least = load(eurosat, SPLIT_FAMILY="elevater", PARADIGM="trzsl", SEEN_LABELLED=0.001)
    assert Counter(item.label for item in least.train_x) == dict.fromkeys(data.seen, 1)


def test_shots_are_of_the_seen_classes(eurosat: Layout):
    data = load(eurosat, PARADIGM="trzsl", NUM_SHOTS=2)
    assert Counter(item.label for item in data.train_x) == dict.fromkeys(data.seen, 2)
    assert pairs(data.train_u) == pairs(load(eurosat, PARADIGM="trzsl").train_u)


def test_halves_of_the_classes_go_with_ssl_only(eurosat: Layout):
    with pytest.raises(UserError, match=r"DATASET.SUBSAMPLE_CLASSES is base and must be all$"):
        load(eurosat, PARADIGM="trzsl", SUBSAMPLE_CLASSES="base")


def test_an_unknown_paradigm_is_refused(eurosat: Layout):
    with pytest.raises(UserError, match=r"DATASET.PARADIGM is 'sll'; it must be one of ul, ssl, trzsl$"):
        load(eurosat, PARADIGM="sll")


# An image in both parts


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_an_image_in_both_parts_is_named(link: Callable[..., None], tmp_path: Path):
    layout = layouts.eurosat(tmp_path, per_class=20)
    data = load(layout, SPLIT_FAMILY="elevater", PARADIGM="ssl")
    labelled, other = data.train_x[0].impath, Path(data.train_u[0].impath)  # both of the first class
    other.unlink()
    link(labelled, other)
    for paradigm in ("ul", "trzsl"):  # in trzsl all images of this class are labelled
        load(layout, SPLIT_FAMILY="elevater", PARADIGM=paradigm)
    with pytest.raises(UserError) as caught:
        load(layout, SPLIT_FAMILY="elevater", PARADIGM="ssl")
    names = {labelled, str(other)}
    assert all(name in str(caught.value) for name in names) and "\n" not in str(caught.value)


def test_an_image_that_a_list_names_twice_is_named(tmp_path: Path):
    layout = layouts.eurosat(tmp_path, per_class=20)
    file = layout.write_zhou()
    split = json.loads(file.read_text())
    path = next(path for path, label, _ in split["train"] if label == 4)  # of a seen class
    split["train"].append([path, 1, "Forest"])  # of an unseen one
    file.write_text(json.dumps(split))
    with pytest.raises(UserError, match=f"{path} is among the labelled and the unlabelled training images"):
        load(layout, PARADIGM="trzsl")


class Unlabelled(SplitDataset):
    """A data set of somebody's without training labels."""

    dataset_dir = "mine"

    def __init__(self, cfg: Any) -> None:
        paths = sorted(Path(cfg.DATASET.ROOT).glob("*.jpg"))
        items = [Datum(impath=str(path), label=label) for path, label in zip(paths, [0, 1, -1, 2, -1, 0], strict=True)]
        super().__init__(cfg, ["ant", "bee", "cat"], train=items, val=[], test=items)


@pytest.mark.parametrize("paradigm", ["ssl", "trzsl"])
def test_a_data_set_without_training_labels_is_refused(paradigm: str, tmp_path: Path):
    put(tmp_path, *(f"{number}.jpg" for number in range(6)))
    data = make(Unlabelled, tmp_path)
    assert len(data.train_u) == 6 and data.hidden_labels == {}
    with pytest.raises(UserError, match=rf"{paradigm} needs training labels, and 2 of 6 .* of mine .* first .*/2.jpg$"):
        make(Unlabelled, tmp_path, PARADIGM=paradigm)


# Digits


def test_digits_in_every_paradigm(digits_of: Callable[..., Any]):
    everything = digits_of().hidden_labels
    data = digits_of(PARADIGM="ssl")
    expect_parts(data, everything)
    assert Counter(item.label for item in data.train_x) == dict.fromkeys(range(10), 2) and len(data.train_u) == 980
    data = digits_of(PARADIGM="trzsl")
    expect_parts(data, everything)
    assert data.seen == [4, 2, 9, 3, 0, 5] and data.unseen == [1, 6, 7, 8]
    assert len(data.train_x) + len(data.train_u) == 1000 and len(data.test) == 797


@pytest.mark.parametrize("kind", ["DigitsInverted", "DigitsRotated", "DigitsNoisy"])
@pytest.mark.parametrize("paradigm", ["ssl", "trzsl"])
def test_other_kinds_of_digits_have_the_same_parts(kind: str, paradigm: str, digits_root: Path):
    from datasets import digits

    one, other = (make(getattr(digits, name), digits_root, PARADIGM=paradigm) for name in ("Digits", kind))
    assert [Path(item.impath).name for item in one.train_x] == [Path(item.impath).name for item in other.train_x]
    assert list(one.hidden_labels.values()) == list(other.hidden_labels.values())


def test_only_the_unlabelled_images_lack_classes(digits_of: Callable[..., Any]):
    whole, lacking = digits_of(PARADIGM="ssl"), digits_of(PARADIGM="ssl", NUM_MISSING_CLASSES=4)
    assert pairs(lacking.train_x) == pairs(whole.train_x)
    assert (
        len(set(lacking.hidden_labels.values())) == 6 and lacking.hidden_labels.items() <= whole.hidden_labels.items()
    )
    zero_shot = digits_of(PARADIGM="trzsl", NUM_MISSING_CLASSES=2)
    assert len(set(zero_shot.hidden_labels.values())) == 2 and zero_shot.unseen == [1, 6, 7, 8]
    with pytest.raises(UserError, match=r"DATASET.NUM_MISSING_CLASSES is 3"):
        digits_of(PARADIGM="trzsl", NUM_MISSING_CLASSES=3)


# A person's folder


def test_a_folder_without_labels_cannot_lack_classes(tmp_path: Path):
    put(tmp_path, "train/one.png")
    (tmp_path / "classes.txt").write_text("cat\ndog\nowl\n")
    with pytest.raises(UserError, match=r"DATASET.NUM_MISSING_CLASSES needs the labels"):
        make(Folder, tmp_path, NUM_MISSING_CLASSES=1)


NAMES = ["cat", "dog", "old horse", "owl"]


def folder(root: Path, *, loose: int = 3, names: list[str] | None = None, test: bool = False, **labelled: int) -> Path:
    """A folder of images: so many in train/ itself, and in the folder of each class ("old_horse")."""
    root.mkdir(exist_ok=True)
    (root / "classes.txt").write_text("\n".join(names or NAMES))
    for number in range(loose):
        put(root / "train", f"{number}.jpg", data=layouts.picture(number))
    for name, count in labelled.items():
        for number in range(count):
            put(root / "train" / name, f"{number}.jpg", data=layouts.picture(1000 * len(name) + number))
    for name in NAMES if test else ():
        put(root / "test" / name, "1.jpg", data=layouts.picture(7))
    return root


def inside(root: Path, items: list) -> list[tuple[str, int]]:
    return [(Path(item.impath).relative_to(root / "train").as_posix(), item.label) for item in items]


def test_the_given_labels_are_the_labelled_part_and_the_loose_images_the_other(tmp_path: Path):
    root = folder(tmp_path, cat=2, dog=3, old_horse=2, owl=4, unlabelled=1)
    data = make(Folder, root, PARADIGM="ssl")
    expected = [*(("cat", 0, n) for n in range(2)), *(("dog", 1, n) for n in range(3))]
    expected += [*(("old_horse", 2, n) for n in range(2)), *(("owl", 3, n) for n in range(4))]
    assert inside(root, data.train_x) == [(f"{name}/{number}.jpg", label) for name, label, number in expected]
    loose = [("0.jpg", -1), ("1.jpg", -1), ("2.jpg", -1), ("unlabelled/0.jpg", -1)]
    assert inside(root, data.train_u) == loose and inside(root, data.test) == loose
    assert data.hidden_labels == {} and data.unlabelled_classes == data.seen == [0, 1, 2, 3] and data.unseen == []
    assert {item.classname for item in data.train_x} == set(NAMES)
    few = make(Folder, root, PARADIGM="ssl", NUM_SHOTS=1)
    assert Counter(item.label for item in few.train_x) == dict.fromkeys(range(4), 1) and len(few.train_u) == 4


def test_the_same_folder_without_a_paradigm_is_all_unlabelled(tmp_path: Path):
    root = folder(tmp_path, cat=2, dog=3)
    data = make(Folder, root)
    assert len(data.train_u) == len(data.train_x) == len(data.test) == 8
    assert {item.label for item in [*data.train_x, *data.train_u, *data.test]} == {-1} and data.hidden_labels == {}


def test_classes_without_labelled_images_are_the_unseen_ones(tmp_path: Path):
    root = folder(tmp_path, dog=1, owl=4, test=True)
    data = make(Folder, root, PARADIGM="trzsl")
    assert data.seen == [1, 3] and data.unseen == data.unlabelled_classes == [0, 2]
    assert Counter(item.label for item in data.train_x) == {1: 1, 3: 4}
    assert inside(root, data.train_u) == [("0.jpg", -1), ("1.jpg", -1), ("2.jpg", -1)]
    assert len(data.test) == 4 and data.hidden_labels == {}


def test_a_folder_with_all_labels_is_divided_as_other_data_sets_are(tmp_path: Path):
    root = folder(tmp_path, loose=0, cat=5, dog=3, old_horse=4, owl=4)
    data = make(Folder, root, PARADIGM="ssl")
    assert Counter(item.label for item in data.train_x) == dict.fromkeys(range(4), 2) and len(data.train_u) == 8
    assert data.hidden_labels == {
        item.impath: NAMES.index(Path(item.impath).parent.name.replace("_", " ")) for item in data.train_u
    }
    assert pairs(data.test) == [(path, -1) for path in data.hidden_labels]
    data = make(Folder, root, PARADIGM="trzsl", SPLIT_SEED=0)
    assert data.seen == np.random.RandomState(0).choice(range(4), 2, replace=False).tolist()
    assert set(data.hidden_labels.values()) == set(data.unseen)


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_loose_image_that_is_also_a_labelled_one_is_named(link: Callable[..., None], tmp_path: Path):
    root = folder(tmp_path, cat=2, dog=2)
    link(root / "train/dog/1.jpg", root / "train/copy.jpg")
    for options in ({"PARADIGM": "trzsl"}, {"PARADIGM": "trzsl", "SEEN_LABELLED": 0.5}):
        with pytest.raises(UserError) as caught:
            make(Folder, root, **options)
        assert str(root / "train/copy.jpg") in str(caught.value) and str(root / "train/dog/1.jpg") in str(caught.value)
    (root / "train/copy.jpg").unlink()
    os.symlink(root / "train/dog", root / "train/unlabelled")
    with pytest.raises(UserError, match=r"unlabelled/0.jpg, which is the same file as .*dog/0.jpg"):
        make(Folder, root, PARADIGM="trzsl")


@pytest.mark.parametrize(
    ("paradigm", "labelled", "fault"),
    [
        ("ssl", {}, "need labelled images, and .*train has none"),
        ("trzsl", {}, "need labelled images, and .*train has none"),
        ("ssl", {"cat": 2, "dog": 2, "owl": 2}, "has 0 in the folder of class 'old horse'"),
        (
            "ssl",
            {"cat": 2, "dog": 1, "old_horse": 2, "owl": 2},
            "needs 2 labelled .* has 1 in the folder of class 'dog'",
        ),
        ("trzsl", {"cat": 1, "dog": 1, "old_horse": 1, "owl": 1}, "has a folder of every class: use ssl"),
        ("ssl", {"cat": 2, "frog": 2}, "train/frog is no class of classes.txt.*train itself or in .*unlabelled"),
        ("ssl", {"loose": 0, "cat": 3, "dog": 2, "old_horse": 3, "owl": 3}, "class 'dog' has 2"),
        ("trzsl", {"loose": 0, "cat": 3, "dog": 2}, "seen class|no training image is of an unseen class"),
    ],
)
def test_a_folder_that_cannot_serve_the_paradigm(paradigm: str, labelled: dict[str, int], fault: str, tmp_path: Path):
    root = folder(tmp_path, **labelled)
    with pytest.raises(UserError, match=fault) as caught:
        make(Folder, root, PARADIGM=paradigm)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("loose", [0, 3])
def test_two_classes_are_too_few_for_trzsl(loose: int, tmp_path: Path):
    root = folder(tmp_path, loose=loose, names=["cat", "dog"], cat=4, **({} if loose else {"dog": 4}))
    with pytest.raises(UserError, match=r"DATASET.PARADIGM trzsl needs at least 3 classes.*there are 2$"):
        make(Folder, root, PARADIGM="trzsl")
