"""From class probabilities to pseudo-labels. Pure functions; no label is ever an input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def fuse(text_probs: Tensor, aux_probs: Tensor, *, weight: float) -> Tensor:
    """Add the auxiliary classifier's opinion to the text classifier's: p* = p + lambda p^ (AiR, PLG).

    Args:
        text_probs: (N, C), rows sum to 1.
        aux_probs: (N, C), at least 0; rows sum to 1, or are raw cosines.
        weight: lambda >= 0; 0 is the text classifier alone.

    Returns:
        (N, C), rows sum to 1: the sum divided by 1 + lambda where both inputs are distributions.
    """
    total = text_probs + weight * aux_probs
    return total / total.sum(dim=1, keepdim=True)


def top_k_per_class(probs: Tensor, k: int) -> Tensor:
    """The k most confident images among those predicted as each class (UPL, section 3.2).

    Args:
        probs: (N, C), rows sum to 1.
        k: images a class, at least 1.

    Returns:
        (S,) image indices, ascending, at most k a predicted class; ties go to the lower index.
    """
    confidence, label = probs.max(dim=1)
    order = torch.argsort(confidence, descending=True, stable=True)
    order = order[torch.argsort(label[order], stable=True)]  # by class, most confident first
    counts = torch.bincount(label, minlength=probs.shape[1])
    first = torch.cumsum(counts, dim=0) - counts
    rank = torch.arange(len(order), device=probs.device) - first[label[order]]
    return order[rank < k].sort().values


@dataclass(frozen=True)
class Candidates:
    """Candidate label sets of the selected images.

    index: (S,) positions among the N images, ascending.
    mask: (S, C) bool, at least one True a row.
    """

    index: Tensor
    mask: Tensor


def candidate_sets(probs: Tensor, *, alpha: float, beta: float, per_class: int, chunk: int = 4096) -> Candidates:
    """Candidate label sets (CPL, section 4: intra- and inter-instance selection).

    Intra-instance: the smallest set of top classes whose summed probability reaches tau, the alpha-quantile over images
    of the largest probability. Inter-instance: the classes whose probability is at or above the beta-quantile of their
    column. The candidates are in both; images without any are dropped; then at most `per_class` images are kept of
    each predicted class, the most confident.

    Args:
        probs: (N, C), rows sum to 1.
        alpha: quantile in [0, 1] of the largest probabilities.
        beta: quantile in [0, 1] of each column.
        per_class: images a predicted class, at least 1.
        chunk: rows that are sorted at a time; bounds the memory and changes nothing else.

    Returns:
        The selected images and their candidates.
    """
    tau = _quantile(probs.max(dim=1).values, alpha)
    columns = torch.cat([_quantile(part, beta) for part in probs.split(64, dim=1)])
    mask = torch.cat([_intra(rows, tau) & (rows >= columns) for rows in probs.split(chunk)])
    kept = mask.any(dim=1).nonzero().squeeze(1)
    index = kept[top_k_per_class(probs[kept], per_class)]
    return Candidates(index, mask[index])


def _intra(probs: Tensor, tau: Tensor) -> Tensor:
    """(N, C) bool: the smallest set of top classes whose sum reaches tau."""
    ordered, order = probs.sort(dim=1, descending=True, stable=True)
    before = torch.nn.functional.pad(ordered.cumsum(dim=1)[:, :-1], (1, 0))  # the sum of all larger ones
    chosen = before < tau
    return torch.zeros_like(chosen).scatter_(1, order, chosen)


def _quantile(values: Tensor, q: float) -> Tensor:
    """Linear-interpolated quantile of each column; torch.quantile refuses more than 16 million values."""
    ordered = values.sort(dim=0).values
    position = q * (len(ordered) - 1)
    low = int(position)
    return torch.lerp(ordered[low], ordered[min(low + 1, len(ordered) - 1)], position - low)
