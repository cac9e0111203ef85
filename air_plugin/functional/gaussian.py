"""Classes as Gaussians with one covariance: fitted to generated images, then refined on the unlabelled ones by EM.

A cosine classifier treats all directions of feature space alike. Here a class c is N(m_c, S) with one S for all
classes, and its score is linear as well: f S^-1 m_c - m_c' S^-1 m_c / 2 (linear discriminant analysis). All statistics
are float64; images are processed in chunks, and sums over them are added up over shards (`shards`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from air_plugin.functional.shards import (
    SHARD,
    EStep,
    Images,
    InMemory,
    Keep,
    ShardMap,
    Sums,
    compute,
    in_this_process,
    light,
)

# Real features are only roughly Gaussian, and the full likelihood would outweigh the text. Chosen on handwriting fonts
# (docs/method.md).
LIKELIHOOD_WEIGHT = 0.5
LEAST_SHRINKAGE = 1e-6  # keeps a covariance invertible where images are fewer than dimensions
LEAST_COUNT = 1e-9  # images; a class with fewer of them has no mean of its own


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


@dataclass(frozen=True)
class Refined:
    """Result of EM.

    model: the classes among the unlabelled images.
    soft_counts: (C,) N_c, sums of z over the unlabelled images; they sum to N.
    prior_strength: n0, how many observations a generated class mean is worth; 0 without generated images.
    iterations: how many were made.
    converged: False where the maximum number of iterations ended EM.
    """

    model: Gaussians
    soft_counts: Tensor
    prior_strength: float
    iterations: int
    converged: bool


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
    """Fit the classes to unlabelled images by EM: a MAP estimate, with the generated images as prior (ours).

    E step, for image i with text probabilities p_i:

        z_i = softmax_c(log p_ic + a log N(f_i; m_c, S)),   a = likelihood_weight

    M step, with N_c = sum_i z_ic, x_c the mean of the features weighted by z, and u_c, S0 the prior's means and
    covariance, estimated from n generated images:

        d   = sum_c w_c (x_c - u_c) / sum_c w_c,   w_c = n0 N_c / (n0 + N_c)   the shift from generated to real images
        m_c = (n0 (u_c + d) + N_c x_c) / (n0 + N_c)                            u_c + d counts as n0 observations
        S   = (n S0 + sum_ic z_ic (f_i - m_c)(f_i - m_c)' + n0 sum_c e_c e_c') / (n + N + C),   e_c = m_c - u_c - d

    The text probabilities enter every E step (as in TransCLIP, arXiv 2406.01837). Classes are equally likely a priori,
    since estimated proportions would let large classes absorb small ones. n0 is estimated, see `_prior_strength`. The
    first E step uses the text alone, and the first M step only the shift d: errors of the text would otherwise move the
    mean of an absent class into a present one for good. Without a prior, n0 and n are 0, S is shrunk by
    `oas_shrinkage`, and a class without images keeps its mean: EM without diffusion.

    Args:
        features: (N, D) of unlabelled images, unit rows.
        text_probs: (N, C), rows sum to 1.
        prior: of the generated images, or None.
        likelihood_weight: a > 0.
        iterations: at most, at least 1.
        tolerance: EM ends when the class sums of the features move by less than this share of N in all.
        chunk: images at a time; memory beside the inputs is a few times chunk * (C + D) + (C + D) * D numbers.
    """
    return refine_shards(
        InMemory(features, text_probs),
        prior=prior,
        likelihood_weight=likelihood_weight,
        iterations=iterations,
        tolerance=tolerance,
        chunk=chunk,
    )


@torch.no_grad()
def refine_shards(
    images: Images,
    *,
    prior: Gaussians | None,
    likelihood_weight: float = LIKELIHOOD_WEIGHT,
    iterations: int = 100,
    tolerance: float = 1e-4,
    chunk: int = 4096,
    shard: int = SHARD,
    map_shards: ShardMap = in_this_process,
    keep: Keep = compute,
) -> Refined:
    """`refine` for images that need not be in memory, by workers that need not be on this machine.

    The M step is made here, from sums over the images. No bit of the result depends on the number of workers of
    `map_shards`, where they have the same kind of CPU.

    Args:
        images: N unlabelled images; on the prior's device.
        prior, likelihood_weight, iterations, tolerance, chunk: as in `refine`; chunk counts for each worker.
        shard: images; another size changes the last bits.
        map_shards: computes the sums of the shards; in this process by default.
        keep: of the sums of each step, see `Sums`; an interrupted EM goes on after the last one that was kept.

    Raises:
        RuntimeError: `map_shards` has left out a shard.
    """
    total, over = len(images), Sums(images, chunk, shard, map_shards, keep)
    moment = over.second_moment()
    model: Gaussians | None = None
    start = prior or Gaussians(*_spread(over.mean_feature(), moment, total, images.classes))
    steps, prior_strength, sums = 0, 0.0, start.mean.new_full(start.mean.shape, float("inf"))
    soft_counts, converged = start.mean.new_zeros(len(start.mean)), False
    for _ in range(iterations):
        head, former = model.head() if model else None, sums
        soft_counts, sums = over.expect(f"step-{steps + 1}", head, likelihood_weight)
        if prior is None:
            model = _maximise_without_prior(model or start, soft_counts, sums, moment, total)
        elif model is None:
            model = _shifted(prior, soft_counts, sums)
        else:
            model, prior_strength = _maximise(prior, model, soft_counts, sums, moment, total, prior_strength)
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
    """(N, C) z = softmax_c(log p_c + a log N(f; m_c, S)), the E step of `refine`, whose arguments these are.

    In the type of `text_probs`; rows sum to 1.
    """
    result = torch.empty_like(text_probs)
    weight, bias = model.head()
    step = EStep(InMemory(features, text_probs), (light(weight), light(bias)), likelihood_weight, chunk)
    for part, _, z in step.parts(range(len(features))):
        result[part.start : part.stop] = z.to(result)
    return result


def _spread(mean: Tensor, moment: Tensor, total: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Start of EM without a prior: every class at the mean of all images, with their covariance."""
    covariance = shrink(moment / total - torch.outer(mean, mean), total)
    return mean.expand(classes, -1), covariance, mean.new_zeros(classes)


