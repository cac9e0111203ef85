"""From class probabilities to pseudo-labels (UPL, GRIP) and candidate sets (CPL). No true label is an input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from air_plugin.functional.ranking import at_least

BLOCK = 2**23  # largest number of values in a temporary copy
SMALLEST = 1e-7  # classes of this probability or less are no candidates


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
    pool: (S,) the candidate in whose pool the image is.
    """

    index: Tensor
    mask: Tensor
    pool: Tensor


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
    return Candidates(index, torch.nn.functional.one_hot(label, probs.shape[1]).bool(), label)


def leaderboards(probs: Tensor, per_class: int, *, chunk: int = 4096) -> Candidates:
    """One pseudo-label for the most confident images of each class, which all get images (GRIP, section 3).

    Every class has a leaderboard of `per_class` places, on which its most probable images stand. An image goes to its
    most probable class; where that leaderboard is full of images with a larger probability of the class, or becomes so
    later, it goes to its next class. An image is on one leaderboard at most. Ties go to the lower class and to the
    lower image. It is deferred acceptance, see `candidate_sets`, with every class as a candidate, so that the result
    does not depend on the order of the images. In the authors' code it does: an image that is displaced is lost, and
    one whose first class is full may be on several leaderboards.

    Args:
        probs: (N, C), rows sum to 1.
        per_class: places on the leaderboard of each class, at least 1.
        chunk: rows that are processed together; bounds the memory and changes nothing else.

    Returns:
        The selected images, N or `per_class` * C, whichever is less; fewer where probabilities are 0: no image goes
        to a class of probability 0.

    Example:
        >>> leaderboards(torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]]), 1).pool.tolist()
        [0, 1]
    """
    index, pool = _deferred_acceptance(probs, torch.ones_like(probs, dtype=torch.bool), per_class, chunk=chunk)
    return Candidates(index, torch.nn.functional.one_hot(pool, probs.shape[1]).bool(), pool)


def restrict(probs: Tensor, classes: Tensor | None) -> Tensor:
    """(N, U) probabilities of some classes alone, renormalised; the same (N, C) where `classes` is None.

    Where all of them are 0 in a row, they are equally likely.

    Args:
        probs: (N, C), at least 0.
        classes: (U,) columns, or None for all of them.
    """
    if classes is None:
        return probs
    kept = probs[:, classes]
    total = kept.sum(dim=1, keepdim=True)
    return torch.where(total > 0, kept / total, 1 / len(classes))


def possible(probs: Tensor, classes: Tensor | None) -> Tensor:
    """`restrict` in the form (N, C): 0 for the other classes; unchanged where `classes` is None."""
    if classes is None:
        return probs
    return torch.zeros_like(probs).index_copy_(1, classes, restrict(probs, classes))


def widen(chosen: Candidates, classes: Tensor | None, *, total: int) -> Candidates:
    """Candidates among (U,) classes as candidates among all C = `total`; unchanged where `classes` is None."""
    if classes is None:
        return chosen
    mask = chosen.mask.new_zeros(len(chosen.mask), total)
    mask[:, classes] = chosen.mask
    return Candidates(chosen.index, mask, classes[chosen.pool])


def soft_labels(probs: Tensor, mask: Tensor) -> Tensor:
    """(S, C) probabilities renormalised over the candidates: p_ic / sum_{k in S_i} p_ik, 0 for the other classes.

    The labels of the first round of CPL's iterative form; later rounds have the mask itself.

    Args:
        probs: (S, C) of the selected images.
        mask: (S, C) bool, their candidates.
    """
    kept = probs * mask
    return kept / kept.sum(dim=1, keepdim=True)


