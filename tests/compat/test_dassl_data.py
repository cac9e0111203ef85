"""Data sets, few-shot sampling, batches, loaders, transforms."""

from __future__ import annotations

import pickle
import random

import pytest
import torch
from dassl_small import CLASSNAMES, TinyColours, TinyColoursBare, read_items, standin_only, tiny_cfg, write_images


@pytest.fixture
def images(tmp_path):
    write_images(tmp_path / "images")
    return tmp_path / "images"


def manager(images, output="", **options):
    from dassl.data import DataManager

    return DataManager(tiny_cfg(images, output, **options))


def quiet(builder, *args, **options):
    """A transform, without what building it prints."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()):
        return builder(*args, **options)


# Datum and DatasetBase


def test_datum_has_the_attributes_that_coop_pickles(images):
    from dassl.data.datasets.base_dataset import Datum

    path = str(images / "red_0.png")
    item = Datum(path, 3, 1, "red")
    assert vars(item) == {"_impath": path, "_label": 3, "_domain": 1, "_classname": "red"}
    assert Datum.__module__ == "dassl.data.datasets.base_dataset"
    copy = pickle.loads(pickle.dumps(item))
    assert (copy.impath, copy.label, copy.domain, copy.classname) == (path, 3, 1, "red")
    assert (Datum(path).label, Datum(path).domain, Datum(path).classname) == (0, 0, "")


@standin_only
def test_an_image_that_is_not_there_is_named(images):
    from dassl.data.datasets import Datum

    with pytest.raises(FileNotFoundError, match=r"yellow_0.png"):
        Datum(str(images / "yellow_0.png"))
    with pytest.raises(TypeError, match=r"PosixPath|WindowsPath"):
        Datum(images / "red_0.png")


def test_dataset_attributes(images):
    data = TinyColours(tiny_cfg(images, ""))
    assert (len(data.train_x), len(data.train_u), len(data.val), len(data.test)) == (12, 12, 6, 6)
    assert data.num_classes == 3 and data.classnames == CLASSNAMES
    assert data.lab2cname == dict(enumerate(CLASSNAMES))
    assert {item.label for item in data.train_u} == {-1}
    bare = TinyColoursBare(tiny_cfg(images, ""))
    assert bare.train_u is None and bare.val is None


def test_class_names_are_in_the_order_of_labels(images):
    from dassl.data.datasets import DatasetBase, Datum

    path = str(images / "red_0.png")
    items = [Datum(path, label, classname=name) for label, name in ((5, "f"), (0, "z"), (2, "c"), (0, "z"))]
    data = DatasetBase(train_x=items, test=items)
    assert data.classnames == ["z", "c", "f"] and data.num_classes == 6
    assert data.lab2cname == {0: "z", 2: "c", 5: "f"}


@standin_only
def test_a_dataset_without_training_data_is_refused():
    from dassl.data.datasets import DatasetBase

    with pytest.raises(ValueError, match="no train_x"):
        DatasetBase(test=[])


def test_input_domains(images):
    data = TinyColours(tiny_cfg(images, ""))
    data.domains = ["photo", "sketch"]
    data.check_input_domains(["photo"], ["photo", "sketch"])
    with pytest.raises(ValueError, match="painting"):
        data.check_input_domains(["photo"], ["painting"])
    with pytest.raises(AssertionError, match="source_domains"):
        data.check_input_domains([], ["photo"])


@standin_only
def test_downloading_is_left_out(images):
    with pytest.raises(NotImplementedError, match=r"download_data.*Dassl.pytorch"):
        TinyColours(tiny_cfg(images, "")).download_data("url", "file")


# Few-shot sampling


def slow_shots(sources, num_shots):
    """The contract: source by source, labels in first-seen order, one random.sample each."""
    output = []
    for source in sources:
        labels = []
        for item in source:
            if item.label not in labels:
                labels.append(item.label)
        output.append([])
        for label in labels:
            output[-1] += random.sample([item for item in source if item.label == label], num_shots)
    return output


def test_shots_are_drawn_in_upstreams_order(images):
    data = TinyColours(tiny_cfg(images, ""))
    shuffled = sorted(data.train_x, key=lambda item: item.impath[::-1])
    random.seed(5)
    ours = data.generate_fewshot_dataset(data.train_x, shuffled, num_shots=2)
    after = random.random()
    random.seed(5)
    assert ours == slow_shots([data.train_x, shuffled], 2)
    assert random.random() == after, "and no other random number is drawn"


def test_shots_of_a_small_class(images):
    data = TinyColours(tiny_cfg(images, ""))
    few = data.train_x[:6]  # 4 red, 2 green
    assert len(data.generate_fewshot_dataset(few, num_shots=3)) == 3 + 2
    repeated = data.generate_fewshot_dataset(few, num_shots=3, repeat=True)
    assert [item.label for item in repeated] == [0, 0, 0, 1, 1, 1]


def test_without_shots_the_sources_come_back(images):
    data = TinyColours(tiny_cfg(images, ""))
    assert data.generate_fewshot_dataset(data.train_x) is data.train_x
    both = data.generate_fewshot_dataset(data.train_x, data.val, num_shots=0)
    assert both[0] is data.train_x and both[1] is data.val


def test_splitting_by_label_and_domain(images):
    from dassl.data.datasets import Datum

    data = TinyColours(tiny_cfg(images, ""))
    path = str(images / "red_0.png")
    items = [Datum(path, 1, 7), Datum(path, 0, 7), Datum(path, 1, 8)]
    assert data.split_dataset_by_label(items) == {1: [items[0], items[2]], 0: [items[1]]}
    assert data.split_dataset_by_domain(items) == {7: items[:2], 8: items[2:]}


# DataManager and loaders


def test_loaders_and_batches(images):
    data = manager(images)
    assert (data.num_classes, data.num_source_domains, data.lab2cname[2]) == (3, 0, "blue")
    assert data.dataset.classnames == CLASSNAMES
    assert len(data.train_loader_x) == 2, "12 images in batches of 5: the last 2 are dropped"
    assert len(data.test_loader) == 2, "6 images in batches of 4: the last 2 are kept"

    batch = next(iter(data.train_loader_x))
    assert set(batch) == {"img", "label", "domain", "impath", "index"}
    assert batch["img"].shape == (5, 3, 8, 8) and batch["img"].dtype == torch.float32
    for index, label, path in zip(batch["index"], batch["label"], batch["impath"], strict=True):
        item = data.dataset.train_x[index]
        assert (item.label, item.impath) == (label, path)
    assert set(next(iter(data.train_loader_u))["label"].tolist()) == {-1}
    tested = [label for batch in data.test_loader for label in batch["label"].tolist()]
    assert tested == [item.label for item in data.dataset.test], "in order"


def test_a_training_set_smaller_than_a_batch_is_one_batch(images):
    data = manager(images, DATALOADER__TRAIN_X__BATCH_SIZE=32)
    assert [len(batch["label"]) for batch in data.train_loader_x] == [12]


def test_absent_parts_have_no_loader(images):
    data = manager(images, DATASET__NAME="TinyColoursBare")
    assert data.train_loader_u is None and data.val_loader is None


@pytest.mark.parametrize(("same_as_x", "batch_size"), [(True, 5), (False, 3)])
def test_the_unlabelled_loader_has_its_own_settings_if_wanted(images, same_as_x, batch_size):
    data = manager(images, DATALOADER__TRAIN_U__SAME_AS_X=same_as_x, DATALOADER__TRAIN_U__BATCH_SIZE=3)
    assert data.train_loader_u.batch_size == batch_size


def test_summary_table(images, capsys):
    manager(images, DATASET__SOURCE_DOMAINS=["photo"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    for row in (
        ["Dataset", "TinyColours"],
        ["Source", "['photo']"],
        ["#", "classes", "3"],
        ["#", "train_x", "12"],
        ["#", "train_u", "12"],
        ["#", "val", "6"],
        ["#", "test", "6"],
    ):
        assert row in rows
    manager(images, DATASET__NAME="TinyColoursBare")
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    assert ["#", "train_x"] in rows and ["#", "train_u"] not in rows and ["#", "val"] not in rows
    manager(images, VERBOSE=False)
    assert "train_x" not in capsys.readouterr().out


def test_custom_transforms_and_wrapper(images, capsys):
    from dassl.data import DataManager, DatasetWrapper

    class Wrapper(DatasetWrapper):
        def __getitem__(self, idx):
            return {**super().__getitem__(idx), "extra": idx + 100}

    def to_size(img):
        return torch.tensor(img.size)

    custom = {"custom_tfm_train": [to_size, to_size], "custom_tfm_test": to_size}
    data = DataManager(tiny_cfg(images, ""), **custom, dataset_wrapper=Wrapper)
    printed = capsys.readouterr().out
    assert "* Using custom transform for training" in printed
    assert "* Using custom transform for testing" in printed
    batch = next(iter(data.train_loader_x))
    assert batch["img"].tolist() == batch["img2"].tolist() == [[12, 10]] * 5
    assert torch.equal(batch["extra"], batch["index"] + 100)
    assert "img2" not in next(iter(data.test_loader))


def test_several_augmented_copies_and_the_plain_image(images):
    data = manager(images, DATALOADER__K_TRANSFORMS=3, DATALOADER__RETURN_IMG0=True)
    batch = next(iter(data.train_loader_x))
    assert [view.shape for view in batch["img"]] == [(5, 3, 8, 8)] * 3
    assert not torch.equal(batch["img"][0], batch["img"][1])
    assert batch["img0"].shape == (5, 3, 8, 8)
    tested = next(iter(data.test_loader))
    assert tested["img"].shape == (4, 3, 8, 8) and "img0" in tested, "copies are for training only"


def test_copies_need_a_transform(images):
    from dassl.data import DatasetWrapper

    cfg = tiny_cfg(images, "", DATALOADER__K_TRANSFORMS=2)
    with pytest.raises(ValueError, match="transform"):
        DatasetWrapper(cfg, read_items(images), transform=None, is_train=True)


def test_without_a_transform_the_image_itself_is_returned(images):
    from dassl.data import DatasetWrapper

    items = read_items(images)
    image = DatasetWrapper(tiny_cfg(images, ""), items)[0]["img"]
    assert image.mode == "RGB" and image.size == (12, 10)


@standin_only
def test_other_samplers_are_named(images):
    with pytest.raises(ValueError, match=r"RandomDomainSampler.*Dassl.pytorch"):
        manager(images, DATALOADER__TRAIN_X__SAMPLER="RandomDomainSampler")


def test_batches_depend_on_the_seed_alone(images):
    from dassl.utils import set_random_seed

    first, second = [], []
    for batches in (first, second):
        set_random_seed(3)
        for batch in manager(images).train_loader_x:
            batches += [batch["img"], batch["index"]]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# Transforms


def steps(transform):
    return [type(step).__name__ for step in transform.transforms]


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        ((), ["Resize"]),
        (("random_flip", "random_resized_crop"), ["RandomResizedCrop", "RandomHorizontalFlip"]),
        (("random_crop", "normalize"), ["RandomCrop", "Normalize"]),
        (("random_translation",), ["Resize", "Random2DTranslation"]),
        (("center_crop",), ["Resize"]),
        (
            ("gaussian_blur", "randomgrayscale", "colorjitter", "random_resized_crop"),
            ["RandomResizedCrop", "ColorJitter", "RandomGrayscale", "RandomApply"],
        ),
    ],
)
def test_the_order_of_training_transforms_is_fixed(choices, expected):
    from dassl.data.transforms import build_transform
    from PIL import Image

    cfg = tiny_cfg("", "", INPUT__TRANSFORMS=choices, INPUT__GB_K=3)
    transform = quiet(build_transform, cfg, is_train=True)
    assert [name for name in steps(transform) if name != "ToTensor"] == expected
    image = Image.new("RGB", (30, 20), (255, 0, 0))
    assert transform(image).shape == (3, 8, 8)


def test_testing_transforms(capsys):
    from dassl.data.transforms import build_transform
    from PIL import Image

    cfg = tiny_cfg("", "", INPUT__TRANSFORMS=("random_flip", "normalize"), INPUT__PIXEL_MEAN=[0.5] * 3)
    cfg.INPUT.PIXEL_STD = [0.5] * 3
    transform = build_transform(cfg, is_train=False)
    assert steps(transform) == ["Resize", "CenterCrop", "ToTensor", "Normalize"]
    assert capsys.readouterr().out.splitlines() == [
        "Building transform_test",
        "+ resize the smaller edge to 8",
        "+ 8x8 center crop",
        "+ to torch tensor of range [0, 1]",
        "+ normalization (mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5])",
    ]
    red = transform(Image.new("RGB", (30, 20), (255, 0, 0)))
    assert torch.equal(red, torch.tensor([1.0, -1.0, -1.0]).view(3, 1, 1).expand(3, 8, 8))


def test_choices_replace_those_of_the_configuration():
    from dassl.data.transforms import build_transform

    transform = quiet(build_transform, tiny_cfg("", ""), is_train=True, choices=["random_flip"])
    assert steps(transform) == ["Resize", "RandomHorizontalFlip", "ToTensor"]


def test_no_transform(capsys):
    from dassl.data.transforms import build_transform

    assert build_transform(tiny_cfg("", "", INPUT__NO_TRANSFORM=True)) is None
    assert "no transform" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["bilinear", "bicubic", "nearest"])
def test_interpolation(name):
    from dassl.data.transforms import INTERPOLATION_MODES, build_transform
    from torchvision.transforms import InterpolationMode

    assert INTERPOLATION_MODES[name] is InterpolationMode(name)
    transform = quiet(build_transform, tiny_cfg("", "", INPUT__INTERPOLATION=name), is_train=False)
    assert transform.transforms[0].interpolation is InterpolationMode(name)


@standin_only
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"INPUT__TRANSFORMS": ("randaugment",)}, "randaugment.*Dassl.pytorch"),
        ({"INPUT__TRANSFORMS": ("cutout",)}, "cutout.*Dassl.pytorch"),
        ({"INPUT__INTERPOLATION": "lanczos"}, "lanczos"),
    ],
)
def test_left_out_transforms_are_named(options, message):
    from dassl.data.transforms import build_transform

    with pytest.raises(ValueError, match=message):
        build_transform(tiny_cfg("", "", **options))
