"""ZLaP against a dense solution of its equation, made by loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from air_plugin.functional.zlap import propagate


def random_case(images: int = 19, classes: int = 4, width: int = 6, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Unit features and anchors, near enough that most cosines are above 0."""
    rng = torch.Generator().manual_seed(seed)
    features = 0.6 + torch.randn(images, width, generator=rng, dtype=torch.float64)
    anchors = 0.6 + torch.randn(classes, width, generator=rng, dtype=torch.float64)
    return normalize(features, dim=1), normalize(anchors, dim=1)


def nearest(image: list[float], others: list[list[float]], k: int) -> list[tuple[int, float]]:
    cosines = [(sum(a * b for a, b in zip(image, other, strict=True)), j) for j, other in enumerate(others)]
    return [(j, max(0.0, cosine)) for cosine, j in sorted(cosines, reverse=True)[:k]]


def zlap_reference(
    features: Tensor, anchors: Tensor, labels: list[int], *, neighbours: int, power: float, alpha: float
) -> Tensor:
    """(A + N, C) F: the whole matrix I - alpha W, inverted."""
    f, t = features.tolist(), anchors.tolist()
    total = len(t) + len(f)
    w = [[0.0] * total for _ in range(total)]
    for i, image in enumerate(f):
        for j, cosine in nearest(image, f, neighbours):
            if j != i:
                w[len(t) + i][len(t) + j] += cosine
                w[len(t) + j][len(t) + i] += cosine
        for a, cosine in nearest(image, t, neighbours):
            w[len(t) + i][a] += cosine**power
            w[a][len(t) + i] += cosine**power
    degree = [sum(row) for row in w]
    matrix = torch.eye(total, dtype=torch.float64)
    for i in range(total):
        for j in range(total):
            if w[i][j]:
                matrix[i, j] -= alpha * w[i][j] / math.sqrt(degree[i] * degree[j])
    start = torch.zeros(total, max(labels) + 1, dtype=torch.float64)
    for a, label in enumerate(labels):
        start[a, label] = 1
    return torch.linalg.inv(matrix) @ start


@pytest.mark.parametrize(
    "options",
    [
        {"neighbours": 5, "power": 5.0, "alpha": 0.3},
        {"neighbours": 1, "power": 1.0, "alpha": 0.9},
        {"neighbours": 99, "power": 3.0, "alpha": 0.7},
    ],
)
@pytest.mark.parametrize("labels", [None, [0, 1, 1, 0]])
def test_scores_equal_the_dense_solution(options: dict, labels: list[int] | None):
    for seed in range(3):
        features, anchors = random_case(seed=seed)
        found = propagate(features, anchors, None if labels is None else torch.tensor(labels), **options)
        expected = zlap_reference(features, anchors, labels or [0, 1, 2, 3], **options)
        assert torch.allclose(found.scores, expected, atol=1e-6)
        of_images = expected[len(anchors) :]
        reached = of_images.sum(dim=1) > 1e-3
        rows = of_images[reached] / of_images[reached].sum(dim=1, keepdim=True)
        assert torch.allclose(found.probs[reached], rows, atol=1e-3) and reached.any()


def test_a_new_image_is_classified_from_its_neighbours():
    features, anchors = random_case()
    new, _ = random_case(7, seed=9)
    found = propagate(features, anchors, neighbours=3, power=2.0)
    for image, row in zip(new.tolist(), found.predict(new, chunk=2), strict=True):
        score = torch.zeros(4, dtype=torch.float64)
        for j, cosine in nearest(image, features.tolist(), 3):
            score += cosine * found.scores[len(anchors) + j]
        for a, cosine in nearest(image, anchors.tolist(), 3):
            score += cosine**2 * found.scores[a]
        assert torch.allclose(row, score / score.sum())


def test_every_option_matters():
    features, anchors = random_case()
    plain = propagate(features, anchors).probs
    for changed in ({"neighbours": 2}, {"power": 1.0}, {"alpha": 0.9}):
        assert (propagate(features, anchors, **changed).probs - plain).abs().max() > 1e-3


@pytest.mark.parametrize("chunk", [1, 10, 19])
def test_the_chunk_size_changes_nothing(chunk: int):
    features, anchors = random_case()
    assert torch.allclose(propagate(features, anchors, chunk=chunk).scores, propagate(features, anchors).scores)


def test_labels_spread_along_clusters():
    """Anchors that see only the edge of a cluster: the images behind it are reached through their neighbours."""
    rng = torch.Generator().manual_seed(2)
    angle = torch.cat([torch.linspace(0.0, 1.2, 60), torch.linspace(1.5, 2.7, 60)])
    features = torch.stack([angle.cos(), angle.sin()], dim=1) + 0.01 * torch.randn(120, 2, generator=rng)
    anchors = torch.tensor([[math.cos(angle), math.sin(angle)] for angle in (-0.2, 1.5)])
    label = (torch.arange(120) >= 60).long()
    features = normalize(features, dim=1)
    nearest_anchor = (features @ anchors.T).argmax(dim=1)
    spread = propagate(features, anchors, alpha=0.99, power=300.0).probs.argmax(dim=1)
    before, after = (float((found == label).double().mean()) for found in (nearest_anchor, spread))
    assert before < 0.8 and after > 0.95


def test_an_image_without_any_similar_one_is_undecided():
    anchors = torch.eye(3)[:2]
    features = torch.stack([-torch.ones(3), torch.tensor([1.0, 0.2, 0.0])])
    probs = propagate(normalize(features, dim=1), anchors).probs
    assert probs[0].tolist() == [0.5, 0.5] and probs[1, 0] > probs[1, 1]
