"""ZLaP, a rival: labels spread from the class names to the images over a graph of nearest neighbours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from air_plugin.functional.graph import symmetric

TOLERANCE, MOST_STEPS = 1e-6, 50  # of conjugate gradients


@dataclass(frozen=True)
class Propagation:
    """The solution F of (I - alpha W) F = Y on the graph of anchors and images.

    scores: (A + N, C), anchors first; every entry is at least 0.
    features: (N, D) of the images. anchors: (A, D).
    neighbours, power: as they were used.
    """

    scores: Tensor
    features: Tensor
    anchors: Tensor
    neighbours: int
    power: float

    @property
    def probs(self) -> Tensor:
        """(N, C) scores of the images, divided by the sum of their row (transductive)."""
        return _rows_to_one(self.scores[len(self.anchors) :])

    @torch.no_grad()
    def predict(self, features: Tensor, *, chunk: int = 1024) -> Tensor:
        """Classify new images one by one (inductive): W is symmetric, so F gives the score of any weighted neighbours.

        Args:
            features: (B, D), unit rows, of images that are not in the graph.
            chunk: images at a time.

        Returns:
            (B, C), rows sum to 1.
        """
        rows = []
        for part in features.split(chunk):
            index, weight = _edges(part, self.features, self.anchors, self.neighbours, self.power)
            rows.append((weight[..., None] * self.scores[index]).sum(dim=1))
        return _rows_to_one(torch.cat(rows))


@torch.no_grad()
def propagate(
    features: Tensor,
    anchors: Tensor,
    labels: Tensor | None = None,
    *,
    neighbours: int = 5,
    power: float = 5.0,
    alpha: float = 0.3,
    chunk: int = 1024,
) -> Propagation:
    """Spread labels from anchors to images: solve (I - alpha W) F = Y (ZLaP).

    Stojnic, Kalantidis, Tolias, "Label Propagation for Zero-shot Classification with Vision-Language Models", CVPR
    2024, arXiv 2404.04072. Every image has edges to its k nearest images and to its k nearest anchors, with the cosine
    as weight where that is above 0, and with its power `power` to an anchor, since cosines of images and texts are all
    alike. The k images are searched with the image itself, which is then left out, as in the authors' code; so k - 1
    others remain. W is the sum of these edges and their transposes, W_ij / sqrt(d_i d_j) with d its row sums. Y is 1
    where an anchor has its label. Solved by conjugate gradients to 1e-6, at most 50 steps, all classes together.

    The anchors are the text features in the paper. More than one a class (text and the mean of generated images) is
    ours.

    Args:
        features: (N, D), unit rows.
        anchors: (A, D), unit rows.
        labels: (A,) classes of the anchors; by default every anchor is a class of its own.
        neighbours: k, at most N and A are used.
        power: of the cosine to an anchor.
        alpha: in [0, 1), how far labels spread.
        chunk: images whose neighbours are searched together; bounds the memory at chunk * N cosines.
    """
    labels = torch.arange(len(anchors), device=anchors.device) if labels is None else labels
    x, t = features.double(), anchors.double()
    total = len(t) + len(x)
    edges = [_edges(part, x, t, neighbours, power) for part in x.split(chunk)]
    index, weight = torch.cat([index for index, _ in edges]), torch.cat([weight for _, weight in edges])
    itself = index == torch.arange(len(t), total, device=index.device)[:, None]
    graph = symmetric(index, weight.masked_fill(itself, 0), nodes=total, first=len(t))
    degree = torch.sparse.sum(graph, dim=1).to_dense()
    scale = torch.where(degree > 0, degree, 1).rsqrt()[:, None]
    start = torch.zeros(total, int(labels.max()) + 1, dtype=x.dtype, device=x.device)
    start[torch.arange(len(t), device=x.device), labels] = 1
    scores = _solve(lambda f: f - alpha * scale * torch.sparse.mm(graph, scale * f), start)
    return Propagation(scores.clamp(min=0), x, t, neighbours, power)


def _edges(queries: Tensor, features: Tensor, anchors: Tensor, k: int, power: float) -> tuple[Tensor, Tensor]:
    """(B, 2k) nodes, anchors being numbered first, and weights of the edges of (B, D) images."""
    queries = queries.double()
    images = (queries @ features.T).topk(min(k, len(features)), dim=1)
    texts = (queries @ anchors.T).topk(min(k, len(anchors)), dim=1)
    index = torch.cat([images.indices + len(anchors), texts.indices], dim=1)
    return index, torch.cat([images.values.clamp(min=0), texts.values.clamp(min=0) ** power], dim=1)


def _solve(matrix: Callable[[Tensor], Tensor], right: Tensor) -> Tensor:
    """x with matrix(x) = right, by conjugate gradients, each column on its own; `matrix` is positive definite."""
    x = torch.zeros_like(right)
    residual, direction = right.clone(), right.clone()
    square = residual.square().sum(dim=0)
    smallest = (TOLERANCE**2) * square
    for _ in range(MOST_STEPS):
        open_ = square > smallest
        if not open_.any():
            break
        product = matrix(direction)
        step = torch.where(open_, square / (direction * product).sum(dim=0), 0)
        x += step * direction
        residual -= step * product
        former, square = square, residual.square().sum(dim=0)
        direction = residual + torch.where(open_, square / former, 0) * direction
    return x


def _rows_to_one(scores: Tensor) -> Tensor:
    """Rows divided by their sum; equal values where that is 0."""
    total = scores.sum(dim=1, keepdim=True)
    return torch.where(total > 0, scores / total, 1 / scores.shape[1])
