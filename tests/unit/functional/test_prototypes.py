"""Which images stand for a class, against loops over cosines."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from air_plugin.functional.prototypes import gather_prototypes, names_own_class, real_prototypes, select_prototypes


def unit(*shape: int, seed: int = 0) -> Tensor:
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def select_reference(features: Tensor, k: int) -> list[list[int]]:
    chosen = []
    for images in features.tolist():
        mean = [sum(column) / len(images) for column in zip(*images, strict=True)]
        cosines = [cosine(image, mean) for image in images]
        chosen.append(sorted(range(len(images)), key=lambda m: (-cosines[m], m))[:k])
    return chosen


@pytest.mark.parametrize("k", [1, 3, 9])
def test_selection_equals_a_loop(k: int):
    features = unit(4, 9, 16)
    assert select_prototypes(features, k).tolist() == select_reference(features, k)


@pytest.mark.parametrize("top", [1, 2, 4])
def test_the_filter_equals_a_loop(top: int):
    features, text = unit(4, 9, 16), unit(4, 16, seed=1)
    features[2, :, :] = normalize(features[2] - 3 * text[2], dim=1)  # a class of which no image would remain
    found = names_own_class(features, text, top=top).tolist()
    for label, images in enumerate(features.tolist()):
        scores = [[cosine(image, other) for other in text.tolist()] for image in images]
        rank = [sorted(range(4), key=lambda c, row=row: -row[c]).index(label) for row in scores]
        passed = [place < top for place in rank]
        assert found[label] == (passed if any(passed) else [True] * 9)
    assert all(found[2])


@pytest.mark.parametrize("k", [1, 3, 9])
def test_images_that_are_not_usable_come_last(k: int):
    features = unit(4, 9, 16)
    usable = torch.rand(4, 9, generator=torch.Generator().manual_seed(2)) < 0.5
    usable[:, 4] = True
    chosen = select_prototypes(features, k, usable=usable).tolist()
    for label, row in enumerate(usable.tolist()):
        good = [m for m in range(9) if row[m]]
        expected = [good[m] for m in select_reference(features[label, good][None], len(good))[0]][:k]
        assert chosen[label][: len(expected)] == expected and len(set(chosen[label])) == k
    assert torch.equal(select_prototypes(features, k, usable=torch.ones(4, 9).bool()), select_prototypes(features, k))


def test_the_outlier_is_the_first_to_go():
    group = normalize(torch.tensor([1.0, 0.0]) + 0.1 * torch.randn(5, 2, generator=torch.Generator().manual_seed(1)))
    features = torch.cat([group, torch.tensor([[-1.0, 0.0]])])[None]
    assert 5 not in select_prototypes(features, 5).tolist()[0]


def test_ties_go_to_the_lower_index():
    features = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]])
    assert select_prototypes(features, 4).tolist() == [[0, 1, 2, 3]]


def test_fewer_are_a_prefix_of_more():
    features = unit(4, 9, 16)
    assert torch.equal(select_prototypes(features, 8)[:, :3], select_prototypes(features, 3))


def test_permuting_classes_permutes_the_selection():
    features, order = unit(4, 9, 16), torch.tensor([2, 0, 3, 1])
    assert torch.equal(select_prototypes(features[order], 3), select_prototypes(features, 3)[order])


@pytest.mark.parametrize("k", [0, 10, -1])
def test_k_out_of_range_is_an_error(k: int):
    with pytest.raises(ValueError, match=r"1\.\.9"):
        select_prototypes(unit(4, 9, 16), k)


def real_reference(probs: Tensor, images_per_class: int) -> list[list[int]]:
    rows = probs.tolist()
    chosen = []
    for c in range(len(rows[0])):
        predicted = [i for i, row in enumerate(rows) if row.index(max(row)) == c]
        others = [i for i in range(len(rows)) if i not in predicted]
        in_order = [sorted(group, key=lambda i: (-rows[i][c], i)) for group in (predicted, others)]
        chosen.append((in_order[0] + in_order[1])[:images_per_class])
    return chosen


@pytest.mark.parametrize("images_per_class", [1, 4, 15, 40, 99])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_real_prototypes_equal_a_loop(images_per_class: int, dtype: torch.dtype):
    rng = torch.Generator().manual_seed(0)
    probs = (2 * torch.randn(40, 5, generator=rng, dtype=dtype) + torch.tensor([2.0, 1, 0, 0, -9])).softmax(dim=1)
    assert len(probs.argmax(dim=1).unique()) == 4  # nobody is predicted as the last class
    chosen = real_prototypes(probs, images_per_class)
    assert chosen.tolist() == real_reference(probs, images_per_class)
    assert chosen.shape == (5, min(images_per_class, 40))


def test_real_prototypes_with_ties_equal_a_loop():
    probs = torch.randint(4, (50, 3), generator=torch.Generator().manual_seed(1)) / 4
    for images_per_class in (1, 5, 20, 49):
        assert real_prototypes(probs, images_per_class).tolist() == real_reference(probs, images_per_class)


def test_a_predicted_image_comes_before_a_more_probable_one():
    probs = torch.tensor([[0.36, 0.32, 0.32], [0.45, 0.55, 0.0], [0.9, 0.1, 0.0]])
    assert real_prototypes(probs, 3)[0].tolist() == [2, 0, 1]


def test_real_prototypes_move_with_classes_and_images():
    probs = torch.randn(40, 5, generator=torch.Generator().manual_seed(2)).softmax(dim=1)
    classes, images = torch.tensor([4, 2, 0, 1, 3]), torch.randperm(40, generator=torch.Generator().manual_seed(3))
    plain = real_prototypes(probs, 7)
    assert torch.equal(real_prototypes(probs[:, classes], 7), plain[classes])
    assert torch.equal(images[real_prototypes(probs[images], 7)], plain)


def test_gather_takes_the_chosen_features():
    features = unit(3, 5, 4)
    index = torch.tensor([[4, 0], [1, 2], [3, 3]])
    gathered = gather_prototypes(features, index)
    for c in range(3):
        for place, m in enumerate(index[c].tolist()):
            assert torch.equal(gathered[c, place], features[c, m])
