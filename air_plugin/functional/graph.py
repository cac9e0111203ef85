"""Graphs of nearest neighbours among unit features, for the methods that classify all images together."""

from __future__ import annotations

import torch
from torch import Tensor


def nearest_neighbours(features: Tensor, k: int, *, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """The k other images with the largest cosine f_i . f_j.

    Args:
        features: (N, D), unit rows.
        k: at least 0; at most N - 1 are used.
        chunk: images at a time; bounds the memory at chunk * N cosines.

    Returns:
        (N, k) indices by falling cosine, and (N, k) cosines.
    """
    k = min(k, len(features) - 1)
    indices, cosines = [], []
    for start in range(0, len(features), chunk):
        cosine = features[start : start + chunk] @ features.T  # (chunk, N)
        cosine.diagonal(start).fill_(float("-inf"))  # an image is no neighbour of itself
        values, index = cosine.topk(k, dim=1)
        indices.append(index)
        cosines.append(values)
    return torch.cat(indices), torch.cat(cosines)


def affinity_graph(features: Tensor, k: int, *, chunk: int = 1024) -> Tensor:
    """Sparse (N, N) w_ij + w_ji in float64, w_ij = f_i . f_j for the k nearest neighbours j of i, else 0."""
    return symmetric(*nearest_neighbours(features, k, chunk=chunk))


def symmetric(index: Tensor, weight: Tensor, *, nodes: int | None = None, first: int = 0) -> Tensor:
    """A sparse matrix W + W' in float64, from the edges of each row of W.

    Args:
        index: (N, k) columns of the edges.
        weight: (N, k) their weights.
        nodes: number of rows and columns; N by default.
        first: the row of W that the first row of edges belongs to.
    """
    row = torch.arange(first, first + len(index), device=index.device)[:, None].expand_as(index)
    size = (nodes or len(index),) * 2
    places = torch.stack([row.flatten(), index.flatten()])
    half = torch.sparse_coo_tensor(places, weight.flatten().double(), size, check_invariants=True)
    return (half + half.t()).coalesce()
