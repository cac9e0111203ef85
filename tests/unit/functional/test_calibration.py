"""Weights chosen without labels."""

from __future__ import annotations

import math

import pytest
import torch

from air_plugin.functional.calibration import match_confidence, mean_confidence
from air_plugin.functional.fusion import expected_accuracy, fusion_weight

RNG = torch.Generator().manual_seed(0)
SCORES = torch.randn(200, 5, generator=RNG) * 10


@pytest.mark.parametrize("confidence", [0.25, 0.6, 0.9, 0.99])
def test_a_matched_head_is_as_confident_as_was_asked(confidence: float):
    scale = match_confidence(SCORES, confidence)
    assert mean_confidence((scale * SCORES.double()).softmax(dim=1)) == pytest.approx(confidence, abs=1e-6)


def test_the_scale_of_the_scores_and_what_is_added_to_a_row_do_not_matter():
    moved = 1000 * SCORES.double() + torch.arange(200)[:, None]
    assert 1000 * match_confidence(moved, 0.8) == pytest.approx(match_confidence(SCORES, 0.8), rel=1e-4)


@pytest.mark.parametrize(("confidence", "scale"), [(0.05, 1e-6), (1.01, 1e6)])
def test_a_confidence_out_of_reach_gives_the_nearest_scale(confidence: float, scale: float):
    assert match_confidence(SCORES, confidence) == pytest.approx(scale, rel=1e-3)


def test_large_tables_are_looked_at_in_part():
    many = SCORES.repeat(201, 1)  # 40,200 rows; every third of them is looked at
    assert match_confidence(many, 0.7) == pytest.approx(match_confidence(many[::3], 0.7))


def test_expected_accuracy_is_that_of_a_loop():
    head, consensus = SCORES.softmax(dim=1), SCORES.roll(1, dims=0).softmax(dim=1)
    slow = sum(consensus[i, int(head[i].argmax())].item() for i in range(len(head))) / len(head)
    assert expected_accuracy(head, consensus) == pytest.approx(slow)


def sure(labels: torch.Tensor, confidence: float) -> torch.Tensor:
    rest = (1 - confidence) / 3
    return rest + (confidence - rest) * torch.nn.functional.one_hot(labels, 4).double()


def test_the_weight_is_the_ratio_of_log_odds():
    labels = torch.arange(100) % 4
    text, auxiliary = sure(labels.roll(0), 0.6), sure(torch.where(torch.arange(100) < 60, labels, labels + 1) % 4, 0.6)
    consensus = sure(labels, 0.9)
    at_text = 0.9
    at_auxiliary = 0.6 * 0.9 + 0.4 * 0.1 / 3
    expected = math.log(at_auxiliary / (1 - at_auxiliary)) / math.log(at_text / (1 - at_text))
    assert fusion_weight(text, auxiliary, consensus=consensus) == pytest.approx(expected)


def test_equal_heads_weigh_the_same():
    probs = SCORES.softmax(dim=1)
    assert fusion_weight(probs, probs) == pytest.approx(1.0)


def test_a_head_worse_than_a_coin_is_not_listened_to():
    labels = torch.arange(100) % 4
    text, wrong = sure(labels, 0.8), sure((labels + 1) % 4, 0.8)
    assert fusion_weight(text, wrong, consensus=sure(labels, 0.95)) == 0
    assert fusion_weight(wrong, text, consensus=sure(labels, 0.95)) == 16


def test_probabilities_of_zero_do_not_matter():
    labels = torch.arange(8) % 4
    assert math.isfinite(fusion_weight(sure(labels, 1.0), sure((labels + 1) % 4, 1.0)))
