"""StatA against loops over images, classes and dimensions that are written from its formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from air_plugin.functional.anchors import data_driven_weight
from air_plugin.functional.stata import stata
from air_plugin.functional.transclip import transclip


def random_case(images: int = 21, classes: int = 4, width: int = 5, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Unit features, predictions and anchors."""
    rng = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=rng, dtype=torch.float64)
    label = torch.randint(classes, (images,), generator=rng)
    features = centres[label] + 0.6 * torch.randn(images, width, generator=rng, dtype=torch.float64)
    anchors = centres + 0.5 * torch.randn(classes, width, generator=rng, dtype=torch.float64)
    logits = torch.randn(images, classes, generator=rng, dtype=torch.float64)
    logits[torch.arange(images), label] += 1
    return normalize(features, dim=1), logits.softmax(dim=1), normalize(anchors, dim=1)


def assignment(features: Tensor, probs: Tensor, anchors: Tensor, **options: Any) -> Tensor:
    return stata(features, probs, anchors, **options)[0]


def stata_reference(
    features: Tensor, probs: Tensor, anchors: Tensor, *, alpha: float, anchor_weight: str, neighbours: int, rounds: int
) -> list[list[float]]:
    """The updates as the docstring has them, with the whole Gaussian and without any trick."""
    f, y, t = features.tolist(), probs.tolist(), anchors.tolist()
    images, classes, width = range(len(f)), range(len(t)), range(len(t[0]))
    edges: dict[tuple[int, int], float] = {}
    for i in images:
        cosines = sorted((sum(a * b for a, b in zip(f[i], f[j], strict=True)), j) for j in images if j != i)
        for cosine, j in cosines[-neighbours:]:
            for pair in ((i, j), (j, i)):
                edges[pair] = edges.get(pair, 0) + cosine
    anchored = [sum(y[i][c] * (f[i][d] - t[c][d]) ** 2 for i in images for c in classes) / len(f) for d in width]
    weight = [alpha] * len(t)
    if anchor_weight == "data":
        weight = [1 / math.sqrt(sum(y[i][c] for i in images) / len(f) * max(y[i][c] for i in images)) for c in classes]
    mean, variance, z = t, [anchored for _ in classes], y
    for _ in range(rounds):
        for _ in range(5):
            new = []
            for i in images:
                scores = []
                for c in classes:
                    density = sum(
                        -math.log(2 * math.pi * variance[c][d]) / 2 - (f[i][d] - mean[c][d]) ** 2 / variance[c][d] / 2
                        for d in width
                    )
                    near = sum(edges.get((i, j), 0) * z[j][c] for j in images)
                    scores.append(math.log(y[i][c]) + (density + 50 / (2 * neighbours) * near) / 50)
                exponentials = [math.exp(score - max(scores)) for score in scores]
                new.append([value / sum(exponentials) for value in exponentials])
            z = new
        mean, variance = list(mean), list(variance)
        for c in classes:
            members = [i for i in images if max(range(len(t)), key=lambda k: z[i][k]) == c]
            if anchor_weight == "data":
                entropies = [-sum(value * math.log(value) for value in z[i]) for i in members]
                count = sum(1 - entropy / math.log(len(t)) for entropy in entropies)
            else:
                count = len(members)
            b = count / (count + weight[c])
            soft = [sum(z[i][c] * f[i][d] for i in images) for d in width]
            norm = math.sqrt(sum(value**2 for value in soft))
            mixed = [b * soft[d] / norm + (1 - b) * t[c][d] for d in width]
            norm = math.sqrt(sum(value**2 for value in mixed))
            mean[c] = [value / norm for value in mixed]
            total = sum(z[i][c] for i in images)
            own = [sum(z[i][c] * (f[i][d] - mean[c][d]) ** 2 for i in images) / total for d in width]
            variance[c] = [b * own[d] + (1 - b) * (anchored[d] + (t[c][d] - mean[c][d]) ** 2) for d in width]
    return z


