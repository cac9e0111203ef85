"""From class probabilities to pseudo-labels (UPL) and candidate sets (CPL). No true label is an input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from air_plugin.functional.ranking import at_least

BLOCK = 2**23  # largest number of values in a temporary copy


def top_k_per_class(probs: Tensor, k: int) -> Tensor:
    """The k most confident images of each predicted class: argmax_c p_ic = c, by falling max_c p_ic (UPL, section 3.2).

    Args:
        probs: (N, C), rows sum to 1.
        k: images of each class, at least 1.

    Returns:
        (S,) image indices, ascending, at most k a predicted class; ties go to the lower index.
    """
    confidence, label = probs.max(dim=1)
    return _top_k(confidence, label, k, classes=probs.shape[1])


def _top_k(confidence: Tensor, label: Tensor, k: int, *, classes: int) -> Tensor:
    """`top_k_per_class` from (N,) largest probabilities and (N,) predicted classes."""
    order = torch.argsort(confidence, descending=True, stable=True)
    order = order[torch.argsort(label[order], stable=True)]  # by class, most confident first
    counts = torch.bincount(label, minlength=classes)
    first = torch.cumsum(counts, dim=0) - counts
    rank = torch.arange(len(order), device=order.device) - first[label[order]]
    return order[rank < k].sort().values


@dataclass(frozen=True)
class Candidates:
    """Candidate label sets of the selected images.

    index: (S,) positions among the N images, ascending.
    mask: (S, C) bool, at least one True a row.
    """

    index: Tensor
    mask: Tensor


def hard_labels(probs: Tensor, per_class: int) -> Candidates:
    """One pseudo-label argmax_c p_ic for the most confident images of each predicted class (UPL, section 3.2).

    Args:
        probs: (N, C), rows sum to 1.
        per_class: images of each predicted class, at least 1.

    Returns:
        The selected images; every row of the mask has one True.
    """
    index = top_k_per_class(probs, per_class)
    label = probs[index].argmax(dim=1)
    return Candidates(index, torch.nn.functional.one_hot(label, probs.shape[1]).bool())


def candidate_sets(probs: Tensor, *, alpha: float, beta: float, per_class: int, chunk: int = 4096) -> Candidates:
    """Candidate label sets (CPL, section 4: intra- and inter-instance selection).

    S_i = intra_i and inter_i, with
        intra_i: the smallest set of top classes with sum_c p_ic >= tau, tau = quantile_i(max_c p_ic, alpha);
        inter_i: the classes with p_ic >= quantile_j(p_jc, beta), the quantile over images of the class's column.

    Images with an empty set are dropped; then the `per_class` most confident images of each predicted class are kept.
    Ties go to the lower class and to the lower image.

    Args:
        probs: (N, C), rows sum to 1.
        alpha: quantile in [0, 1] of the largest probabilities.
        beta: quantile in [0, 1] of each column.
        per_class: images of each predicted class, at least 1.
        chunk: rows that are processed together; bounds the memory and changes nothing else.

    Returns:
        The selected images and their candidates.
    """
    confidence, label = probs.max(dim=1)
    tau = _quantile(confidence[None], alpha)
    block = max(1, BLOCK // len(probs))  # columns that are copied together
    columns = torch.cat([_quantile(part.T, beta) for part in probs.split(block, dim=1)])
    mask = torch.cat([_intra(rows, tau) & (rows >= columns) for rows in probs.split(chunk)])
    kept = mask.any(dim=1).nonzero().squeeze(1)
    index = kept[_top_k(confidence[kept], label[kept], per_class, classes=probs.shape[1])]
    return Candidates(index, mask[index])


def _intra(probs: Tensor, tau: Tensor, *, first: int = 32) -> Tensor:
    """(N, C) bool: the smallest set of top classes whose sum reaches tau.

    Most images need few classes: only the `first` largest are sorted, and all of them where that is not enough.
    """
    classes = probs.shape[1]
    ordered = probs.topk(min(first, classes), dim=1).values
    total = ordered.cumsum(dim=1)
    count = 1 + (total[:, :-1] < tau).sum(dim=1, keepdim=True)  # how many classes the set has
    chosen = at_least(probs, ordered.gather(1, count - 1), count=count)
    short = (total[:, -1] < tau).nonzero().squeeze(1)
    if first < classes and len(short):
        chosen[short] = _intra(probs[short], tau, first=classes)
    return chosen


def _quantile(values: Tensor, q: float) -> Tensor:
    """Linear-interpolated quantile of each row of (R, N); torch.quantile refuses more than 16 million values."""
    values = values.contiguous()
    position = q * (values.shape[1] - 1)
    low = int(position)
    below = values.kthvalue(low + 1, dim=1).values
    above = values.kthvalue(min(low + 2, values.shape[1]), dim=1).values
    return torch.lerp(below, above, position - low)
