"""Transductive refinement (TransCLIP), a rival: all images are classified together by their structure in feature
space."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from air_plugin.functional.graph import affinity_graph
from air_plugin.functional.ranking import largest

TEMPERATURE = 50.0  # by which the likelihood of the mixture is divided in an assignment
SMALLEST_COUNT = 1e-10  # images of a class; with fewer, its mean is kept
SMALLEST_SHARE = 1e-6  # of a dimension's variance, relative to the mean variance
SMALLEST_VARIANCE = 1e-12  # of a dimension, where all images are the same; features are unit rows


@dataclass(frozen=True)
class Mixture:
    """The Gaussian classes that a method ended with, for images that it did not see (inductive; this use is ours).

    mean: (C, D) and variance: (C, D), float64. text_weight: lambda.
    """

    mean: Tensor
    variance: Tensor
    text_weight: float

    @torch.no_grad()
    def predict(self, features: Tensor, probs: Tensor) -> Tensor:
        """The assignment without its term of neighbours: softmax(lambda log y + log N(f; mu, S) / T).

        Args:
            features: (B, D), unit rows.
            probs: (B, C) predictions y of the same classifier that the mixture was fitted with.

        Returns:
            (B, C) in the type of `probs`, rows sum to 1.
        """
        likelihood = log_likelihood(features.double(), self.mean, self.variance)
        return (self.text_weight * log_predictions(probs) + likelihood / TEMPERATURE).softmax(dim=1).to(probs)


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
) -> tuple[Tensor, Mixture]:
    """Refine predictions by a Gaussian mixture that is regularised by them (TransCLIP, zero-shot form).

    Zanella, Gerin, Ben Ayed, "Boosting Vision-Language Models with Transduction", NeurIPS 2024, arXiv 2406.01837. With
    y the initial predictions, w_ij = f_i . f_j for the k nearest neighbours j of i (0 for all others), T = 50, and one
    diagonal covariance S for all classes, an assignment is

        z_i = softmax(lambda log y_i + (log N(f_i; mu, S) + T / (2 k) sum_j (w_ij + w_ji) z_j) / T),

    from the former z, for all images at once. It is repeated `steps` times; then mu_c is the mean of the features
    weighted by z_c, divided by its norm, and S the mean of the squared distances to the means, weighted by z. z starts
    as y, mu_c as the mean, divided by its norm, of the `seeds` images with the largest y_c, weighted by y_c, and S as
    1/D. There is no class prior.

    Ours: an empty class keeps its mean; a variance is at least a millionth of the mean variance; all but the search for
    neighbours is in float64.

    Args:
        features: (N, D), unit rows.
        probs: (N, C) initial predictions y, rows sum to 1: of the text classifier, or AiR's fused ones.
        text_weight: lambda >= 0, the weight of the initial predictions.
        neighbours: k, of an image, without itself; at most N - 1 are used.
        seeds: number of images in the initial mean of a class; at most N are used.
        rounds: number of updates of mu and S.
        steps: number of updates of z before each of them.
        chunk: images whose neighbours are searched together; bounds the memory at chunk * N cosines.

    Returns:
        (N, C) assignment z in the type of `probs`, rows sum to 1, and the mixture of the last update.
    """
    graph = affinity_graph(features, neighbours, chunk=chunk)
    x, z = features.double(), probs.double()
    text_term = text_weight * log_predictions(probs)
    first = largest(probs.T, min(seeds, len(x)))  # (C, seeds)
    mean = normalize((z.T.gather(1, first)[..., None] * x[first]).sum(dim=1), dim=1)
    variance = torch.full_like(mean, 1 / x.shape[1])
    for _ in range(rounds):
        fixed = text_term + log_likelihood(x, mean, variance) / TEMPERATURE
        z = assign(fixed, graph, z, neighbours=neighbours, steps=steps)
        mean = soft_means(x, z, mean)
        variance = at_least_tiny(squares(x, z, mean).sum(dim=0) / len(x)).expand_as(mean)
    return z.to(probs), Mixture(mean, variance, text_weight)


def log_predictions(probs: Tensor) -> Tensor:
    """(N, C) log y in float64; a probability of 0 counts as the smallest number of float32."""
    return probs.double().clamp(min=torch.finfo(torch.float32).tiny).log()


def assign(fixed: Tensor, graph: Tensor, z: Tensor, *, neighbours: int, steps: int) -> Tensor:
    """Repeat z_i = softmax(fixed_i + sum_j (w_ij + w_ji) z_j / (2 k)) for all images at once.

    Args:
        fixed: (N, C), what does not depend on the other images.
        graph: sparse (N, N), w_ij + w_ji.
        z: (N, C), the former assignment.
        neighbours: k.
        steps: number of repetitions.
    """
    for _ in range(steps):
        z = (fixed + torch.sparse.mm(graph, z) / (2 * max(1, neighbours))).softmax(dim=1)
    return z


def soft_means(x: Tensor, z: Tensor, former: Tensor) -> Tensor:
    """(C, D) unit means of the (N, D) features weighted by the (N, C) assignment; an empty class keeps `former`."""
    return torch.where(z.sum(dim=0)[:, None] > SMALLEST_COUNT, normalize(z.T @ x, dim=1), former)


def at_least_tiny(variance: Tensor) -> Tensor:
    """Variances, the last axis being the dimensions, of which none is 0."""
    smallest = SMALLEST_SHARE * variance.mean(dim=-1, keepdim=True)
    return torch.maximum(variance, smallest.clamp(min=SMALLEST_VARIANCE))


def squares(x: Tensor, z: Tensor, mean: Tensor) -> Tensor:
    """(C, D) sum_i z_ic (x_i - mean_c)^2, without an (N, C, D) array."""
    total = z.T @ x.square() - 2 * mean * (z.T @ x) + z.sum(dim=0)[:, None] * mean.square()
    return total.clamp(min=0)


def log_likelihood(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """(N, C) log N(x_i; mean_c, variance_c) but for the constant, from (C, D) means and variances."""
    precision = 1 / variance
    square = x.square() @ precision.T - 2 * x @ (mean * precision).T + (mean.square() * precision).sum(dim=1)
    return -(square + variance.log().sum(dim=1)) / 2
