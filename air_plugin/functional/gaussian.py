"""Classes as Gaussians with one covariance: fitted to generated images, then carried to the unlabelled ones by EM.

The cosine classifier takes all directions of feature space as equal. Here a class c is N(m_c, S) with an S that all
classes share, and its score is again linear: f S^-1 m_c - m_c' S^-1 m_c / 2 (linear discriminant analysis). Statistics
are in float64 throughout; images pass in chunks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Half the likelihood's weight: real features are only roughly Gaussian, and the full likelihood drowns the text's
# evidence. Chosen on handwriting fonts (docs/method.md).
LIKELIHOOD_WEIGHT = 0.5
LEAST_SHRINKAGE = 1e-6  # keeps a covariance invertible where images are fewer than dimensions
LEAST_COUNT = 1e-9  # images; a class with fewer of them has no mean of its own
SMALLEST = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Gaussians:
    """C classes with a shared covariance.

    mean: (C, D), float64.
    covariance: (D, D), float64, positive definite.
    counts: (C,), float64: how many observations each mean is worth.
    """

    mean: Tensor
    covariance: Tensor
    counts: Tensor

    def head(self) -> tuple[Tensor, Tensor]:
        """(C, D) weight and (C,) bias, float64: f w_c + b_c is log N(f; m_c, S) but for what all classes share.

        Their mean over the classes is taken off: no probability changes, and float32 loses less.
        """
        weight = torch.linalg.solve(self.covariance, self.mean.T).T
        bias = -(weight * self.mean).sum(dim=1) / 2
        return weight - weight.mean(dim=0), bias - bias.mean()

    def bias_corrected_head(self) -> tuple[Tensor, Tensor]:
        """`head` without what poorly known means cost their classes (ours).

        A mean that is worth n observations lies S / n from the true one, so that an image of its class has a
        log-likelihood that is D / 2n too low in the mean. Classes that the unlabelled images lack would lose to the
        others by it.
        """
        weight, bias = self.head()
        bias = bias + self.mean.shape[1] / (2 * self.counts)
        return weight, bias - bias.mean()


@dataclass(frozen=True)
class Refined:
    """What EM came to.

    model: the classes as they are among the unlabelled images.
    soft_counts: (C,) how many unlabelled images each class holds.
    prior_strength: n0, how many observations a generated class mean is worth; 0 without generated images.
    iterations: that it took.
    converged: False where it was cut off.
    """

    model: Gaussians
    soft_counts: Tensor
    prior_strength: float
    iterations: int
    converged: bool


def oas_shrinkage(covariance: Tensor, count: float) -> float:
    """How much of a covariance to replace by its mean diagonal: the oracle approximating shrinkage estimator.

    Chen, Wiesel, Eldar, Hero, "Shrinkage algorithms for MMSE covariance estimation", 2010, eq. 23, as scikit-learn has
    it (without the terms in 2/D). From the covariance and not from the data, which EM never holds as residuals.

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
    """(D, D) covariance of `count` observations, positive definite; the unit matrix where nothing varies."""
    size = len(covariance)
    unit = torch.eye(size, dtype=covariance.dtype, device=covariance.device)
    scale = covariance.trace() / size
    if scale <= 0:
        return unit
    share = max(oas_shrinkage(covariance, count), LEAST_SHRINKAGE)
    return (1 - share) * covariance + share * scale * unit


