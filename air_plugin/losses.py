"""Losses of prompt training. Pure functions of logits."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def candidate_loss(logits: Tensor, mask: Tensor) -> Tensor:
    """Partial-label loss 'cc': -log of the candidates' summed probability (CPL; Feng et al., NeurIPS 2020).

    Args:
        logits: (B, C).
        mask: (B, C) bool, at least one True a row.

    Returns:
        The mean over the batch, at least 0.
    """
    log_probs = logits.log_softmax(dim=1)
    return -log_probs.masked_fill(~mask, float("-inf")).logsumexp(dim=1).mean()


def consistency_loss(logits_a: Tensor, logits_b: Tensor) -> Tensor:
    """How far the predictions for two views of the same images lie apart (AiR, L_s): symmetric KL divergence.

    Args:
        logits_a: (B, C) of one view.
        logits_b: (B, C) of the other.

    Returns:
        The mean over the batch, at least 0; 0 where both agree.
    """
    log_a, log_b = logits_a.log_softmax(dim=1), logits_b.log_softmax(dim=1)
    forward = F.kl_div(log_b, log_a, log_target=True, reduction="batchmean")
    backward = F.kl_div(log_a, log_b, log_target=True, reduction="batchmean")
    return (forward + backward) / 2


def synthetic_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Cross entropy on kept generated images, whose class is known (AiR, the form `synthetic` of L_s).

    Args:
        logits: (B, C).
        label: (B,) class indices.
    """
    return F.cross_entropy(logits, label)
