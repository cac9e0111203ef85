"""Losses against loops over probabilities."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from air_plugin.losses import candidate_loss, consistency_loss, synthetic_loss


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


def test_candidate_loss_equals_a_loop():
    values, mask = logits(), mask_of()
    total = 0.0
    for row, chosen in zip(values.tolist(), mask.tolist(), strict=True):
        total -= math.log(sum(p for p, is_one in zip(probabilities(row), chosen, strict=True) if is_one))
    assert candidate_loss(values, mask).item() == pytest.approx(total / 6)


def test_candidate_loss_of_one_candidate_is_cross_entropy():
    values, label = logits(), torch.tensor([0, 1, 2, 3, 0, 1])
    mask = torch.nn.functional.one_hot(label, 4).bool()
    assert torch.allclose(candidate_loss(values, mask), torch.nn.functional.cross_entropy(values, label))


def test_candidate_loss_of_all_candidates_is_zero():
    assert candidate_loss(logits(), torch.ones(6, 4, dtype=torch.bool)).item() == pytest.approx(0, abs=1e-12)


def test_candidate_loss_does_not_depend_on_the_order_of_classes():
    values, mask, order = logits(), mask_of(), torch.tensor([2, 0, 3, 1])
    assert torch.allclose(candidate_loss(values[:, order], mask[:, order]), candidate_loss(values, mask))


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_candidate_gradient_is_finite_and_that_of_the_loop(scale: float):
    values, mask = logits(scale=scale).requires_grad_(), mask_of()
    candidate_loss(values, mask).backward()
    assert values.grad.isfinite().all()
    for row, chosen, gradient in zip(values.tolist(), mask.tolist(), values.grad.tolist(), strict=True):
        probs = probabilities(row)
        inside = sum(p for p, is_one in zip(probs, chosen, strict=True) if is_one)
        for p, is_one, value in zip(probs, chosen, gradient, strict=True):
            if inside > 1e-12:  # d/dz of -log sum_S p is p - [c in S] p / sum_S p
                assert value == pytest.approx((p - is_one * p / inside) / 6, abs=1e-9)


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
