"""How many images the anchor of a class counts for, estimated from predictions: for StatA and for EM's prior.

After the von Mises-Fisher successor of StatA (ICML 2026).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import one_hot


def data_driven_weight(mean: Tensor, largest: Tensor) -> Tensor:
    """(C,) pseudo-counts of the anchors, 1 / sqrt(mean_i y_ic * max_i y_ic): large for a class that no image shows.

    Args:
        mean: (C,) means over the images of the initial predictions y, in [0, 1].
        largest: (C,) their maxima, in [0, 1].

    Returns:
        At least 1.
    """
    return (mean * largest).clamp(min=torch.finfo(torch.float32).tiny).rsqrt()


def certain_counts(z: Tensor) -> Tensor:
    """(C,) number of images whose largest z is that of the class; an image counts 1 - H(z_i) / log C.

    Args:
        z: (N, C), rows sum to 1.
    """
    classes = z.shape[1]
    weight = torch.ones_like(z[:, 0])
    if classes > 1:
        weight = 1 - torch.special.entr(z).sum(dim=1) / math.log(classes)
    return weight @ one_hot(z.argmax(dim=1), classes).to(z)
