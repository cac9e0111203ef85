"""Fusion of two classifiers, p* = p + lambda p^ (AiR, PLG), and lambda without labels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LARGEST_ACCURACY = 0.99  # expected accuracies are clipped to [0.01, 0.99], so that their log-odds are bounded
LARGEST_WEIGHT = 16.0


def fuse(text_probs: Tensor, aux_probs: Tensor, *, weight: float) -> Tensor:
    """Fuse the text classifier and the auxiliary classifier: p* = p + lambda p^, normalised (AiR, PLG).

    Args:
        text_probs: (N, C) p, rows sum to 1.
        aux_probs: (N, C) p^, at least 0; rows sum to 1, or are raw cosines.
        weight: lambda >= 0; 0 is the text classifier alone.

    Returns:
        (N, C), rows sum to 1: (p + lambda p^) / (1 + lambda) where both inputs are distributions.

    Example:
        >>> fuse(torch.tensor([[0.6, 0.4]]), torch.tensor([[0.0, 1.0]]), weight=1.0)
        tensor([[0.3000, 0.7000]])
    """
    total = text_probs + weight * aux_probs
    return total / total.sum(dim=1, keepdim=True)


def expected_accuracy(probs: Tensor, consensus: Tensor) -> float:
    """mean_i q_i[argmax_c p_ic]: the accuracy of a classifier p if the labels were distributed as the consensus q.

    Args:
        probs: (N, C) p.
        consensus: (N, C) q, rows sum to 1.

    Returns:
        In [0, 1].
    """
    return float(consensus.gather(1, probs.argmax(dim=1, keepdim=True)).double().mean())


def fusion_weight(text_probs: Tensor, aux_probs: Tensor, *, consensus: Tensor | None = None) -> float:
    """lambda of p* = p + lambda p^, estimated without labels (ours).

        lambda = logit(a^) / logit(a),   a, a^ the `expected_accuracy` of p and p^ under a consensus of both

    Log-odds of the accuracies are the optimal weights of voters with independent errors (Nitzan and Paroush 1982).

    Args:
        text_probs: (N, C) p of unlabelled images, rows sum to 1.
        aux_probs: (N, C) p^, rows sum to 1, of the same mean confidence as p (see `match_confidence`).
        consensus: (N, C), rows sum to 1; None is the normalised product p p^.

    Returns:
        lambda in [0, 16].
    """
    if consensus is None:
        consensus = product_consensus(text_probs, aux_probs)
    return relative_weight(expected_accuracy(aux_probs, consensus), to=expected_accuracy(text_probs, consensus))


def product_consensus(text_probs: Tensor, aux_probs: Tensor) -> Tensor:
    """(N, C) the normalised product p p^ of two classifiers' probabilities, float64."""
    product = text_probs.double() * aux_probs.double()
    return product / product.sum(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)


def relative_weight(accuracy: float, *, to: float) -> float:
    """logit(accuracy) / logit(to), clipped to [0, 16]; 0 where the accuracy is at most a half.

    Args:
        accuracy: of one classifier, in [0, 1].
        to: the accuracy of the other one, in [0, 1].
    """
    weight, unit = _log_odds(accuracy), _log_odds(to)
    if weight <= 0:
        return 0.0
    return min(weight / unit, LARGEST_WEIGHT) if unit > 0 else LARGEST_WEIGHT


def _log_odds(share: float) -> float:
    share = min(max(share, 1 - LARGEST_ACCURACY), LARGEST_ACCURACY)
    return math.log(share / (1 - share))
