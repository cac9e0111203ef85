"""Losses against loops over probabilities."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from air_plugin.functional.losses import candidate_weights, consistency_loss, partial_label_loss, synthetic_loss

FORMS = ["cc", "rc", "lw", "cav"]


def logits(rows: int = 6, classes: int = 4, *, scale: float = 2.0, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return scale * torch.randn(rows, classes, generator=rng, dtype=torch.float64)


def probabilities(row: list[float]) -> list[float]:
    exponentials = [math.exp(value - max(row)) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def mask_of(rows: int = 6, classes: int = 4) -> Tensor:
    mask = torch.rand(rows, classes, generator=torch.Generator().manual_seed(3)) < 0.5
    mask[torch.arange(rows), torch.arange(rows) % classes] = True
    return mask


def weights_reference(row: list[float] | None, chosen: list[bool], form: str) -> list[float]:
    """Of one image, from the papers' formulas; no row stands for the start of training."""
    classes = range(len(chosen))
    if form == "cc":
        return [float(is_one) for is_one in chosen]
    if form == "cav" and row is not None:
        values = [abs(f - 1) * f for f in row]
        best = max((c for c in classes if chosen[c]), key=lambda c: (values[c], -c))
        return [float(c == best) for c in classes]
    probs = probabilities(row) if row is not None else [1.0] * len(chosen)
    inside = sum(p for p, is_one in zip(probs, chosen, strict=True) if is_one)
    outside = sum(p for p, is_one in zip(probs, chosen, strict=True) if not is_one)
    return [
        p / inside if is_one else p / outside if form == "lw" else 0.0 for p, is_one in zip(probs, chosen, strict=True)
    ]


def loss_reference(row: list[float], chosen: list[bool], weights: list[float], form: str, leverage: float) -> float:
    """Of one image, from probabilities."""
    probs = probabilities(row)
    if form == "cc":
        return -math.log(sum(p for p, is_one in zip(probs, chosen, strict=True) if is_one))
    total = 0.0
    for p, is_one, weight in zip(probs, chosen, weights, strict=True):
        if is_one:
            total -= weight * math.log(p)
        elif form == "lw":
            total -= leverage * weight * math.log(1 - p)
    return total


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("first_epoch", [True, False])
def test_candidate_weights_equal_a_loop(form: str, first_epoch: bool):
    values, mask = logits(rows=40), mask_of(rows=40)
    weights = candidate_weights(None if first_epoch else values, mask, form=form)
    for i, chosen in enumerate(mask.tolist()):
        expected = weights_reference(None if first_epoch else values[i].tolist(), chosen, form)
        assert weights[i].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("form", ["rc", "lw", "cav"])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_candidate_weights_sum_to_one_within_the_candidates(form: str, scale: float):
    values, mask = logits(rows=40, scale=scale).float(), mask_of(rows=40)
    weights = candidate_weights(values, mask, form=form)
    assert (weights >= 0).all() and torch.allclose((weights * mask).sum(dim=1), torch.ones(40))
    outside = (weights * ~mask).sum(dim=1)
    expected = (~mask).any(dim=1).float() if form == "lw" else torch.zeros(40)
    assert torch.allclose(outside, expected) and len(expected.unique()) == (2 if form == "lw" else 1)


