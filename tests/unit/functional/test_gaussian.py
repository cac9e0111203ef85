"""Gaussian classes: the fit, EM as a MAP estimate, and what must not happen where classes are absent."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from air_plugin.functional.em import PriorStrength, posterior, refine
from air_plugin.functional.gaussian import Gaussians, fit_gaussians, oas_shrinkage, shrink

C, D = 4, 6


def classes_apart(*, count: int = 60, seed: int = 0, size: int = D, apart: float = 4.0) -> tuple[Tensor, Tensor]:
    """(C * count, size) features of C well separated classes with a correlated spread, and their classes."""
    rng = torch.Generator().manual_seed(seed)
    centre = apart * torch.eye(C, size, dtype=torch.float64)
    mix = torch.randn(size, size, generator=torch.Generator().manual_seed(99), dtype=torch.float64) / math.sqrt(size)
    labels = torch.arange(C).repeat_interleave(count)
    return centre[labels] + torch.randn(len(labels), size, generator=rng, dtype=torch.float64) @ mix, labels


def unsure(labels: Tensor, *, right: float = 0.6, seed: int = 5) -> Tensor:
    """(N, C) text probabilities: `right` of the images get 0.7 on their class, the others on some class."""
    rng = torch.Generator().manual_seed(seed)
    other = torch.randint(C, (len(labels),), generator=rng)
    guess = torch.where(torch.rand(len(labels), generator=rng) < right, labels, other)
    return 0.1 + 0.6 * torch.nn.functional.one_hot(guess, C).double()


def generated(*, shift: float = 1.0, seed: int = 7) -> Gaussians:
    """A prior: the same classes, all of them moved by `shift` in every direction."""
    features, labels = classes_apart(seed=seed)
    return fit_gaussians(features + shift, labels, classes=C)


# The fit


def test_the_fit_is_that_of_a_loop_over_images():
    features, labels = classes_apart(count=5)
    features, labels = features[:-3], labels[:-3]  # of unequal numbers
    made = fit_gaussians(features, labels, classes=C)
    scatter = np.zeros((D, D))
    for c in range(C):
        own = [f.numpy() for f, label in zip(features, labels.tolist(), strict=True) if label == c]
        mean = sum(own) / len(own)
        assert np.allclose(made.mean[c], mean) and made.counts[c] == len(own)
        for f in own:
            scatter += np.outer(f - mean, f - mean)
    expected = shrink(torch.tensor(scatter / (len(features) - C)), len(features) - C)
    assert torch.allclose(made.covariance, expected)


@pytest.mark.parametrize(("count", "size"), [(20, 6), (8, 30), (2, 3), (400, 5)])
def test_the_shrinkage_is_scikit_learns(count: int, size: int):
    from sklearn.covariance import oas

    rng = torch.Generator().manual_seed(count)
    data = torch.randn(count, size, generator=rng, dtype=torch.float64) * torch.linspace(0.1, 3, size)
    covariance, shrinkage = oas(data.numpy(), assume_centered=True)
    own = data.T @ data / count
    assert oas_shrinkage(own, count) == pytest.approx(shrinkage)
    assert torch.allclose(shrink(own, count), torch.from_numpy(covariance))


def test_more_dimensions_than_images_stay_invertible():
    features, labels = classes_apart(count=3, size=50)
    made = fit_gaussians(features.float(), labels, classes=C)
    weight, bias = made.head()
    assert torch.linalg.eigvalsh(made.covariance).min() > 0
    assert weight.isfinite().all() and bias.isfinite().all()
    assert torch.equal((features @ weight.T + bias).argmax(dim=1), labels)


@pytest.mark.parametrize("images", [torch.eye(C, D), torch.ones(C, D)])
def test_one_image_a_class_makes_a_classifier(images: Tensor):
    made = fit_gaussians(images, torch.arange(C), classes=C)
    assert torch.linalg.eigvalsh(made.covariance).min() > 0 and torch.equal(made.mean, images.double())


def test_a_class_without_images_is_refused():
    with pytest.raises(ValueError, match="class 2 has no image"):
        fit_gaussians(torch.randn(3, D), torch.tensor([0, 1, 3]), classes=C)


def test_the_head_has_the_gaussians_probabilities():
    features, labels = classes_apart(count=10)
    made = fit_gaussians(features, labels, classes=C)
    density = torch.stack(
        [torch.distributions.MultivariateNormal(mean, made.covariance).log_prob(features) for mean in made.mean], dim=1
    )
    weight, bias = made.head()
    assert torch.allclose((features @ weight.T + bias).softmax(dim=1), density.softmax(dim=1))


def test_the_bias_corrected_head_gives_every_class_the_same_likelihood_in_the_mean():
    """Means known from few images lie off the true ones; the correction is what that costs, in expectation."""
    rng = torch.Generator().manual_seed(0)
    counts = torch.tensor([2.0, 50.0], dtype=torch.float64)
    costs = []
    for _ in range(4000):
        error = torch.randn(2, D, generator=rng, dtype=torch.float64) / counts.sqrt()[:, None]
        costs.append(error.square().sum(dim=1) / 2)  # -log N(true mean) above its best, S = 1
    made = Gaussians(torch.zeros(2, D, dtype=torch.float64), torch.eye(D, dtype=torch.float64), counts)
    _, bias = made.bias_corrected_head()
    cost = torch.stack(costs).mean(dim=0)
    assert float(bias[0] - bias[1]) == pytest.approx(float(cost[0] - cost[1]), rel=0.05)


# EM


def slow_refine(
    features: Tensor, probs: Tensor, prior: Gaussians, *, a: float, steps: int, data: bool = False
) -> tuple[Tensor, Tensor, list[float]]:
    """`refine` with a prior, one image, class and sum at a time: means, covariance and the n0 of the classes."""
    x, p = features.numpy(), probs.numpy()
    pseudo = [1 / np.sqrt(np.mean([row[c] for row in p]) * max(row[c] for row in p)) for c in range(C)]
    u, s0, n = prior.mean.numpy(), prior.covariance.numpy(), float(prior.counts.sum())
    most, m, s = float(prior.counts.mean()), None, s0
    n0 = pseudo if data else [most] * C
    for step in range(steps):
        z = np.zeros((len(x), C))
        for i in range(len(x)):
            score = np.log(p[i])
            if m is not None:
                for c in range(C):
                    score[c] -= a * (x[i] - m[c]) @ np.linalg.solve(s, x[i] - m[c]) / 2
            score = np.exp(score - score.max())
            z[i] = score / score.sum()
        soft_counts = [sum(z[i, c] for i in range(len(x))) for c in range(C)]
        own = [sum(z[i, c] * x[i] for i in range(len(x))) / soft_counts[c] for c in range(C)]
        counts = soft_counts
        if data:
            counts = [0.0] * C
            for row in z:
                counts[int(row.argmax())] += 1 + sum(one * np.log(one) for one in row) / np.log(C)

        def shift(n0: list[float], counts=counts, own=own):
            w = [n0[c] * counts[c] / (n0[c] + counts[c]) for c in range(C)]
            return sum(w[c] * (own[c] - u[c]) for c in range(C)) / sum(w)

        if step == 0:
            m = [u[c] + shift(n0) for c in range(C)]
            continue
        for _ in range(0 if data else 2):
            d = shift(n0)
            excess = [
                (own[c] - u[c] - d) @ np.linalg.solve(s, own[c] - u[c] - d) / D - 1 / soft_counts[c]
                for c in range(C)
                if soft_counts[c] >= 1
            ]
            excess = sorted(excess)[(len(excess) - 1) // 2]
            n0 = [most if excess <= 1 / most else max(1 / excess, 1.0)] * C
        d = shift(n0)
        m = [(n0[c] * (u[c] + d) + counts[c] * own[c]) / (n0[c] + counts[c]) for c in range(C)]
        total = n * s0
        for c in range(C):
            total = total + n0[c] * np.outer(m[c] - u[c] - d, m[c] - u[c] - d)
            for i in range(len(x)):
                total = total + z[i, c] * np.outer(x[i] - m[c], x[i] - m[c])
        s = total / (n + len(x) + C)
    return torch.tensor(np.stack(m)), torch.tensor(s), n0


@pytest.mark.parametrize("prior_strength", ["moments", "data"])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_em_is_that_of_loops(chunk: int, prior_strength: PriorStrength):
    features, labels = classes_apart(count=6, seed=1)
    probs, prior = unsure(labels), generated()
    how = {"prior_strength": prior_strength, "likelihood_weight": 0.7, "iterations": 3, "tolerance": 0, "chunk": chunk}
    made = refine(features, probs, prior=prior, **how)
    mean, covariance, n0 = slow_refine(features, probs, prior, a=0.7, steps=3, data=prior_strength == "data")
    assert torch.allclose(made.model.mean, mean) and torch.allclose(made.model.covariance, covariance)
    assert made.prior_strength == pytest.approx(np.mean(n0)) and made.iterations == 3 and not made.converged
    assert float(made.soft_counts.sum()) == pytest.approx(len(features))
    expected = made.soft_counts + made.prior_strength
    assert torch.allclose(made.model.counts, expected) is (prior_strength == "moments")


def test_a_class_that_text_hardly_names_keeps_its_generated_mean_with_strengths_of_the_data():
    features, labels = classes_apart(count=40, seed=3)
    probs = unsure(labels)
    probs[:, 0] *= 1e-3
    probs /= probs.sum(dim=1, keepdim=True)
    kept = [refine(features, probs, prior=generated(), prior_strength=how) for how in ("moments", "data")]
    weight = [float(1 - one.soft_counts[0] / one.model.counts[0]) for one in kept]
    assert weight[1] > weight[0]


def test_the_mean_step_is_the_maximum_of_the_posterior():
    """No small change of a class mean raises the log posterior that the docstring states."""
    features, labels = classes_apart(count=6, seed=1)
    prior = generated()
    made = refine(features, unsure(labels), prior=prior, iterations=200, tolerance=1e-12)
    z = posterior(made.model, features, unsure(labels))
    own = z.T @ features / made.soft_counts[:, None]
    w = made.prior_strength * made.soft_counts / (made.prior_strength + made.soft_counts)
    shift = w @ (own - prior.mean) / w.sum()

    def value(mean: Tensor, shift: Tensor) -> float:
        inverse = made.model.covariance.inverse()
        apart = features[:, None] - mean
        data = (z * torch.einsum("ncd,de,nce->nc", apart, inverse, apart)).sum()
        off = mean - prior.mean - shift
        return -float(data + made.prior_strength * torch.einsum("cd,de,ce->", off, inverse, off)) / 2

    best = value(made.model.mean, shift)
    rng = torch.Generator().manual_seed(3)
    for _ in range(20):
        step = 1e-3 * torch.randn(C + 1, D, generator=rng, dtype=torch.float64)
        assert value(made.model.mean + step[:C], shift + step[C]) < best


def test_em_finds_the_classes_that_text_half_knows():
    features, labels = classes_apart(seed=2)
    probs = unsure(labels, right=0.5)
    for prior in (generated(), None):
        made = refine(features, probs, prior=prior)
        found = posterior(made.model, features, probs)
        assert (found.argmax(dim=1) == labels).double().mean() > 0.98 > (probs.argmax(dim=1) == labels).double().mean()
        assert made.converged and torch.allclose(found.sum(dim=1), torch.ones(len(found), dtype=torch.float64))


def test_absent_classes_stay_where_they_were_drawn_moved_as_the_others():
    features, labels = classes_apart(seed=2, count=200)
    here = labels < 3
    probs = unsure(labels, right=0.8)
    made = refine(features[here], probs[here], prior=generated(shift=1.0))
    truth = torch.stack([features[labels == c].mean(dim=0) for c in range(C)])
    assert torch.allclose(made.model.mean[3], truth[3], atol=0.5)  # the prior's are off by 1 in every direction
    alone = refine(features[here], probs[here], prior=None)
    assert not torch.allclose(alone.model.mean[3], truth[3], atol=0.5)
    weight, bias = made.model.bias_corrected_head()
    assert ((features @ weight.T + bias).argmax(dim=1) == labels).double().mean() > 0.97


def test_a_class_ten_times_rarer_is_not_swallowed():
    features, labels = classes_apart(seed=4, count=200, apart=2.0)
    kept = (labels % 2 == 0) | (torch.arange(len(labels)) % 10 == 0)
    probs = unsure(labels, right=0.7)

    def recall(prior: Gaussians | None) -> Tensor:
        weight, bias = refine(features[kept], probs[kept], prior=prior).model.bias_corrected_head()
        right = (features @ weight.T + bias).argmax(dim=1) == labels
        return torch.stack([right[labels == c].double().mean() for c in range(C)])

    rarer = fit_gaussians(*classes_apart(seed=8, apart=2.0), classes=C)
    assert recall(rarer).min() > 0.8


def test_a_class_that_nobody_sees_does_no_harm():
    """Its text probability is 0 for every image, exactly."""
    features, labels = classes_apart(count=20)
    probs = unsure(labels)
    probs[:, 3] = 0
    probs = probs / probs.sum(dim=1, keepdim=True)
    for prior in (generated(), None):
        made = refine(features[labels < 3], probs[labels < 3], prior=prior)
        assert made.model.mean.isfinite().all() and made.model.covariance.isfinite().all()
        weight, bias = made.model.bias_corrected_head()
        assert weight.isfinite().all() and bias.isfinite().all()
        assert ((features @ weight.T + bias)[labels < 3].argmax(dim=1) == labels[labels < 3]).double().mean() > 0.95


def test_drawn_means_that_lie_elsewhere_are_worth_less():
    features, labels = classes_apart(seed=2)
    probs, near = unsure(labels, right=0.8), generated()
    noise = torch.randn(C, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    far = Gaussians(near.mean + noise, near.covariance, near.counts)
    good, bad = (refine(features, probs, prior=prior).prior_strength for prior in (near, far))
    assert good > 10 * bad >= 1


def test_other_orders_of_classes_and_images_change_nothing_but_the_order():
    features, labels = classes_apart(count=30, seed=3)
    probs, prior = unsure(labels), generated()
    order = torch.tensor([2, 0, 3, 1])
    images = torch.randperm(len(features), generator=torch.Generator().manual_seed(1))
    turned = Gaussians(prior.mean[order], prior.covariance, prior.counts[order])
    for one, two in ((prior, turned), (None, None)):
        plain = refine(features, probs, prior=one)
        other = refine(features[images], probs[images][:, order], prior=two)
        assert torch.allclose(other.model.mean, plain.model.mean[order], atol=1e-6)
        assert torch.allclose(other.model.covariance, plain.model.covariance, atol=1e-6)


def test_the_same_call_gives_the_same_bits_and_leaves_its_inputs_alone():
    features, labels = classes_apart()
    features, probs, prior = features.float(), unsure(labels).float(), generated()
    before = features.clone(), probs.clone()
    one, two = (refine(features, probs, prior=prior) for _ in range(2))
    assert torch.equal(one.model.mean, two.model.mean) and one.model.mean.dtype == torch.float64
    assert torch.equal(features, before[0]) and torch.equal(probs, before[1])
    assert posterior(one.model, features, probs).dtype == torch.float32


def test_a_constant_dimension_and_equal_images_are_survived():
    features = torch.ones(12, D)
    probs = torch.full((12, C), 1 / C)
    for prior in (generated(), None):
        model = refine(features, probs, prior=prior).model
        weight, bias = model.bias_corrected_head()
        assert weight.isfinite().all() and bias.isfinite().all()
