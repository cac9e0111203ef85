"""The inverse temperature of a classifier, chosen without labels."""

from __future__ import annotations

import math

from torch import Tensor

SAMPLE = 20_000  # images that suffice to choose an inverse temperature
SMALLEST, LARGEST = 1e-6, 1e6  # inverse temperatures


def match_confidence(scores: Tensor, confidence: float) -> float:
    """The inverse temperature at which a classifier is as confident, on average, as another classifier.

    Solves mean_i max_c softmax(s * scores_i)_c = confidence for s, by bisection; the left side rises with s. Confidence
    matching is from Frolic (NeurIPS 2024), restated from its idea. Entropy and the nuclear norm do not serve as
    criteria, because sharpening alone improves both.

    Args:
        scores: (N, C), any real numbers; where N exceeds 20,000, evenly spaced rows are used.
        confidence: the mean over images of the largest probability that is asked for, in (1/C, 1).

    Returns:
        The inverse temperature s, in [1e-6, 1e6]; a bound of it where the equation has no solution.

    Example:
        >>> s = match_confidence(aux_scores, mean_confidence(text_probs))
        >>> aux_probs = (s * aux_scores).softmax(dim=1)
    """
    step = -(-len(scores) // SAMPLE)
    scores = scores[::step].double()
    scores = scores - scores.max(dim=1, keepdim=True).values
    low, high = math.log(SMALLEST), math.log(LARGEST)
    for _ in range(60):
        middle = (low + high) / 2
        reached = float((1 / (math.exp(middle) * scores).exp().sum(dim=1)).mean())
        low, high = (middle, high) if reached < confidence else (low, middle)
    return math.exp((low + high) / 2)


def mean_confidence(probs: Tensor) -> float:
    """mean_i max_c p_ic of (N, C) probabilities, in [1/C, 1]."""
    return float(probs.max(dim=1).values.double().mean())