def test_activation_values_are_not_always_in_the_order_of_probabilities():
    values = torch.tensor([[0.5, 0.9, 0.7, 9.0], [3.0, 2.0, -9.0, 0.0], [0.0, 1.0, 0.0, 1.0]])
    mask = torch.tensor([[True, True, True, False], [False, True, True, True], [True, True, False, False]])
    assert candidate_weights(values, mask, form="cav").argmax(dim=1).tolist() == [0, 1, 0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("leverage", [0.0, 1.0, 2.5])
def test_partial_label_loss_equals_a_loop(form: str, leverage: float):
    values, former, mask = logits(), logits(seed=7), mask_of()
    weights = candidate_weights(former, mask, form=form)
    rows = zip(values.tolist(), mask.tolist(), weights.tolist(), strict=True)
    expected = sum(loss_reference(*row, form, leverage) for row in rows) / 6
    assert partial_label_loss(values, mask, weights, form=form, leverage=leverage).item() == pytest.approx(expected)


def test_cc_takes_no_weights_and_the_others_ask_for_them():
    values, mask = logits(), mask_of()
    given = partial_label_loss(values, mask, torch.rand(6, 4), form="cc")
    assert torch.equal(partial_label_loss(values, mask), given)
    for form in ("rc", "lw", "cav"):
        with pytest.raises(ValueError, match="candidate_weights"):
            partial_label_loss(values, mask, form=form)


@pytest.mark.public_reports
@pytest.mark.parametrize("form", FORMS)
def test_soft_labels_weigh_the_candidates(form: str):
    values, former, mask = logits(), logits(seed=7), mask_of()
    soft = torch.rand(6, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * mask
    soft = soft / soft.sum(dim=1, keepdim=True)
    first, later = (candidate_weights(scores, soft, form=form) for scores in (None, former))
    loss, expected = float(partial_label_loss(values, soft, later, form=form)), 0.0
    for i, labels in enumerate(soft.tolist()):
        chosen, probs = [y > 0 for y in labels], probabilities(former[i].tolist())
        weighted = [y * p for y, p in zip(labels, probs, strict=True)]
        if form == "rc":
            assert first[i].tolist() == pytest.approx(labels)
            assert later[i].tolist() == pytest.approx([w / sum(weighted) for w in weighted])
        if form == "cav":
            activation = [
                y * abs(f - 1) * f if y else -math.inf for y, f in zip(labels, former[i].tolist(), strict=True)
            ]
            assert later[i].tolist() == [float(c == activation.index(max(activation))) for c in range(4)]
        if form == "cc":
            now = probabilities(values[i].tolist())
            expected -= math.log(sum(y * p for y, p in zip(labels, now, strict=True)))
        else:
            expected += loss_reference(values[i].tolist(), chosen, later[i].tolist(), form, 2.0)
    assert loss == pytest.approx(expected / 6)


@pytest.mark.parametrize("form", ["cc", "rc", "cav"])
@pytest.mark.parametrize("first_epoch", [True, False])
def test_loss_of_one_candidate_is_cross_entropy(form: str, first_epoch: bool):
    values, label = logits(), torch.tensor([0, 1, 2, 3, 0, 1])
    mask = torch.nn.functional.one_hot(label, 4).bool()
    weights = candidate_weights(None if first_epoch else logits(seed=7), mask, form=form)
    loss = partial_label_loss(values, mask, weights, form=form)
    assert torch.allclose(loss, torch.nn.functional.cross_entropy(values, label))


def test_leverage_adds_the_other_classes_to_cross_entropy():
    values, label = logits(), torch.tensor([0, 1, 2, 3, 0, 1])
    mask = torch.nn.functional.one_hot(label, 4).bool()
    weights = candidate_weights(logits(seed=7), mask, form="lw")
    losses = [partial_label_loss(values, mask, weights, form="lw", leverage=leverage) for leverage in (0.0, 1.0, 2.0)]
    assert torch.allclose(losses[0], torch.nn.functional.cross_entropy(values, label))
    assert losses[1] > losses[0] + 0.1 and torch.allclose(losses[2] - losses[1], losses[1] - losses[0])


def test_loss_of_all_candidates():
    values, mask = logits(), torch.ones(6, 4, dtype=torch.bool)
    assert partial_label_loss(values, mask).item() == pytest.approx(0, abs=1e-12)
    for form in ("rc", "lw"):  # without other classes the leverage has nothing to weigh
        weights = candidate_weights(values, mask, form=form)
        entropy = -(values.softmax(dim=1) * values.log_softmax(dim=1)).sum(dim=1).mean()
        assert torch.allclose(partial_label_loss(values, mask, weights, form=form, leverage=9.0), entropy)


@pytest.mark.parametrize("form", FORMS)
def test_partial_label_loss_does_not_depend_on_the_order_of_classes(form: str):
    values, former, mask, order = logits(), logits(seed=7), mask_of(), torch.tensor([2, 0, 3, 1])
    weights = candidate_weights(former, mask, form=form)
    moved = candidate_weights(former[:, order], mask[:, order], form=form)
    assert torch.allclose(moved, weights[:, order])
    loss = partial_label_loss(values[:, order], mask[:, order], moved, form=form)
    assert torch.allclose(loss, partial_label_loss(values, mask, weights, form=form))


@pytest.mark.parametrize("form", FORMS)
def test_no_gradient_flows_through_the_weights(form: str):
    former, values, mask = logits(seed=7).requires_grad_(), logits().requires_grad_(), mask_of()
    assert not candidate_weights(former, mask, form=form).requires_grad
    weights = candidate_weights(former, mask, form=form).requires_grad_()
    partial_label_loss(values, mask, weights, form=form).backward()
    assert former.grad is None and weights.grad is None and values.grad.abs().sum() > 0


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_candidate_gradient_is_finite_and_that_of_the_loop(scale: float):
    values, mask = logits(scale=scale).requires_grad_(), mask_of()
    partial_label_loss(values, mask).backward()
    assert values.grad.isfinite().all()
    for row, chosen, gradient in zip(values.tolist(), mask.tolist(), values.grad.tolist(), strict=True):
        probs = probabilities(row)
        inside = sum(p for p, is_one in zip(probs, chosen, strict=True) if is_one)
        for p, is_one, value in zip(probs, chosen, gradient, strict=True):
            if inside > 1e-12:  # d/dz of -log sum_S p is p - [c in S] p / sum_S p
                assert value == pytest.approx((p - is_one * p / inside) / 6, abs=1e-9)


@pytest.mark.parametrize("form", ["rc", "lw", "cav"])
def test_gradients_are_those_of_finite_differences(form: str):
    values, mask = logits().requires_grad_(), mask_of()
    weights = candidate_weights(logits(seed=7), mask, form=form)
    assert torch.autograd.gradcheck(lambda x: partial_label_loss(x, mask, weights, form=form, leverage=2.0), values)


@pytest.mark.parametrize("everything", [True, False])
def test_leveraged_loss_is_finite_and_exact_where_a_probability_is_one(everything: bool):
    values = torch.tensor([[1e4, 0.0, -1e4], [200.0, 0.0, 0.0], [0.0, 40.0, 0.0]], requires_grad=True)
    mask = torch.full((3, 3), everything)
    mask[:, 2] = True  # else the class of probability 1 is no candidate
    weights = candidate_weights(None, mask, form="lw")
    loss = partial_label_loss(values, mask, weights, form="lw", leverage=1.0)
    loss.backward()
    assert values.grad.isfinite().all()
    if everything:
        expected = [1e4, 400 / 3, 80 / 3]  # -log p a third each: (0 + 1e4 + 2e4) / 3, ...
    else:  # -log p of the candidate, and half of -log(1 - p) of the class whose p is 1: -log of the others' sum
        expected = [2e4 + 1e4 / 2, 200 + (200 - math.log(2)) / 2, 40 + (40 - math.log(2)) / 2]
    assert loss.item() == pytest.approx(sum(expected) / 3, rel=1e-6)


def test_consistency_loss_equals_a_loop():
    a, b = logits(), logits(seed=1)
    total = 0.0
    for row_a, row_b in zip(a.tolist(), b.tolist(), strict=True):
        for p, q in zip(probabilities(row_a), probabilities(row_b), strict=True):
            total += (p * math.log(p / q) + q * math.log(q / p)) / 2
    assert consistency_loss(a, b).item() == pytest.approx(total / 6)


def test_consistency_loss_is_symmetric_zero_where_both_agree_and_else_positive():
    a, b = logits(), logits(seed=1)
    assert torch.allclose(consistency_loss(a, b), consistency_loss(b, a))
    assert consistency_loss(a, a + 3).item() == pytest.approx(0, abs=1e-12)  # a shift changes no probability
    assert consistency_loss(a, b) > 0.1


def test_consistency_gradient_reaches_both_views_and_is_finite():
    a, b = logits(scale=1e3).requires_grad_(), logits(scale=1e3, seed=1).requires_grad_()
    consistency_loss(a, b).backward()
    for values in (a, b):
        assert values.grad.isfinite().all() and values.grad.abs().sum() > 0


def test_synthetic_loss_equals_a_loop():
    values, label = logits(), torch.tensor([0, 1, 2, 3, 0, 1])
    total = -sum(math.log(probabilities(row)[c]) for row, c in zip(values.tolist(), label.tolist(), strict=True))
    assert synthetic_loss(values, label).item() == pytest.approx(total / 6)
