"""StatA, a rival made for unlabelled images that lack classes: class means and variances are anchored to the text."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from air_plugin.functional.anchors import certain_counts, data_driven_weight
from air_plugin.functional.graph import affinity_graph
from air_plugin.functional.transclip import (
    SMALLEST_COUNT,
    TEMPERATURE,
    Mixture,
    assign,
    at_least_tiny,
    log_likelihood,
    log_predictions,
    soft_means,
    squares,
)

AnchorWeight = Literal["fixed", "data"]


@torch.no_grad()
def stata(
    features: Tensor,
    probs: Tensor,
    anchors: Tensor,
    *,
    alpha: float = 1.0,
    anchor_weight: AnchorWeight = "fixed",
    text_weight: float = 1.0,
    neighbours: int = 3,
    rounds: int = 10,
    steps: int = 5,
    chunk: int = 1024,
) -> tuple[Tensor, Mixture]:
    """Refine predictions by a mixture whose Gaussians are anchored to one vector a class (StatA).

    Zanella, Fuchs, De Vleeschouwer, Ben Ayed, "Realistic Test-Time Adaptation of Vision-Language Models", CVPR 2025,
    arXiv 2501.03729. TransCLIP's assignment (`functional.transclip`), with a diagonal covariance S_c for each class and
    its determinant, and in the objective alpha sum_c KL(N(t_c, S') || N(mu_c, S_c)). With y the initial predictions:

        S'   = 1/N sum_ic y_ic (f_i - t_c)^2                          diagonal; mu_c starts at t_c, S_c at S'
        b_c  = n_c / (n_c + alpha),   n_c the number of images whose largest z is z_c
        mu_c = (b_c v_c + (1 - b_c) t_c) / norm,   v_c the mean weighted by z_c, divided by its norm
        S_c  = b_c sum_i z_ic (f_i - mu_c)^2 / sum_i z_ic + (1 - b_c) (S' + (t_c - mu_c)^2)

    so that a class no image belongs to stays at its anchor. The anchors are the text features in the paper; the means
    of generated images in their place are ours.

    `anchor_weight` "data" (its von Mises-Fisher successor, ICML 2026): each class has its own alpha,
    `anchors.data_driven_weight`, and n_c is `anchors.certain_counts`.

    Args:
        features: (N, D), unit rows.
        probs: (N, C) initial predictions y, rows sum to 1.
        anchors: (C, D), unit rows: t.
        alpha: weight of the anchors, in images; not used with "data".
        anchor_weight: fixed (alpha) or data.
        text_weight: lambda >= 0, the weight of the initial predictions.
        neighbours: k, of an image, without itself; at most N - 1 are used.
        rounds: number of updates of the Gaussians.
        steps: number of updates of z before each of them.
        chunk: images whose neighbours are searched together; bounds the memory at chunk * N cosines.

    Returns:
        (N, C) assignment z in the type of `probs`, rows sum to 1, and the mixture of the last update.
    """
    graph, certain = affinity_graph(features, neighbours, chunk=chunk), anchor_weight == "data"
    x, y, t = features.double(), probs.double(), anchors.double()
    text_term = text_weight * log_predictions(probs)
    weight = data_driven_weight(y.mean(dim=0), y.amax(dim=0)) if certain else torch.full_like(t[:, 0], alpha)
    spread = at_least_tiny(squares(x, y, t).sum(dim=0) / len(x))  # (D,) S'
    mean, variance, z = t, spread.expand_as(t), y
    for _ in range(rounds):
        fixed = text_term + log_likelihood(x, mean, variance) / TEMPERATURE
        z = assign(fixed, graph, z, neighbours=neighbours, steps=steps)
        count = certain_counts(z) if certain else torch.bincount(z.argmax(dim=1), minlength=z.shape[1])
        share = (count / (count + weight))[:, None]  # (C, 1) b
        mean = normalize(share * soft_means(x, z, t) + (1 - share) * t, dim=1)
        own = squares(x, z, mean) / z.sum(dim=0).clamp(min=SMALLEST_COUNT)[:, None]
        variance = at_least_tiny(share * own + (1 - share) * (spread + (t - mean).square()))
    return z.to(probs), Mixture(mean, variance, text_weight)
