"""Weights that are usually tuned with labels, chosen without any."""

from __future__ import annotations

import math

from torch import Tensor

SAMPLE = 20_000  # images that a temperature is chosen on
SMALLEST_SCALE, LARGEST_SCALE = 1e-6, 1e6


def match_confidence(scores: Tensor, confidence: float) -> float:
    """The scale of a head's scores at which it is as confident in the mean as another head.

    Confidence matching, as Frolic does it for the temperatures of two heads (NeurIPS 2024; restated from its idea).
    Neither entropy nor a nuclear norm is looked at: sharpening games both.

    Args:
        scores: (N, C), any real numbers; of N above 20,000, evenly spread rows are looked at.
        confidence: wanted mean over images of the largest probability, in (1/C, 1).

    Returns:
        s > 0 such that softmax(s * scores) has that mean; the nearest of [1e-6, 1e6] where none has.
    """
    step = -(-len(scores) // SAMPLE)
    scores = scores[::step].double()
    scores = scores - scores.max(dim=1, keepdim=True).values
    low, high = math.log(SMALLEST_SCALE), math.log(LARGEST_SCALE)
    for _ in range(60):  # the mean rises with the scale
        middle = (low + high) / 2
        reached = float((1 / (math.exp(middle) * scores).exp().sum(dim=1)).mean())
        low, high = (middle, high) if reached < confidence else (low, middle)
    return math.exp((low + high) / 2)


def mean_confidence(probs: Tensor) -> float:
    """Mean over the rows of (N, C) probabilities of the largest one."""
    return float(probs.max(dim=1).values.double().mean())
