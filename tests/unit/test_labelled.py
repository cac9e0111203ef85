"""Labelled images beside the unlabelled ones: their batches."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from air_plugin.clip.features import FeatureBatches, FeatureTable
from trainers.labelled import BothBatches, LabelledBatches, LabelledImages, labelled_batch, unlabelled_classes

TABLE = FeatureTable(torch.arange(10 * 3 * 2, dtype=torch.float32).reshape(10, 3, 2))
LABELS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3])


def labelled(size: int, batches: int, *, seed: int = 1, epoch: int = 0, members: int = 1) -> LabelledBatches:
    options = {"seed": seed, "epoch": lambda: epoch, "members": members}
    return LabelledBatches(TABLE, LABELS, batch_size=size, batches=batches, **options)


def images_of(batch: dict[str, torch.Tensor]) -> list[int]:
    """Which images a batch holds, by their features; each is an augmented view of an image with its label."""
    found = []
    for row, label in zip(batch["img"], batch["label"].tolist(), strict=True):
        ((image, view),) = (TABLE.features == row).all(dim=2).nonzero().tolist()
        assert view > 0 and LABELS[image] == label
        found.append(image)
    return found


@pytest.mark.parametrize(("size", "count"), [(4, 3), (4, 7), (8, 5), (25, 3), (10, 2)])
def test_the_images_are_cycled_through_and_every_batch_is_full(size: int, count: int) -> None:
    found = list(labelled(size, count))
    assert len(found) == count and all(len(batch["img"]) == size for batch in found)
    order = [image for batch in found for image in images_of(batch)]
    cycles = [order[start : start + 10] for start in range(0, len(order), 10)]
    assert all(len(set(cycle)) == len(cycle) for cycle in cycles)  # none comes again before all have come
    assert len(cycles) < 2 or cycles[0] != cycles[1]


def test_an_epoch_depends_on_seed_and_epoch_alone_and_members_differ() -> None:
    def order(**which: int) -> list[int]:
        torch.randint(100, (1,))  # the global generator has no influence
        return [image for batch in labelled(5, 4, **which) for image in images_of(batch)]

    assert order(seed=1, epoch=3) == order(seed=1, epoch=3)
    assert order(seed=1, epoch=3) != order(seed=1, epoch=4)
    assert order(seed=1, epoch=3) != order(seed=2, epoch=3)
    both = [images_of(batch) for batch in labelled(5, 4, members=2)]
    assert [row[:5] for row in both] == [images_of(batch) for batch in labelled(5, 4)]
    assert [row[5:] for row in both] != [row[:5] for row in both]


def test_labelled_images_have_an_order_of_their_own() -> None:
    usual = FeatureBatches(TABLE, torch.arange(10), {"label": LABELS}, batch_size=5, seed=1, epoch=lambda: 0)
    assert [images_of(batch) for batch in usual] != [images_of(batch) for batch in labelled(5, 2)]


def test_both_kinds_stand_in_one_batch_and_targets_are_those_of_the_unlabelled() -> None:
    index, targets = torch.arange(9), {"target": torch.arange(9)}
    unlabelled = FeatureBatches(TABLE, index, targets, batch_size=3, seed=1, epoch=lambda: 0)
    both = BothBatches(unlabelled, labelled(4, 3))
    both.targets["weights"] = 2 * torch.arange(9)
    found = list(both)
    assert len(both) == len(found) == 3
    for batch, alone, beside in zip(found, unlabelled, labelled(4, 3), strict=True):
        assert torch.equal(batch["weights"], 2 * batch["target"])
        assert all(torch.equal(batch[name], alone[name]) for name in ("img", "img2", "target"))
        assert torch.equal(batch["labelled"], beside["img"]) and torch.equal(batch["label"], beside["label"])


@pytest.mark.parametrize(
    ("labelled_images", "selected", "expected"), [(20, 160, 8), (40, 160, 16), (41, 160, 16), (9000, 100, 256)]
)
def test_the_labelled_batch_is_in_proportion_within_limits(labelled_images: int, selected: int, expected: int) -> None:
    assert labelled_batch(64, labelled=labelled_images, selected=selected) == expected


def test_labels_are_read_of_labelled_images_alone() -> None:
    items = [SimpleNamespace(impath=path, label=label) for path, label in (("b", 1), ("a", 0))]
    common = {"train_x": items, "classnames": ["x", "y", "z"]}
    ssl = SimpleNamespace(**common, paradigm="ssl", unlabelled_classes=[0, 1, 2])
    assert LabelledImages.of(ssl) == LabelledImages(["a", "b"], [0, 1]) and unlabelled_classes(ssl) is None
    assert unlabelled_classes(SimpleNamespace(**common, paradigm="trzsl", unlabelled_classes=[2])) == [2]
    for other in (SimpleNamespace(**common, paradigm="ul", unlabelled_classes=[0, 1, 2]), SimpleNamespace(**common)):
        assert not LabelledImages.of(other) and unlabelled_classes(other) is None
