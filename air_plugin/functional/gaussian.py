"""Classes as Gaussians with one covariance, fitted to generated images; `em` refines them on the unlabelled ones.

A cosine classifier treats all directions of feature space alike. Here a class c is N(m_c, S) with one S for all
classes, and its score is linear as well: f S^-1 m_c - m_c' S^-1 m_c / 2 (linear discriminant analysis). All statistics
are float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LEAST_SHRINKAGE = 1e-6  # keeps a covariance invertible where images are fewer than dimensions


@dataclass(frozen=True)
class Gaussians:
    """C classes with a shared covariance.

    mean: (C, D), float64.
    covariance: (D, D), float64, positive definite.
    counts: (C,), float64: the number of observations behind each mean.
    """

    mean: Tensor
    covariance: Tensor
    counts: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """By name, to be saved or digested."""
        return {"mean": self.mean, "covariance": self.covariance, "counts": self.counts}

    def head(self) -> tuple[Tensor, Tensor]:
        """(C, D) weight w_c = S^-1 m_c and (C,) bias b_c = -m_c' S^-1 m_c / 2, float64.

        f w_c + b_c is log N(f; m_c, S) up to a term that is the same for all classes. Weight and bias are centred over
        the classes: no probability changes, and float32 loses less.
        """
        weight = torch.linalg.solve(self.covariance, self.mean.T).T
        bias = -(weight * self.mean).sum(dim=1) / 2
        return weight - weight.mean(dim=0), bias - bias.mean()

    def bias_corrected_head(self) -> tuple[Tensor, Tensor]:
        """`head` with b_c + D / 2n_c: corrected for the uncertainty of the means (ours).

        A mean of n observations has the covariance S / n around the true one, so the log-likelihood of an image of its
        class is D / 2n too low on average. Without the correction, classes with few observations lose images to others.
        """
        weight, bias = self.head()
        bias = bias + self.mean.shape[1] / (2 * self.counts)
        return weight, bias - bias.mean()


def oas_shrinkage(covariance: Tensor, count: float) -> float:
    """The share r of shrinkage S <- (1 - r) S + r (tr S / D) I: the oracle approximating shrinkage estimator.

        r = (E + s^2) / ((n + 1) (E - s^2 / D)),   s = tr S / D,   E the mean of the squared entries of S

    Chen, Wiesel, Eldar, Hero, "Shrinkage algorithms for MMSE covariance estimation", 2010, eq. 23, as in scikit-learn
    (without the terms in 2/D). Computed from the covariance, since EM never holds the residuals.

    Args:
        covariance: (D, D), of `count` observations.
        count: at least 1.

    Returns:
        In [0, 1].
    """
    size = len(covariance)
    scale = float(covariance.trace()) / size
    energy = float(covariance.square().mean())
    gap = (count + 1) * (energy - scale**2 / size)
    return 1.0 if gap <= 0 else min(1.0, (energy + scale**2) / gap)


def shrink(covariance: Tensor, count: float) -> Tensor:
    """Shrink a (D, D) covariance of `count` observations by `oas_shrinkage`: positive definite; I where it is 0."""
    size = len(covariance)
    unit = torch.eye(size, dtype=covariance.dtype, device=covariance.device)
    scale = covariance.trace() / size
    if scale <= 0:
        return unit
    share = max(oas_shrinkage(covariance, count), LEAST_SHRINKAGE)
    return (1 - share) * covariance + share * scale * unit


def fit_gaussians(features: Tensor, labels: Tensor, *, classes: int) -> Gaussians:
    """Class means and one shrunk within-class covariance, as in linear discriminant analysis.

        m_c = mean of the class's features,   S = shrink(sum_i (f_i - m_c(i))(f_i - m_c(i))' / (n - C))

    Args:
        features: (n, D), of generated images.
        labels: (n,) in 0..classes-1.
        classes: C, each with at least one image.

    Raises:
        ValueError: a class has no image.
    """
    x = features.double()
    counts = torch.bincount(labels, minlength=classes).double()
    if (counts == 0).any():
        raise ValueError(f"class {int(counts.argmin())} has no image")
    mean = x.new_zeros(classes, x.shape[1]).index_add_(0, labels, x) / counts[:, None]
    freedom = len(x) - classes
    residual = x - mean[labels] if freedom else x - x.mean(dim=0)  # one image a class: the total spread
    freedom = freedom or max(len(x) - 1, 1)
    return Gaussians(mean, shrink(residual.T @ residual / freedom, freedom), counts)
