"""EM: the classes as Gaussians, fitted to the unlabelled images with the generated ones as their prior.

All statistics are float64; images are processed in chunks, and sums over them are added up over shards (`shards`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from air_plugin.functional.anchors import data_driven_weight
from air_plugin.functional.gaussian import Gaussians, shrink
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
LEAST_COUNT = 1e-9  # images; a class with fewer of them has no mean of its own
PriorStrength = Literal["moments", "data"]


@dataclass(frozen=True)
class Refined:
    """Result of EM.

    model: the classes among the unlabelled images.
    soft_counts: (C,) N_c, sums of z over the unlabelled images; they sum to N.
    prior_strength: n0, how many observations a generated class mean is worth, the mean over the classes; 0 without
        generated images.
    iterations: how many were made.
    converged: False where the maximum number of iterations ended EM.
    """

    model: Gaussians
    soft_counts: Tensor
    prior_strength: float
    iterations: int
    converged: bool


@torch.no_grad()
def refine(
    features: Tensor,
    text_probs: Tensor,
    *,
    prior: Gaussians | None,
    prior_strength: PriorStrength = "moments",
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
    since estimated proportions would let large classes absorb small ones. n0 is estimated, see `_prior_strength`; with
    `prior_strength` "data" every class has its own, `anchors.data_driven_weight` of the text probabilities, and N_c is
    `anchors.certain_counts` in d and m_c. The first E step uses the text alone, and the first M step only the shift d:
    errors of the text would otherwise move the mean of an absent class into a present one for good. Without a prior, n0
    and n are 0, S is shrunk by `oas_shrinkage`, and a class without images keeps its mean: EM without diffusion.

    Args:
        features: (N, D) of unlabelled images, unit rows.
        text_probs: (N, C), rows sum to 1.
        prior: of the generated images, or None.
        prior_strength: moments (one n0 for all classes) or data.
        likelihood_weight: a > 0.
        iterations: at most, at least 1.
        tolerance: EM ends when the class sums of the features move by less than this share of N in all.
        chunk: images at a time; memory beside the inputs is a few times chunk * (C + D) + (C + D) * D numbers.
    """
    return refine_shards(
        InMemory(features, text_probs),
        prior=prior,
        prior_strength=prior_strength,
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
    prior_strength: PriorStrength = "moments",
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
        prior, prior_strength, likelihood_weight, iterations, tolerance: as in `refine`.
        chunk: as in `refine`, of each worker.
        shard: images; another size changes the last bits.
        map_shards: computes the sums of the shards; in this process by default.
        keep: of the sums of each step, see `Sums`; an interrupted EM goes on after the last one that was kept.

    Raises:
        RuntimeError: `map_shards` has left out a shard.
    """
    total, over, data = len(images), Sums(images, chunk, shard, map_shards, keep), prior_strength == "data"
    moment = over.second_moment()
    model: Gaussians | None = None
    start = prior or Gaussians(*_spread(over.mean_feature(), moment, total, images.classes))
    steps, sums = 0, start.mean.new_full(start.mean.shape, float("inf"))
    strength = torch.zeros_like(start.counts)
    soft_counts, converged = start.mean.new_zeros(len(start.mean)), False
    for _ in range(iterations):
        head, former = model.head() if model else None, sums
        soft_counts, sums, *certain = over.expect(f"step-{steps + 1}", head, likelihood_weight, certain=data)
        seen = _Seen(soft_counts, sums, certain[0] if data else soft_counts)
        if prior is None:
            model = _maximise_without_prior(model or start, seen, moment, total)
        elif model is None:
            images_per_class = torch.full_like(strength, float(prior.counts.mean()))
            strength = data_driven_weight(soft_counts / total, over.largest_text_probs()) if data else images_per_class
            model = _shifted(prior, seen, strength)
        else:
            strength = strength if data else _estimated_strength(prior, model, seen, strength)
            model = _maximise(prior, seen, strength, moment, total)
        steps += 1
        converged = bool((sums - former).norm(dim=1).sum() < tolerance * total)
        if converged:
            break
    assert model is not None
    return Refined(model, soft_counts, float(strength.mean()) if data else float(strength[0]), steps, converged)


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


@dataclass(frozen=True)
class _Seen:
    """What an E step has seen of the classes.

    soft_counts: (C,) N_c.
    sums: (C, D), of the features weighted by z.
    counts: (C,), how many observations x_c counts as: N_c, or less.
    """

    soft_counts: Tensor
    sums: Tensor
    counts: Tensor

    @property
    def means(self) -> Tensor:
        """(C, D) x_c: the means of the features weighted by z."""
        return self.sums / self.soft_counts.clamp(min=LEAST_COUNT)[:, None]

    @property
    def counted_sums(self) -> Tensor:
        """(C, D) x_c times its count; the very bits of `sums` where all of N_c counts."""
        return self.sums * (self.counts / self.soft_counts).nan_to_num(0.0)[:, None]

    def scatter(self, mean: Tensor, moment: Tensor) -> Tensor:
        """(D, D) sum_ic z_ic (f_i - m_c)(f_i - m_c)', from sums alone, since the z of an image sum to 1."""
        cross = mean.T @ self.sums
        return moment - cross - cross.T + (mean * self.soft_counts[:, None]).T @ mean

    def shift(self, generated: Tensor, strength: Tensor | float) -> Tensor:
        """(D,) d, the weighted mean of x_c - u_c: a class without images has no weight."""
        weight = strength * self.counts / (strength + self.counts)
        return weight @ (self.means - generated) / weight.sum().clamp(min=LEAST_COUNT)


def _maximise_without_prior(former: Gaussians, seen: _Seen, moment: Tensor, total: int) -> Gaussians:
    """The M step without a prior."""
    mean = torch.where(seen.soft_counts[:, None] > LEAST_COUNT, seen.means, former.mean)
    covariance = shrink(seen.scatter(mean, moment) / total, total)
    return Gaussians(mean, covariance, seen.soft_counts.clamp(min=1))


def _shifted(prior: Gaussians, seen: _Seen, strength: Tensor) -> Gaussians:
    """The first M step: the prior with its means moved by d."""
    return Gaussians(prior.mean + seen.shift(prior.mean, strength), prior.covariance, prior.counts)


def _maximise(prior: Gaussians, seen: _Seen, strength: Tensor, moment: Tensor, total: int) -> Gaussians:
    """The M step with a prior whose class means count as (C,) `strength` observations, n0.

    The MAP estimate under m_c ~ N(u_c + d, S / n0), S ~ inverse Wishart with S0 counted n times, and a flat prior of d.
    """
    expected = prior.mean + seen.shift(prior.mean, strength)  # u_c + d
    counts = strength + seen.counts
    mean = (strength[:, None] * expected + seen.counted_sums) / counts[:, None]
    error = mean - expected  # e_c
    images = float(prior.counts.sum())
    scatter = images * prior.covariance + seen.scatter(mean, moment) + (strength * error.T) @ error
    return Gaussians(mean, scatter / (images + total + len(mean)), counts)


def _estimated_strength(prior: Gaussians, former: Gaussians, seen: _Seen, strength: Tensor) -> Tensor:
    """(C,) n0, the same for all classes, from the former one: d and n0 depend on each other."""
    estimate, largest = float(strength[0]), float(prior.counts.mean())
    for _ in range(2):
        difference = seen.means - prior.mean - seen.shift(prior.mean, estimate)
        estimate = _prior_strength(difference, seen.soft_counts, former.covariance, largest=largest)
    return torch.full_like(strength, estimate)


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
