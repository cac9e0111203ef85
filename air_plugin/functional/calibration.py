"""Weights that are usually tuned with labels, chosen without any."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SAMPLE = 20_000  # images that a temperature is chosen on
SMALLEST_SCALE, LARGEST_SCALE = 1e-6, 1e6
SUREST = 0.99  # an expected accuracy beyond this, or its counterpart, is taken as this
LARGEST_WEIGHT = 16.0


def match_confidence(scores: Tensor, confidence: float) -> float:
    """The scale of a head's scores at which it is as confident in the mean as another head.

    Confidence matching, as Frolic does it for the temperatures of two heads (NeurIPS 2024; restated from its idea).
    Neither entropy nor a nuclear norm is looked at: sharpening games both.

    Args:
        scores: (N, C), any real numbers; of N above 20,000, evenly spread rows are looked at.
        confidence: wanted mean over images of the largest probability, in (1/C, 1).

    Returns:
        s > 0 such that softmax(s * scores) has that mean; the nearest of [1e-6, 1e6] where none has.
    """
    step = -(-len(scores) // SAMPLE)
    scores = scores[::step].double()
    scores = scores - scores.max(dim=1, keepdim=True).values
    low, high = math.log(SMALLEST_SCALE), math.log(LARGEST_SCALE)
    for _ in range(60):  # the mean rises with the scale
        middle = (low + high) / 2
        reached = float((1 / (math.exp(middle) * scores).exp().sum(dim=1)).mean())
        low, high = (middle, high) if reached < confidence else (low, middle)
    return math.exp((low + high) / 2)


def mean_confidence(probs: Tensor) -> float:
    """Mean over the rows of (N, C) probabilities of the largest one."""
    return float(probs.max(dim=1).values.double().mean())


def expected_accuracy(probs: Tensor, consensus: Tensor) -> float:
    """The share of right answers that a head would have if the consensus were the truth's distribution.

    Args:
        probs: (N, C) of the head.
        consensus: (N, C), rows sum to 1.
    """
    return float(consensus.gather(1, probs.argmax(dim=1, keepdim=True)).double().mean())


def fusion_weight(text_probs: Tensor, aux_probs: Tensor, *, consensus: Tensor | None = None) -> float:
    """lambda of p* = p + lambda p^ without labels (ours).

    Voters whose errors are independent vote best with the log-odds of their accuracies as weights (Nitzan and Paroush
    1982). The accuracies are those that a consensus of both heads expects.

    Args:
        text_probs: (N, C) p of unlabelled images, rows sum to 1.
        aux_probs: (N, C) p^, rows sum to 1; its confidence matched to p's, so that lambda is the ratio of weights.
        consensus: (N, C), rows sum to 1; None is the normalised product of both.

    Returns:
        lambda in [0, 16].
    """
    if consensus is None:
        product = text_probs.double() * aux_probs.double()
        consensus = product / product.sum(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    return relative_weight(expected_accuracy(aux_probs, consensus), to=expected_accuracy(text_probs, consensus))


def relative_weight(accuracy: float, *, to: float) -> float:
    """Ratio of two teachers' log-odds of being right, in [0, 16]; 0 where the first is no better than a coin.

    Args:
        accuracy: of the first, in [0, 1].
        to: of the other, in [0, 1].
    """
    weight, unit = _log_odds(accuracy), _log_odds(to)
    if weight <= 0:
        return 0.0
    return min(weight / unit, LARGEST_WEIGHT) if unit > 0 else LARGEST_WEIGHT


def _log_odds(share: float) -> float:
    share = min(max(share, 1 - SUREST), SUREST)
    return math.log(share / (1 - share))