def candidate_sets(probs: Tensor, *, alpha: float, beta: float, per_class: int, chunk: int = 4096) -> Candidates:
    """Candidate label sets, and a balanced selection over them (CPL, section 4).

    S_i = intra_i and inter_i, with
        intra_i: the smallest set of top classes with sum_c p_ic > tau, tau = quantile_i(max_c p_ic, alpha); with alpha
            0, tau is the mean of the max_c p_ic;
        inter_i: the classes with p_ic >= quantile_j(p_jc, beta), the quantile over images of the class's column.

    Every class has a pool of `per_class` places. The pools are filled by deferred acceptance (Gale and Shapley, 1962):
    every image applies to its candidates in the order of falling probability, a class keeps the `per_class` most
    probable of its applicants, and an image that is turned away applies to its next candidate. An image is in one pool
    at most; one that no pool takes is dropped, as is one with an empty set. Ties go to the lower class and to the lower
    image.

    The paper describes the sets and leaves the details open; they are those of the authors' code: the sum strictly
    above tau, the mean with alpha 0, the pools, and that a class of probability 1e-7 or less is no candidate. There, an
    image that is in a pool already wins a tie.

    Args:
        probs: (N, C), rows sum to 1.
        alpha: quantile in [0, 1] of the largest probabilities.
        beta: quantile in [0, 1] of each column.
        per_class: places in the pool of each class, at least 1.
        chunk: rows that are processed together; bounds the memory and changes nothing else.

    Returns:
        The selected images, their candidates and their pools.

    Example:
        >>> probs = torch.tensor([[0.5, 0.3, 0.2], [0.45, 0.4, 0.15], [0.1, 0.2, 0.7]])
        >>> candidate_sets(probs, alpha=0.99, beta=0.2, per_class=1).pool.tolist()  # image 1 goes to its second class
        [0, 1, 2]
    """
    confidence = probs.amax(dim=1)
    tau = _quantile(confidence[None], alpha) if alpha > 0 else confidence.mean().view(1)
    block = max(1, BLOCK // len(probs))  # columns that are copied together
    columns = torch.cat([_quantile(part.T, beta) for part in probs.split(block, dim=1)])
    mask = torch.cat([_intra(rows, tau) & (rows >= columns) & (rows > SMALLEST) for rows in probs.split(chunk)])
    index, pool = _deferred_acceptance(probs, mask, per_class, chunk=chunk)
    return Candidates(index, mask[index], pool)


def _deferred_acceptance(probs: Tensor, mask: Tensor, per_class: int, *, chunk: int) -> tuple[Tensor, Tensor]:
    """(S,) images, ascending, and (S,) the candidates whose pools they are in; see `candidate_sets`.

    All images that are in no pool apply at the same time: the result does not depend on the order (Gale and Shapley).

    Args:
        probs, mask: (N, C).
        per_class: places in each pool.
        chunk: rows that are processed together.
    """
    classes = probs.shape[1]
    value = probs.new_full((len(probs),), float("inf"))  # of each image's latest application: its probability,
    label = torch.full_like(value, -1, dtype=torch.long)  # and its class
    least = probs.new_full((classes,), float("-inf"))  # of a full pool: its smallest probability
    held = label.new_empty(0)  # images in pools
    applying = mask.any(dim=1).nonzero().squeeze(1)
    while len(applying):
        for rows in applying.split(chunk):
            value[rows], label[rows] = _next_candidate(probs[rows], mask[rows], value[rows], label[rows], least)
        applicants = torch.cat([held, applying[value[applying] > 0]]).sort().values
        kept = _top_k(value[applicants], label[applicants], per_class, classes=classes)
        held = applicants[kept]
        turned_away = torch.ones_like(applicants, dtype=torch.bool)
        turned_away[kept] = False
        applying = applicants[turned_away]
        full = torch.bincount(label[held], minlength=classes) == per_class
        smallest = torch.full_like(least, float("inf")).scatter_reduce(0, label[held], value[held], "amin")
        least = torch.where(full, smallest, least)
    return held, label[held]


def _next_candidate(probs: Tensor, mask: Tensor, value: Tensor, label: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """The candidate to which each image applies next: (B,) its probability, 0 where there is none left, and its class.

    Pools only get better, so a candidate whose full pool has no smaller probability is passed over.

    Args:
        probs, mask: (B, C).
        value: (B,) probability of the application before, inf if there was none.
        label: (B,) its class.
        least: (C,) smallest probability of a full pool, else -inf.
    """
    value, number = value[:, None], torch.arange(probs.shape[1], device=probs.device)
    after = (probs < value) | ((probs == value) & (number > label[:, None]))
    return probs.masked_fill(~(mask & after & (probs >= least)), 0).max(dim=1)


def _intra(probs: Tensor, tau: Tensor, *, first: int = 32) -> Tensor:
    """(N, C) bool: the smallest set of top classes whose sum is above tau; all classes where no sum is.

    Most images need few classes: only the `first` largest are sorted, and all of them where that is not enough.
    """
    classes = probs.shape[1]
    ordered = probs.topk(min(first, classes), dim=1).values
    total = ordered.cumsum(dim=1)
    count = 1 + (total[:, :-1] <= tau).sum(dim=1, keepdim=True)  # how many classes the set has
    chosen = at_least(probs, ordered.gather(1, count - 1), count=count)
    short = (total[:, -1] <= tau).nonzero().squeeze(1)
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