def _scatter(mean: Tensor, soft_counts: Tensor, sums: Tensor, moment: Tensor) -> Tensor:
    """(D, D) sum_ic z_ic (f_i - m_c)(f_i - m_c)', from sums alone, since the z of an image sum to 1."""
    cross = mean.T @ sums
    return moment - cross - cross.T + (mean * soft_counts[:, None]).T @ mean


def _maximise_without_prior(
    former: Gaussians, soft_counts: Tensor, sums: Tensor, moment: Tensor, total: int
) -> Gaussians:
    """The M step without a prior."""
    mean = torch.where(soft_counts[:, None] > LEAST_COUNT, _means(sums, soft_counts), former.mean)
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
    """The M step with a prior: the classes, and n0. `prior_strength` is the former n0, or 0 at first.

    The MAP estimate under m_c ~ N(u_c + d, S / n0), S ~ inverse Wishart with S0 counted n times, and a flat prior of d.
    """
    observed = _means(sums, soft_counts)  # x_c
    images_per_class = float(prior.counts.mean())
    prior_strength = prior_strength or images_per_class
    for _ in range(2):  # d and n0 depend on each other
        shift = _shift(prior.mean, observed, soft_counts, prior_strength)
        difference = observed - prior.mean - shift
        prior_strength = _prior_strength(difference, soft_counts, former.covariance, largest=images_per_class)
    expected = prior.mean + _shift(prior.mean, observed, soft_counts, prior_strength)  # u_c + d
    mean = (prior_strength * expected + sums) / (prior_strength + soft_counts)[:, None]
    error = mean - expected  # e_c
    images = float(prior.counts.sum())
    scatter = images * prior.covariance + _scatter(mean, soft_counts, sums, moment) + prior_strength * error.T @ error
    return Gaussians(mean, scatter / (images + total + len(mean)), prior_strength + soft_counts), prior_strength


def _shifted(prior: Gaussians, soft_counts: Tensor, sums: Tensor) -> Gaussians:
    """The first M step: the prior with its means moved by d."""
    shift = _shift(prior.mean, _means(sums, soft_counts), soft_counts, float(prior.counts.mean()))
    return Gaussians(prior.mean + shift, prior.covariance, prior.counts)


def _means(sums: Tensor, soft_counts: Tensor) -> Tensor:
    """(C, D) x_c: the means of the features weighted by z."""
    return sums / soft_counts.clamp(min=LEAST_COUNT)[:, None]


def _shift(generated: Tensor, observed: Tensor, soft_counts: Tensor, prior_strength: float) -> Tensor:
    """(D,) d, the weighted mean of x_c - u_c: a class without images has no weight."""
    weight = prior_strength * soft_counts / (prior_strength + soft_counts)
    return weight @ (observed - generated) / weight.sum()


def _prior_strength(difference: Tensor, soft_counts: Tensor, covariance: Tensor, *, largest: float) -> float:
    """n0, how many observations a generated class mean is worth, by the method of moments; in [1, largest].

    Under the prior, e' S^-1 e / D of e = x_c - u_c - d (`difference`) has the expectation 1 / n0 + 1 / N_c. The median
    over the classes that have images is taken, so that a few absent classes have no influence. Where generated and real
    images differ much, n0 is small, and the generated images have little influence.
    """
    present = soft_counts >= 1
    if not present.any():
        return largest
    scaled = (difference * torch.linalg.solve(covariance, difference.T).T).sum(dim=1) / difference.shape[1]
    excess = float((scaled[present] - 1 / soft_counts[present]).median())
    return largest if excess <= 1 / largest else max(1 / excess, 1.0)
