"""Transductive refinement: all images are classified together, by their own shape in feature space. A baseline."""

from __future__ import annotations

import torch
from torch import Tensor

from air_plugin.functional.ranking import largest

SMALLEST_COUNT = 1e-10  # of a class, in images; below, its mean stays as it was
SMALLEST_SHARE = 1e-6  # of a dimension's variance in the mean one
SMALLEST_VARIANCE = 1e-12  # of a dimension, where all images are the same; features are unit rows


@torch.no_grad()
def transclip(
    features: Tensor,
    probs: Tensor,
    *,
    text_weight: float = 1.0,
    neighbours: int = 3,
    seeds: int = 8,
    rounds: int = 10,
    steps: int = 5,
    chunk: int = 1024,
) -> Tensor:
    """Refine predictions by a Gaussian mixture that they hold in place (TransCLIP, zero-shot form).

    Zanella, Gerin, Ben Ayed, "Boosting Vision-Language Models with Transduction", NeurIPS 2024, arXiv 2406.01837. Over
    assignments z, class means mu and a diagonal covariance S that all classes share, it lowers

        - sum_i z_i . log N(f_i; mu, S) - 1/2 sum_ij w_ij z_i . z_j + sum_i (z_i . log z_i - lambda z_i . log y_i)

    with y the initial predictions and w_ij = max(0, f_i . f_j) for the nearest neighbours j of i. The blocks have
    closed forms: z_i = softmax(log N(f_i) + lambda log y_i + sum_j w_ij z_j), from the former z; mu_k the mean of the
    features weighted by z_k; S the mean squared distance to the means, weighted by z.

    The paper's: a mixture with a shared diagonal covariance, a Laplacian term and a KL term to the text's predictions;
    block-wise updates of z (all images at once), mu and S; lambda = 1 and 3 neighbours. Restated without the paper's
    text at hand, and still to be compared with it: the factors of the terms, the 8 surest images of each class that its
    mean begins with, S = 1/D at first, 10 rounds of 5 updates of z. Ours: w is neither symmetric nor has it a diagonal,
    so the paper's proof of descent does not cover it; the number of rounds is fixed; an empty class keeps its
    mean; a variance is at least a millionth of the mean one; all but the search for neighbours is in float64.

    Args:
        features: (N, D), unit rows.
        probs: (N, C) initial predictions y, rows sum to 1: of the text classifier, or AiR's fused ones.
        text_weight: lambda >= 0, how strongly the initial predictions hold.
        neighbours: of an image, itself not among them; cut to N - 1.
        seeds: images a class that its mean begins with; cut to N.
        rounds: updates of mu and S.
        steps: updates of z before each of them.
        chunk: images whose neighbours are searched together; bounds the memory at chunk * N cosines.

    Returns:
        (N, C) in the type of `probs`, rows sum to 1.
    """
    index, affinity = nearest_neighbours(features, neighbours, chunk=chunk)
    affinity = affinity.double()
    x = features.double()
    x = x - x.mean(dim=0)  # the likelihoods' differences stay, and a constant dimension is 0
    anchor = text_weight * probs.double().clamp(min=torch.finfo(torch.float32).tiny).log()

    assignment = probs.double()
    mean = x[largest(probs.T, min(seeds, len(x)))].mean(dim=1)  # (C, D)
    variance = torch.full_like(x[0], 1 / x.shape[1])
    for _ in range(rounds):
        fixed = anchor + _log_likelihood(x, mean, variance)
        for _ in range(steps):
            assignment = (fixed + _average(assignment, index, affinity)).softmax(dim=1)
        mean = _means(x, assignment, mean)
        variance = _variances(x, assignment, mean)
    return assignment.to(probs)


def nearest_neighbours(features: Tensor, k: int, *, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """The k other images of the largest cosine.

    Args:
        features: (N, D), unit rows.
        k: at least 0; cut to N - 1.
        chunk: images at a time.

    Returns:
        (N, k) indices by falling cosine, and (N, k) affinities max(0, cosine).
    """
    k = min(k, len(features) - 1)
    indices, affinities = [], []
    for start in range(0, len(features), chunk):
        cosine = features[start : start + chunk] @ features.T  # (chunk, N)
        cosine.diagonal(start).fill_(float("-inf"))  # an image is not its own neighbour
        values, index = cosine.topk(k, dim=1)
        indices.append(index)
        affinities.append(values.clamp(min=0))
    return torch.cat(indices), torch.cat(affinities)


def _average(assignment: Tensor, index: Tensor, affinity: Tensor) -> Tensor:
    """(N, C): sum_j w_ij z_j over the (N, k) neighbours, one neighbour at a time to spare an (N, k, C) array."""
    total = torch.zeros_like(assignment)
    for j in range(index.shape[1]):
        total.addcmul_(affinity[:, j, None], assignment[index[:, j]])
    return total


def _log_likelihood(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """(N, C) log N(x_i; mean_c, variance), but for what is the same for all classes: x^2 and the determinant."""
    scaled = mean / variance
    return x @ scaled.T - (scaled * mean).sum(dim=1) / 2


def _means(x: Tensor, assignment: Tensor, former: Tensor) -> Tensor:
    """(C, D) means of the (N, D) features, weighted by the assignment."""
    soft_counts = assignment.sum(dim=0)[:, None]
    return torch.where(soft_counts > SMALLEST_COUNT, assignment.T @ x / soft_counts.clamp(min=SMALLEST_COUNT), former)


def _variances(x: Tensor, assignment: Tensor, mean: Tensor) -> Tensor:
    """(D,) variances around the (C, D) means, weighted by the assignment."""
    moment = 2 * (assignment @ mean)  # (N, D)
    square = assignment.sum(dim=0) @ mean.square()
    variance = ((x.square() - moment * x).sum(dim=0) + square) / len(x)
    return variance.clamp(min=(SMALLEST_SHARE * variance.mean()).clamp(min=SMALLEST_VARIANCE))
