"""Transductive refinement (TransCLIP), a baseline: all images are classified together by their structure in feature
space."""

from __future__ import annotations

import torch
from torch import Tensor

from air_plugin.functional.ranking import largest

SMALLEST_COUNT = 1e-10  # images of a class; with fewer, its mean is kept
SMALLEST_SHARE = 1e-6  # of a dimension's variance, relative to the mean variance
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
    """Refine predictions by a Gaussian mixture that is regularised by them (TransCLIP, zero-shot form).

    Zanella, Gerin, Ben Ayed, "Boosting Vision-Language Models with Transduction", NeurIPS 2024, arXiv 2406.01837.
    Minimised over assignments z, class means mu and a diagonal covariance S that all classes share:

        - sum_i z_i . log N(f_i; mu, S) - 1/2 sum_ij w_ij z_i . z_j + sum_i (z_i . log z_i - lambda z_i . log y_i)

    with y the initial predictions and w_ij = max(0, f_i . f_j) for the nearest neighbours j of i. The blocks have
    closed forms: z_i = softmax(log N(f_i) + lambda log y_i + sum_j w_ij z_j), from the former z; mu_k the mean of the
    features weighted by z_k; S the mean squared distance to the means, weighted by z.

    From the paper: a mixture with a shared diagonal covariance, a Laplacian term and a KL term to the text's
    predictions; block-wise updates of z (all images at once), mu and S; lambda = 1 and 3 neighbours. Restated without
    the text of the paper, and not yet compared with it: the factors of the terms, the initial mean of a class from its
    8 most confident images, the initial S = 1/D, 10 rounds of 5 updates of z. Ours: w is not symmetric and has no
    diagonal, so the paper's proof of descent does not cover it; the number of rounds is fixed; an empty class keeps its
    mean; a variance is at least a millionth of the mean variance; all but the search for neighbours is in float64.

    Args:
        features: (N, D), unit rows.
        probs: (N, C) initial predictions y, rows sum to 1: of the text classifier, or AiR's fused ones.
        text_weight: lambda >= 0, the weight of the initial predictions.
        neighbours: of an image, without itself; at most N - 1 are used.
        seeds: number of images in the initial mean of a class; at most N are used.
        rounds: number of updates of mu and S.
        steps: number of updates of z before each of them.
        chunk: images whose neighbours are searched together; bounds the memory at chunk * N cosines.

    Returns:
        (N, C) in the type of `probs`, rows sum to 1.
    """
    index, affinity = nearest_neighbours(features, neighbours, chunk=chunk)
    affinity = affinity.double()
    x = features.double()
    x = x - x.mean(dim=0)  # differences of likelihoods stay the same, and a constant dimension becomes 0
    text_term = text_weight * probs.double().clamp(min=torch.finfo(torch.float32).tiny).log()

    assignment = probs.double()
    mean = x[largest(probs.T, min(seeds, len(x)))].mean(dim=1)  # (C, D)
    variance = torch.full_like(x[0], 1 / x.shape[1])
    for _ in range(rounds):
        fixed = text_term + _log_likelihood(x, mean, variance)
        for _ in range(steps):
            assignment = (fixed + _average(assignment, index, affinity)).softmax(dim=1)
        mean = _means(x, assignment, mean)
        variance = _variances(x, assignment, mean)
    return assignment.to(probs)


def nearest_neighbours(features: Tensor, k: int, *, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """The k other images with the largest cosine f_i . f_j, and the affinities w_ij = max(0, f_i . f_j).

    Args:
        features: (N, D), unit rows.
        k: at least 0; at most N - 1 are used.
        chunk: images at a time.

    Returns:
        (N, k) indices by falling cosine, and (N, k) affinities.
    """
    k = min(k, len(features) - 1)
    indices, affinities = [], []
    for start in range(0, len(features), chunk):
        cosine = features[start : start + chunk] @ features.T  # (chunk, N)
        cosine.diagonal(start).fill_(float("-inf"))  # an image is no neighbour of itself
        values, index = cosine.topk(k, dim=1)
        indices.append(index)
        affinities.append(values.clamp(min=0))
    return torch.cat(indices), torch.cat(affinities)


def _average(assignment: Tensor, index: Tensor, affinity: Tensor) -> Tensor:
    """(N, C): sum_j w_ij z_j over the (N, k) neighbours, one at a time, so that no (N, k, C) array is needed."""
    total = torch.zeros_like(assignment)
    for j in range(index.shape[1]):
        total.addcmul_(affinity[:, j, None], assignment[index[:, j]])
    return total


def _log_likelihood(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """(N, C) log N(x_i; mean_c, variance) up to terms that are the same for all classes (x^2, the determinant)."""
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
