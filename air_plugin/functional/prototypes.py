"""The choice of prototypes: the images that represent a class (AiR, ACG)."""

from __future__ import annotations

import torch
from torch import Tensor

from air_plugin.functional.ranking import largest
from air_plugin.functional.similarity import cosines


def names_own_class(features: Tensor, text_features: Tensor, *, top: int) -> Tensor:
    """Which generated images show their class: it is among the text classifier's `top` classes for the image.

    A filter of synthetic images as the literature on synthetic training sets has it; AiR has none.

    Args:
        features: (C, M, D), unit rows: M generated images of each class.
        text_features: (C, D), unit rows.
        top: at least 1.

    Returns:
        (C, M) bool. A class of which no image would remain keeps all.
    """
    cosine = cosines(features, text_features)  # (C, M, C)
    own = cosine.diagonal(dim1=0, dim2=2).T[..., None]  # (C, M, 1)
    usable = (cosine > own).sum(dim=2) < top
    return usable | ~usable.any(dim=1, keepdim=True)


def select_prototypes(features: Tensor, k: int, *, usable: Tensor | None = None) -> Tensor:
    """The k images of each class of the largest cosine f_m . mean_c / |mean_c|, mean_c = mean_m f_m (AiR, ACG).

    Args:
        features: (C, M, D), unit rows: M generated images of each class.
        k: number of images to keep, 1 <= k <= M.
        usable: (C, M) bool, at least one a class: the other images have no part in the mean, and are kept only where
            there are fewer than k usable ones.

    Returns:
        (C, k) indices into M, by falling cosine to the class mean; ties go to the lower index.

    Raises:
        ValueError: k is not in 1..M.
    """
    if not 1 <= k <= features.shape[1]:
        raise ValueError(f"k must be in 1..{features.shape[1]}, not {k}")
    counted = features if usable is None else features * usable[..., None]
    mean = torch.nn.functional.normalize(counted.mean(dim=1), dim=1)  # (C, D)
    cosine = torch.einsum("cmd,cd->cm", features, mean)
    if usable is not None:
        cosine = torch.where(usable, cosine, cosine - 4)  # behind all usable ones
    return cosine.argsort(dim=1, descending=True, stable=True)[:, :k]


def real_prototypes(probs: Tensor, images_per_class: int) -> Tensor:
    """The M real images of each class with the highest probability of it: a control of AiR without a generator.

    `select_prototypes` then chooses among their features as among those of generated images.

    Args:
        probs: (N, C) of unlabelled images, rows sum to 1.
        images_per_class: M, at least 1; cut to N.

    Returns:
        (C, M) image indices. Of class c, images that are predicted as c come first, by falling probability of c; where
        there are fewer than M, other images follow in the same order. Ties go to the lower index.
    """
    count, classes = probs.shape
    size = min(images_per_class, count)
    predicted = probs.argmax(dim=1) == torch.arange(classes, device=probs.device)[:, None]  # (C, N)
    members = largest(probs.T.masked_fill(~predicted, -1), size)
    others = largest(probs.T.masked_fill(predicted, -1), size)
    place = torch.arange(size, device=probs.device).expand(classes, -1)
    available = predicted.sum(dim=1, keepdim=True).clamp(max=size)
    place = torch.where(place < available, place, size + place - available)
    return torch.cat([members, others], dim=1).gather(1, place)


def gather_prototypes(features: Tensor, index: Tensor) -> Tensor:
    """The features of prototypes: (C, M, D) features and (C, K) indices into M to (C, K, D)."""
    return features.gather(1, index[..., None].expand(-1, -1, features.shape[2]))
