"""Fusing two classifiers: p* = p + lambda p^, and lambda without labels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SUREST = 0.99  # an expected accuracy beyond this, or its counterpart, is taken as this
LARGEST_WEIGHT = 16.0


def fuse(text_probs: Tensor, aux_probs: Tensor, *, weight: float) -> Tensor:
    """Add the auxiliary classifier's probabilities to the text classifier's: p* = p + lambda p^ (AiR, PLG).

    Args:
        text_probs: (N, C), rows sum to 1.
        aux_probs: (N, C), at least 0; rows sum to 1, or are raw cosines.
        weight: lambda >= 0; 0 is the text classifier alone.

    Returns:
        (N, C), rows sum to 1: the sum divided by 1 + lambda where both inputs are distributions.
    """
    total = text_probs + weight * aux_probs
    return total / total.sum(dim=1, keepdim=True)


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