@pytest.mark.parametrize("anchor_weight", ["fixed", "data"])
@pytest.mark.parametrize(("alpha", "neighbours", "rounds"), [(1.0, 3, 3), (5.0, 1, 2), (0.2, 20, 4)])
def test_refined_predictions_equal_a_loop(anchor_weight: str, alpha: float, neighbours: int, rounds: int):
    options = {"alpha": alpha, "anchor_weight": anchor_weight, "neighbours": neighbours, "rounds": rounds}
    for seed in range(3):
        case = random_case(seed=seed)
        refined = assignment(*case, **options)
        assert torch.allclose(refined, torch.tensor(stata_reference(*case, **options)).double(), atol=1e-8)
        assert (refined - case[1]).abs().max() > 0.01  # else this compares the input with itself


def test_every_option_matters():
    case = random_case()
    plain = assignment(*case, rounds=2)
    for changed in ({"alpha": 9.0}, {"text_weight": 0.5}, {"neighbours": 1}, {"steps": 1}, {"anchor_weight": "data"}):
        assert (assignment(*case, **{"rounds": 2, **changed}) - plain).abs().max() > 1e-5


@pytest.mark.parametrize("chunk", [1, 10, 23])
def test_the_chunk_size_and_the_order_of_images_change_nothing(chunk: int):
    features, probs, anchors = random_case()
    order = torch.randperm(len(probs), generator=torch.Generator().manual_seed(1))
    plain = assignment(features, probs, anchors)
    assert torch.allclose(assignment(features, probs, anchors, chunk=chunk), plain)
    assert torch.allclose(assignment(features[order], probs[order], anchors), plain[order])


def test_a_class_without_images_stays_at_its_anchor_and_takes_none():
    """What it was made for: half of the classes are absent, and the text hesitates between them and those present."""
    rng = torch.Generator().manual_seed(4)
    centres = normalize(torch.randn(6, 24, generator=rng), dim=1)
    label = torch.arange(240) % 3
    features = normalize(centres[label] + 0.12 * torch.randn(240, 24, generator=rng), dim=1)
    logits = 1.2 * torch.randn(240, 6, generator=rng)
    logits[torch.arange(240), label] += 2
    probs = logits.softmax(dim=1)
    accuracies = [
        float((refined.argmax(dim=1) == label).double().mean())
        for refined in (probs, transclip(features, probs)[0], assignment(features, probs, centres))
    ]
    assert accuracies[0] < 0.7 and accuracies[2] > accuracies[0] + 0.15 and accuracies[2] >= accuracies[1]


def test_data_driven_weights_fall_with_the_evidence():
    predictions = torch.tensor([[0.9, 0.1], [0.8, 0.2]])
    weight = data_driven_weight(predictions.mean(dim=0), predictions.amax(dim=0))
    assert weight.tolist() == pytest.approx([1 / math.sqrt(0.85 * 0.9), 1 / math.sqrt(0.15 * 0.2)])


@pytest.mark.parametrize("anchor_weight", ["fixed", "data"])
def test_odd_input_gives_finite_rows_that_sum_to_one(anchor_weight: str):
    features, probs, anchors = random_case()
    for x, y, t in (
        (features[:1], probs[:1], anchors),  # one image
        (features, probs[:, :1] / probs[:, :1], anchors[:1]),  # one class
        (features, (probs == probs.amax(dim=1, keepdim=True)).double(), anchors),  # zeros among the predictions
        (anchors[:1].expand(7, -1), probs[:7], anchors),  # equal images, one of them at its anchor
    ):
        refined = assignment(x, y.float(), t, anchor_weight=anchor_weight)
        assert refined.dtype == torch.float32 and refined.isfinite().all()
        assert torch.allclose(refined.sum(dim=1), torch.ones(len(x)))


def test_new_images_are_classified_by_classes_of_unlike_variance():
    features, probs, anchors = random_case()
    new, predictions, _ = random_case(seed=7)
    _, mixture = stata(features, probs, anchors)
    for image, given, row in zip(new.tolist(), predictions.tolist(), mixture.predict(new, predictions), strict=True):
        scores = []
        for mean, variance, probability in zip(mixture.mean.tolist(), mixture.variance.tolist(), given, strict=True):
            density = sum(-(math.log(v) + (a - m) ** 2 / v) / 2 for a, m, v in zip(image, mean, variance, strict=True))
            scores.append(math.log(probability) + density / 50)
        assert row.tolist() == pytest.approx(torch.tensor(scores, dtype=torch.float64).softmax(0).tolist())
