"""Pseudo-labels against slow loops that are written from the method's text."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from air_plugin.functional import pseudo_labels
from air_plugin.functional.fusion import fuse
from air_plugin.functional.pseudo_labels import (
    candidate_sets,
    hard_labels,
    leaderboards,
    restrict,
    soft_labels,
    top_k_per_class,
    widen,
)
from air_plugin.functional.ranking import largest


def random_probs(images: int, classes: int, *, seed: int = 0) -> Tensor:
    """Rows that sum to 1, in float64 so that sums of loops and of tensors agree to the last bit that matters."""
    rng = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(images, classes, generator=rng, dtype=torch.float64)).softmax(dim=1)


def quantile(values: list[float], q: float) -> float:
    """Linear interpolation between the two nearest ranks."""
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def top_k_reference(probs: list[list[float]], k: int) -> list[int]:
    kept = []
    for c in range(len(probs[0])):
        of_class = [i for i, row in enumerate(probs) if row.index(max(row)) == c]
        kept += sorted(of_class, key=lambda i: (-max(probs[i]), i))[:k]
    return sorted(kept)


def candidates_reference(probs: Tensor, *, alpha: float, beta: float, per_class: int) -> dict[int, set[int]]:
    """Selected image -> its candidates."""
    pools, sets = pools_reference(probs, alpha=alpha, beta=beta, per_class=per_class)
    return {i: sets[i] for pool in pools.values() for i in pool}


def pools_reference(
    probs: Tensor, *, alpha: float, beta: float, per_class: int
) -> tuple[dict[int, list[int]], dict[int, set[int]]]:
    """Class -> the images in its pool, and every image with candidates -> these."""
    rows = probs.tolist()
    largest_ones = [max(row) for row in rows]
    threshold = quantile(largest_ones, alpha) if alpha else sum(largest_ones) / len(largest_ones)
    columns = [quantile(list(column), beta) for column in zip(*rows, strict=True)]
    sets: dict[int, set[int]] = {}
    for i, row in enumerate(rows):
        intra: set[int] = set()
        total = 0.0
        for c in sorted(range(len(row)), key=lambda c: (-row[c], c)):
            intra.add(c)
            total += row[c]
            if total > threshold:
                break
        inter = {c for c in range(len(row)) if row[c] >= columns[c]}
        chosen = {c for c in intra & inter if row[c] > 1e-7}
        if chosen:
            sets[i] = chosen
    return deferred_acceptance(rows, sets, per_class), sets


def deferred_acceptance(rows: list[list[float]], sets: dict[int, set[int]], per_class: int) -> dict[int, list[int]]:
    """One application after the other, the last image first; the result must not depend on this order."""
    lists = {i: sorted(classes, key=lambda c: (-rows[i][c], c)) for i, classes in sets.items()}
    pools: dict[int, list[int]] = {}
    applying = list(sets)
    while applying:
        i = applying.pop()
        if not lists[i]:
            continue
        c = lists[i].pop(0)
        pool = pools.setdefault(c, [])
        pool.append(i)
        pool.sort(key=lambda j: (-rows[j][c], j))
        applying += pool[per_class:]
        del pool[per_class:]
    return pools


def as_sets(candidates) -> dict[int, set[int]]:
    rows = zip(candidates.index.tolist(), candidates.mask.tolist(), strict=True)
    return {i: {c for c, is_one in enumerate(row) if is_one} for i, row in rows}


# fuse


@pytest.mark.parametrize("weight", [0.0, 0.5, 2.0, 100.0])
def test_fused_rows_sum_to_one_and_equal_the_formula(weight: float):
    text, aux = random_probs(20, 5), random_probs(20, 5, seed=1)
    fused = fuse(text, aux, weight=weight)
    assert torch.allclose(fused.sum(dim=1), torch.ones(20, dtype=torch.float64))
    assert torch.allclose(fused, (text + weight * aux) / (1 + weight))


def test_weight_zero_is_the_text_classifier_alone():
    text = random_probs(20, 5)
    assert torch.allclose(fuse(text, random_probs(20, 5, seed=1), weight=0.0), text)


def test_raw_scores_shift_the_odds_but_rows_still_sum_to_one():
    text = torch.tensor([[0.6, 0.4]])
    fused = fuse(text, torch.tensor([[0.1, 0.4]]), weight=1.0)
    assert torch.allclose(fused, torch.tensor([[0.7 / 1.5, 0.8 / 1.5]]))


def test_fusing_permuted_classes_permutes_the_answer():
    text, aux, order = random_probs(20, 5), random_probs(20, 5, seed=1), torch.tensor([3, 0, 4, 1, 2])
    assert torch.allclose(fuse(text[:, order], aux[:, order], weight=2.0), fuse(text, aux, weight=2.0)[:, order])


# top_k_per_class


@pytest.mark.parametrize("k", [1, 2, 7, 1000])
@pytest.mark.parametrize(("images", "classes"), [(60, 5), (3, 8), (1, 1)])
def test_top_k_equals_a_loop(images: int, classes: int, k: int):
    probs = random_probs(images, classes)
    assert top_k_per_class(probs, k).tolist() == top_k_reference(probs.tolist(), k)


def test_top_k_ties_go_to_the_lower_index():
    probs = torch.tensor([[0.6, 0.4], [0.3, 0.7], [0.6, 0.4], [0.6, 0.4], [0.9, 0.1]])
    assert top_k_per_class(probs, 2).tolist() == [0, 1, 4]


def test_top_k_of_equal_classes_predicts_the_first():
    assert top_k_per_class(torch.full((4, 3), 1 / 3), 2).tolist() == [0, 1]


# hard_labels


@pytest.mark.parametrize("per_class", [1, 3, 1000])
@pytest.mark.parametrize(("images", "classes"), [(60, 5), (3, 8), (1, 1)])
def test_hard_labels_equal_a_loop(images: int, classes: int, per_class: int):
    probs = random_probs(images, classes)
    rows = probs.tolist()
    expected = {i: {rows[i].index(max(rows[i]))} for i in top_k_reference(rows, per_class)}
    assert as_sets(hard_labels(probs, per_class)) == expected


def test_hard_label_of_equal_classes_is_the_first():
    labels = hard_labels(torch.tensor([[0.2, 0.4, 0.4], [0.3, 0.35, 0.35]]), 1)
    assert as_sets(labels) == {0: {1}} and labels.mask.dtype == torch.bool


# leaderboards


def leaderboards_reference(rows: list[list[float]], places: int, order: list[int]) -> dict[int, int]:
    """Image -> class: one image after the other goes to its best class that takes it, and whom it displaces goes on."""
    boards: list[list[int]] = [[] for _ in rows[0]]
    for first in order:
        image, tried = first, {first: 0}
        while tried[image] < len(rows[0]):
            c = sorted(range(len(rows[0])), key=lambda c: (-rows[image][c], c))[tried[image]]
            if rows[image][c] == 0:
                break
            boards[c].append(image)
            boards[c].sort(key=lambda i: (-rows[i][c], i))
            if len(boards[c]) <= places:
                break
            image = boards[c].pop()
            # how many classes the displaced image has been to: this one and all that it likes better
            tried[image] = 1 + sorted(range(len(rows[0])), key=lambda k: (-rows[image][k], k)).index(c)
    return {i: c for c, board in enumerate(boards) for i in board}


def test_leaderboards_of_a_thousand_random_matrices_with_ties_equal_a_loop_in_any_order():
    spilled = 0
    for seed in range(1000):
        rng = torch.Generator().manual_seed(seed)
        images, classes, parts = (int(torch.randint(low, high, (), generator=rng)) for low, high in SIZES)
        probs = torch.zeros(images, classes, dtype=torch.float64)  # in steps of 1/8 or 1/64, so ties are ties
        for row in probs:
            row += torch.bincount(torch.randint(classes, (2**parts,), generator=rng), minlength=classes) / 2**parts
        per_class = int(torch.randint(1, 6, (), generator=rng))
        order = torch.randperm(images, generator=rng).tolist()
        chosen = leaderboards(probs, per_class, chunk=7)
        expected = leaderboards_reference(probs.tolist(), per_class, order)
        assert dict(zip(chosen.index.tolist(), chosen.pool.tolist(), strict=True)) == expected, seed
        assert as_sets(chosen) == {i: {c} for i, c in expected.items()}, seed
        spilled += any(probs[i].argmax() != c for i, c in expected.items())
    assert spilled > 300  # else these matrices compare no more than a selection by top class


@pytest.mark.parametrize("per_class", [1, 7, 20, 1000])
def test_leaderboards_are_full_or_hold_every_image(per_class: int):
    chosen = leaderboards(random_probs(90, 5), per_class)
    assert len(chosen.index) == min(90, 5 * per_class) and chosen.index.tolist() == sorted(set(chosen.index.tolist()))
    assert (chosen.mask.sum(dim=1) == 1).all()
    if per_class <= 18:
        assert chosen.mask.sum(dim=0).tolist() == [per_class] * 5  # a class that few images predict has its share, too


# restrict and widen


@pytest.mark.parametrize(
    "select", [hard_labels, leaderboards, lambda p, k: candidate_sets(p, alpha=0.7, beta=0.5, per_class=k)]
)
def test_selection_among_some_classes_equals_a_loop_over_their_columns(select):
    probs, classes = random_probs(60, 7), [1, 2, 5, 6]
    rows = [[row[c] for c in classes] for row in probs.tolist()]
    alone = [[p / sum(row) for p in row] for row in rows]
    assert torch.allclose(restrict(probs, torch.tensor(classes)), torch.tensor(alone, dtype=torch.float64))
    small = select(restrict(probs, torch.tensor(classes)), 4)
    wide = widen(small, torch.tensor(classes), total=7)
    expected = {i: {classes[c] for c in found} for i, found in as_sets(select(torch.tensor(alone), 4)).items()}
    assert as_sets(wide) == expected and wide.mask.shape[1] == 7
    assert wide.pool.tolist() == [classes[c] for c in small.pool.tolist()]


def test_candidates_among_some_classes_equal_a_loop():
    """The quantile of the largest probabilities, the columns and the pools are of these classes alone."""
    probs, classes = random_probs(83, 8), torch.tensor([0, 3, 4, 7])
    alone = restrict(probs, classes)
    for alpha, beta, per_class in ((0.75, 0.25, 6), (0.9, 0.7, 3), (0.0, 0.5, 1000)):
        chosen = widen(candidate_sets(alone, alpha=alpha, beta=beta, per_class=per_class), classes, total=8)
        found = candidates_reference(alone, alpha=alpha, beta=beta, per_class=per_class)
        assert as_sets(chosen) == {i: {int(classes[c]) for c in sets} for i, sets in found.items()}


def test_no_classes_named_are_all_of_them_bit_by_bit():
    probs = random_probs(20, 5)
    chosen = hard_labels(probs, 3)
    assert restrict(probs, None) is probs and widen(chosen, None, total=5) is chosen


def test_where_all_probability_lies_elsewhere_classes_are_equally_likely():
    probs = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])
    assert restrict(probs, torch.tensor([1, 2])).tolist() == [[0.5, 0.5], [1.0, 0.0]]


# largest


@pytest.mark.parametrize("k", [1, 2, 5, 12])
def test_largest_with_ties_equals_a_loop(k: int):
    scores = torch.randint(4, (30, 12), generator=torch.Generator().manual_seed(5)).double()
    expected = [sorted(range(12), key=lambda c, row=row: (-row[c], c))[:k] for row in scores.tolist()]
    assert largest(scores, k).tolist() == expected
    assert largest(scores.T.contiguous().T, k).tolist() == expected


# candidate_sets


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.75, 1.0])
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("per_class", [1, 4, 1000])
def test_candidates_equal_a_loop(alpha: float, beta: float, per_class: int):
    for seed, (images, classes) in enumerate([(83, 6), (7, 12), (200, 2)]):
        probs = random_probs(images, classes, seed=seed)
        expected = candidates_reference(probs, alpha=alpha, beta=beta, per_class=per_class)
        assert as_sets(candidate_sets(probs, alpha=alpha, beta=beta, per_class=per_class)) == expected
        assert expected  # else this compares nothing


def test_candidates_with_ties_equal_a_loop():
    levels = torch.tensor([[4, 3, 1], [4, 4, 0], [3, 3, 2], [4, 2, 2], [0, 4, 4], [8, 0, 0], [4, 3, 1], [0, 0, 8]])
    probs = levels.double() / 8  # exact in binary, so ties are ties
    for alpha in (0.0, 0.25, 0.5, 1.0):
        for beta in (0.0, 0.25, 0.5, 1.0):
            for per_class in (1, 2, 8):
                expected = candidates_reference(probs, alpha=alpha, beta=beta, per_class=per_class)
                assert as_sets(candidate_sets(probs, alpha=alpha, beta=beta, per_class=per_class)) == expected


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.98])
def test_many_classes_with_ties_equal_a_loop(alpha: float, beta: float):
    # Rows from peaked to flat, so that the sets reach from one class to almost all; float32, exact in steps of 1/256.
    rng = torch.Generator().manual_seed(6)
    probs = torch.zeros(120, 80)
    for i, row in enumerate(probs):
        draws = torch.randint(1 + (i * 80) // 120, (256,), generator=rng)
        row += torch.bincount(draws, minlength=80) / 256
    expected = candidates_reference(probs, alpha=alpha, beta=beta, per_class=5)
    assert as_sets(candidate_sets(probs, alpha=alpha, beta=beta, per_class=5)) == expected
    if alpha == 1 and beta < 0.9:
        assert max(len(classes) for classes in expected.values()) > 32  # more than are sorted at first


def test_the_smallest_set_above_the_threshold():
    # The largest probabilities are 0.5, 0.625, 0.75; their median 0.625 is the threshold, which image 1 only reaches.
    probs = torch.tensor([[0.5, 0.25, 0.25], [0.625, 0.25, 0.125], [0.125, 0.125, 0.75]])
    sets = as_sets(candidate_sets(probs, alpha=0.5, beta=0.0, per_class=9))
    assert sets == {0: {0, 1}, 1: {0, 1}, 2: {2}}


def test_a_small_alpha_and_beta_zero_give_every_image_its_top_class_alone():
    probs = random_probs(40, 5)
    probs[7] = probs[7].mean()  # by far the smallest of the largest probabilities
    sets = as_sets(candidate_sets(probs, alpha=1e-6, beta=0.0, per_class=40))
    expected = {i: {c} for i, c in enumerate(probs.argmax(dim=1).tolist())}
    assert {i: classes for i, classes in sets.items() if i != 7} == {i: c for i, c in expected.items() if i != 7}


def test_alpha_zero_is_the_mean_of_the_largest_probabilities():
    probs = torch.tensor([[0.5, 0.375, 0.125], [0.75, 0.125, 0.125], [0.125, 0.875, 0.0]])  # mean 0.708
    sets = as_sets(candidate_sets(probs, alpha=0.0, beta=0.0, per_class=9))
    assert sets == {0: {0, 1}, 1: {0}, 2: {1}}


@pytest.mark.public_reports
@pytest.mark.parametrize(
    ("rows", "alpha", "beta", "per_class", "expected"),
    [
        ([[0.6, 0.35, 0.05], [0.55, 0.4, 0.05], [0.1, 0.15, 0.75]], 0.99, 0.3, 1, {0: 0, 1: 1, 2: 2}),
        ([[0.7, 0.2, 0.1], [0.68, 0.22, 0.1], [0.4, 0.38, 0.22], [0.3, 0.1, 0.6]], 0.9, 0.6, 1, {0: 0, 2: 1, 3: 2}),
        # All apply to class 0, which keeps image 2; class 1 prefers image 1 to image 0, whose third class is left.
        ([[0.4, 0.35, 0.25], [0.6, 0.4, 0.0], [0.9, 0.05, 0.05]], 1.0, 0.0, 1, {0: 2, 1: 1, 2: 0}),
    ],
)
def test_an_image_that_is_turned_away_applies_to_its_next_candidate(
    rows: list[list[float]], alpha: float, beta: float, per_class: int, expected: dict[int, int]
):
    chosen = candidate_sets(torch.tensor(rows), alpha=alpha, beta=beta, per_class=per_class)
    assert dict(zip(chosen.index.tolist(), chosen.pool.tolist(), strict=True)) == expected
    assert chosen.mask.gather(1, chosen.pool[:, None]).all()


@pytest.mark.public_reports
def test_pools_of_a_thousand_random_matrices_with_ties_equal_a_loop():
    spilled = 0
    for seed in range(1000):
        rng = torch.Generator().manual_seed(seed)
        images, classes, parts = (int(torch.randint(low, high, (), generator=rng)) for low, high in SIZES)
        probs = torch.zeros(images, classes, dtype=torch.float64)  # in steps of 1/8 or 1/64, so ties are ties
        for row in probs:
            row += torch.bincount(torch.randint(classes, (2**parts,), generator=rng), minlength=classes) / 2**parts
        alpha, beta = torch.rand(2, generator=rng).tolist()
        per_class = int(torch.randint(1, 6, (), generator=rng))
        pools, sets = pools_reference(probs, alpha=alpha, beta=beta, per_class=per_class)
        chosen = candidate_sets(probs, alpha=alpha, beta=beta, per_class=per_class, chunk=7)
        expected = {i: c for c, pool in pools.items() for i in pool}
        assert dict(zip(chosen.index.tolist(), chosen.pool.tolist(), strict=True)) == expected, seed
        assert as_sets(chosen) == {i: sets[i] for i in expected}, seed
        spilled += any(probs[i].argmax() != c for i, c in expected.items())
    assert spilled > 300  # else these matrices compare no more than a selection by top class


SIZES = [(1, 40), (2, 9), (3, 7)]  # of images, classes, powers of two


def test_soft_labels_are_renormalised_over_the_candidates():
    probs = random_probs(30, 6)
    chosen = candidate_sets(probs, alpha=0.9, beta=0.4, per_class=4)
    soft = soft_labels(probs[chosen.index], chosen.mask)
    for i, row in zip(chosen.index.tolist(), soft, strict=True):
        candidates = as_sets(chosen)[i]
        total = sum(float(probs[i, c]) for c in candidates)
        expected = [float(probs[i, c]) / total if c in candidates else 0.0 for c in range(6)]
        assert row.tolist() == pytest.approx(expected)


def test_beta_one_leaves_each_class_to_its_most_probable_image():
    probs = random_probs(40, 5)
    candidates = candidate_sets(probs, alpha=1.0, beta=1.0, per_class=40)
    assert (candidates.mask.sum(dim=0) <= 1).all()
    best = probs.argmax(dim=0).tolist()
    assert all(i in [best[c] for c in classes] for i, classes in as_sets(candidates).items())


def test_images_without_candidates_are_dropped():
    # Image 1's top class is below the median of its column, and its other class is not needed.
    probs = torch.tensor([[0.9, 0.1], [0.65, 0.35], [0.8, 0.2], [0.6, 0.4]])
    candidates = candidate_sets(probs, alpha=1e-6, beta=0.5, per_class=9)
    assert as_sets(candidates) == {0: {0}, 2: {0}, 3: {1}}


@pytest.mark.parametrize("per_class", [2, 50])
def test_permuting_classes_permutes_the_candidates(per_class: int):
    probs, order = random_probs(50, 6), torch.tensor([2, 5, 0, 1, 4, 3])
    plain = candidate_sets(probs, alpha=0.7, beta=0.6, per_class=per_class)
    moved = candidate_sets(probs[:, order], alpha=0.7, beta=0.6, per_class=per_class)
    assert torch.equal(moved.index, plain.index)
    assert torch.equal(moved.mask, plain.mask[:, order])


def test_permuting_images_permutes_the_candidates():
    probs = random_probs(50, 6)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(2))
    plain = as_sets(candidate_sets(probs, alpha=0.7, beta=0.6, per_class=3))
    moved = as_sets(candidate_sets(probs[order], alpha=0.7, beta=0.6, per_class=3))
    assert {int(order[i]): classes for i, classes in moved.items()} == plain


@pytest.mark.parametrize("chunk", [1, 7, 50, 51])
def test_the_chunk_size_changes_nothing(chunk: int):
    probs = random_probs(50, 6)
    plain = candidate_sets(probs, alpha=0.7, beta=0.6, per_class=3)
    chunked = candidate_sets(probs, alpha=0.7, beta=0.6, per_class=3, chunk=chunk)
    assert torch.equal(chunked.index, plain.index) and torch.equal(chunked.mask, plain.mask)


@pytest.mark.parametrize("block", [1, 90 * 64, 90 * 150])
def test_more_classes_than_fit_one_block_of_columns(block: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pseudo_labels, "BLOCK", block)
    probs = random_probs(90, 150)
    expected = candidates_reference(probs, alpha=0.7, beta=0.95, per_class=2)
    assert as_sets(candidate_sets(probs, alpha=0.7, beta=0.95, per_class=2)) == expected


def test_index_is_ascending_and_no_mask_row_is_empty():
    candidates = candidate_sets(random_probs(80, 5), alpha=0.9, beta=0.8, per_class=3)
    assert candidates.index.tolist() == sorted(candidates.index.tolist())
    assert candidates.mask.dtype == torch.bool and candidates.mask.any(dim=1).all()