def fit_gaussians(features: Tensor, labels: Tensor, *, classes: int) -> Gaussians:
    """Class means and one shrunk within-class covariance (ours, after linear discriminant analysis).

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
    residual = x - mean[labels] if freedom else x - x.mean(dim=0)  # one image a class: all we know is their spread
    freedom = freedom or max(len(x) - 1, 1)
    return Gaussians(mean, shrink(residual.T @ residual / freedom, freedom), counts)


@torch.no_grad()
def refine(
    features: Tensor,
    text_probs: Tensor,
    *,
    prior: Gaussians | None,
    likelihood_weight: float = LIKELIHOOD_WEIGHT,
    iterations: int = 100,
    tolerance: float = 1e-4,
    chunk: int = 4096,
) -> Refined:
    """Fit the classes to unlabelled images by EM, as a MAP estimate with the generated images as prior (ours).

    E step, for image i with text probabilities p_i:

        z_i = softmax_c(log p_ic + a log N(f_i; m_c, S)),   a = likelihood_weight

    so the text holds in every step, not at the start alone (as TransCLIP's, arXiv 2406.01837), and classes are equally
    likely a priori: proportions that follow the data let large classes swallow small ones. M step, with N_c = sum_i
    z_ic, x_c the mean that z gives class c, and u_c, S0 the prior's means and covariance, made of n images:

        d   = sum_c w_c (x_c - u_c) / sum_c w_c,   w_c = n0 N_c / (n0 + N_c)   the shift from generated to real images
        m_c = (n0 (u_c + d) + N_c x_c) / (n0 + N_c)                                a mean is worth n0 observations
        S   = (n S0 + sum_ic z_ic (f_i - m_c)(f_i - m_c)' + n0 sum_c e_c e_c') / (n + N + C),   e_c = m_c - u_c - d

    It is the MAP estimate under m_c ~ N(u_c + d, S / n0), S ~ inverse Wishart with S0 counted n times, and a flat prior
    of d. A class without images stays where the generated ones put it, shifted as the others are. n0 is no setting: it
    is estimated by moments, since under the prior e' S^-1 e / D of x_c - u_c - d is 1 / n0 + 1 / N_c in the mean; the
    median over the classes that have images, so that some absent ones do not decide, held between 1 and the images
    generated a class. Where generated and real images disagree, n0 is small, and the generated ones have little to say.

    The first E step is the text alone, and the first M step no more than the shift d: text that errs would else pull
    the mean of an absent class into a present one, and the class would stay there and swallow the other.

    Without a prior, n0 and n are 0, S is shrunk by `oas_shrinkage`, and a class without images keeps its former mean:
    EM from zero-shot, the rival without diffusion.

    Args:
        features: (N, D) of unlabelled images, unit rows.
        text_probs: (N, C), rows sum to 1.
        prior: of the generated images; None is none.
        likelihood_weight: a > 0.
        iterations: at most, at least 1.
        tolerance: ends when the class sums of the features move by less than this share of N in all.
        chunk: images at a time; it bounds the memory beside the inputs at a few times chunk * (C + D) numbers, and
            (C + D) * D more.
    """
    total, moment = len(features), _second_moment(features, chunk)
    model: Gaussians | None = None
    before = prior or Gaussians(*_spread(features, moment, text_probs.shape[1]))
    steps, prior_strength, sums = 0, 0.0, before.mean.new_full(before.mean.shape, float("inf"))
    soft_counts, converged = before.mean.new_zeros(len(before.mean)), False
    for _ in range(iterations):
        former, (soft_counts, sums) = sums, _expect(features, text_probs, model, likelihood_weight, chunk)
        current = model or before
        if prior is None:
            model = _maximise_alone(current, soft_counts, sums, moment, total)
        elif model is None:
            model = _moved(prior, soft_counts, sums)
        else:
            model, prior_strength = _maximise(prior, current, soft_counts, sums, moment, total, prior_strength)
        steps += 1
        converged = bool((sums - former).norm(dim=1).sum() < tolerance * total)
        if converged:
            break
    assert model is not None
    return Refined(model, soft_counts, prior_strength, steps, converged)


@torch.no_grad()
def posterior(
    model: Gaussians,
    features: Tensor,
    text_probs: Tensor,
    *,
    likelihood_weight: float = LIKELIHOOD_WEIGHT,
    chunk: int = 4096,
) -> Tensor:
    """(N, C) z of the last E step in the type of `text_probs`, rows sum to 1; arguments as of `refine`."""
    result = torch.empty_like(text_probs)
    for part, z in _assign(features, text_probs, model, likelihood_weight, chunk):
        result[part] = z.to(result)
    return result


def _assign(
    features: Tensor, text_probs: Tensor, model: Gaussians | None, likelihood_weight: float, chunk: int
) -> Iterator[tuple[slice, Tensor]]:
    """The E step, chunk by chunk: which images, and their (n, C) z in float64."""
    head = model.head() if model else None
    for start in range(0, len(features), chunk):
        part = slice(start, min(start + chunk, len(features)))
        score = text_probs[part].double().clamp(min=SMALLEST).log_()  # a copy: the input stays as it is
        if head is not None:
            likelihood = torch.addmm(head[1], features[part].double(), head[0].T)
            score += likelihood.mul_(likelihood_weight)
        yield part, score.softmax(dim=1)


def _expect(
    features: Tensor, text_probs: Tensor, model: Gaussians | None, likelihood_weight: float, chunk: int
) -> tuple[Tensor, Tensor]:
    """(C,) soft_counts and (C, D) sums of the features, weighted by z."""
    soft_counts = torch.zeros(text_probs.shape[1], dtype=torch.float64, device=features.device)
    sums = soft_counts.new_zeros(len(soft_counts), features.shape[1])
    for part, z in _assign(features, text_probs, model, likelihood_weight, chunk):
        soft_counts += z.sum(dim=0)
        sums.addmm_(z.T, features[part].double())
    return soft_counts, sums


def _second_moment(features: Tensor, chunk: int) -> Tensor:
    """(D, D) sum of f f', in float64."""
    moment = torch.zeros(features.shape[1], features.shape[1], dtype=torch.float64, device=features.device)
    for start in range(0, len(features), chunk):
        part = features[start : start + chunk].double()
        moment.addmm_(part.T, part)
    return moment


def _spread(features: Tensor, moment: Tensor, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """All classes at the mean of the images, with the covariance of all of them: where EM without a prior begins."""
    mean = features.mean(dim=0, dtype=torch.float64)
    covariance = shrink(moment / len(features) - torch.outer(mean, mean), len(features))
    return mean.expand(classes, -1), covariance, mean.new_zeros(classes)


def _scatter(mean: Tensor, soft_counts: Tensor, sums: Tensor, moment: Tensor) -> Tensor:
    """(D, D) sum_ic z_ic (f_i - m_c)(f_i - m_c)', from sums alone, since the z of an image sum to 1."""
    cross = mean.T @ sums
    return moment - cross - cross.T + (mean * soft_counts[:, None]).T @ mean


def _maximise_alone(former: Gaussians, soft_counts: Tensor, sums: Tensor, moment: Tensor, total: int) -> Gaussians:
    mean = torch.where(
        soft_counts[:, None] > LEAST_COUNT, sums / soft_counts.clamp(min=LEAST_COUNT)[:, None], former.mean
    )
    return Gaussians(mean, shrink(_scatter(mean, soft_counts, sums, moment) / total, total), soft_counts.clamp(min=1))


def _maximise(
    prior: Gaussians,
    former: Gaussians,
    soft_counts: Tensor,
    sums: Tensor,
    moment: Tensor,
    total: int,
    prior_strength: float,
) -> tuple[Gaussians, float]:
    """The M step with a prior: the classes, and n0."""
    own = sums / soft_counts.clamp(min=LEAST_COUNT)[:, None]  # x_c
    most = float(prior.counts.mean())
    prior_strength = prior_strength or most
    for _ in range(2):  # d and n0 depend on each other
        shift = _shift(prior.mean, own, soft_counts, prior_strength)
        prior_strength = _worth(own - prior.mean - shift, soft_counts, former.covariance, most=most)
    generated = prior.mean + _shift(prior.mean, own, soft_counts, prior_strength)
    mean = (prior_strength * generated + sums) / (prior_strength + soft_counts)[:, None]
    apart = mean - generated
    images = float(prior.counts.sum())
    scatter = images * prior.covariance + _scatter(mean, soft_counts, sums, moment) + prior_strength * apart.T @ apart
    return Gaussians(mean, scatter / (images + total + len(mean)), prior_strength + soft_counts), prior_strength


def _moved(prior: Gaussians, soft_counts: Tensor, sums: Tensor) -> Gaussians:
    """The first M step: the prior, shifted."""
    own = sums / soft_counts.clamp(min=LEAST_COUNT)[:, None]
    shift = _shift(prior.mean, own, soft_counts, float(prior.counts.mean()))
    return Gaussians(prior.mean + shift, prior.covariance, prior.counts)


def _shift(generated: Tensor, own: Tensor, soft_counts: Tensor, prior_strength: float) -> Tensor:
    """(D,) d; every class counts by how well its difference is known, so none without images does."""
    weight = prior_strength * soft_counts / (prior_strength + soft_counts)
    return weight @ (own - generated) / weight.sum()


def _worth(difference: Tensor, soft_counts: Tensor, covariance: Tensor, *, most: float) -> float:
    """n0 by moments, in [1, most]."""
    present = soft_counts >= 1
    if not present.any():
        return most
    scaled = (difference * torch.linalg.solve(covariance, difference.T).T).sum(dim=1) / difference.shape[1]
    excess = float((scaled[present] - 1 / soft_counts[present]).median())
    return most if excess <= 1 / most else max(1 / excess, 1.0)
