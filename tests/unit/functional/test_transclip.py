"""TransCLIP against loops over images, classes and dimensions that are written from its formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from air_plugin.functional.graph import affinity_graph, nearest_neighbours
from air_plugin.functional.transclip import transclip


def random_case(images: int = 23, classes: int = 4, width: int = 5, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Unit features in clusters of unlike sizes, and predictions that know little of them."""
    rng = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=rng, dtype=torch.float64)
    label = torch.randint(classes, (images,), generator=rng)
    features = centres[label] + 0.6 * torch.randn(images, width, generator=rng, dtype=torch.float64)
    logits = torch.randn(images, classes, generator=rng, dtype=torch.float64)
    logits[torch.arange(images), label] += 1
    return normalize(features, dim=1), logits.softmax(dim=1)


def mixture(images: int = 300, classes: int = 4, width: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """Clear clusters, predictions of which about a third are wrong, and the truth."""
    rng = torch.Generator().manual_seed(4)
    centres = normalize(torch.randn(classes, width, generator=rng), dim=1)
    label = torch.arange(images) % classes
    features = normalize(centres[label] + 0.12 * torch.randn(images, width, generator=rng), dim=1)
    logits = 1.2 * torch.randn(images, classes, generator=rng)
    logits[torch.arange(images), label] += 2
    return features, logits.softmax(dim=1), label


def neighbours_reference(features: list[list[float]], k: int) -> list[list[tuple[int, float]]]:
    found = []
    for i, image in enumerate(features):
        cosines = [(sum(a * b for a, b in zip(image, other, strict=True)), j) for j, other in enumerate(features)]
        nearest = sorted((pair for pair in cosines if pair[1] != i), reverse=True)[:k]
        found.append([(j, cosine) for cosine, j in nearest])
    return found


def assignment(features: Tensor, probs: Tensor, **options: float) -> Tensor:
    return transclip(features, probs, **options)[0]


def edges_reference(features: list[list[float]], k: int) -> dict[tuple[int, int], float]:
    near = neighbours_reference(features, k)
    return {(i, j): weight for i, row in enumerate(near) for j, weight in row}


def unit(vector: list[float]) -> list[float]:
    norm = math.sqrt(sum(value * value for value in vector))
    return [value / norm for value in vector]


def transclip_reference(
    features: Tensor, probs: Tensor, *, text_weight: float, neighbours: int, seeds: int, rounds: int, steps: int
) -> list[list[float]]:
    """The updates as the docstring has them, with the whole Gaussian and without any trick."""
    f, y = features.tolist(), probs.tolist()
    images, classes, width = range(len(f)), range(len(y[0])), range(len(f[0]))
    edges = edges_reference(f, neighbours)
    means = []
    for c in classes:
        first = sorted(images, key=lambda i: (-y[i][c], i))[:seeds]
        means.append(unit([sum(y[i][c] * f[i][d] for i in first) for d in width]))
    variance = [1 / len(f[0]) for _ in width]
    z = y
    for _ in range(rounds):
        for _ in range(steps):
            new = []
            for i in images:
                scores = []
                for c in classes:
                    density = 0.0
                    for d in width:
                        density -= math.log(2 * math.pi * variance[d]) / 2
                        density -= (f[i][d] - means[c][d]) ** 2 / variance[d] / 2
                    near = sum((edges.get((i, j), 0) + edges.get((j, i), 0)) * z[j][c] for j in images)
                    density += 50 / (2 * max(1, neighbours)) * near
                    scores.append(text_weight * math.log(y[i][c]) + density / 50)
                exponentials = [math.exp(score - max(scores)) for score in scores]
                new.append([value / sum(exponentials) for value in exponentials])
            z = new
        for c in classes:
            means[c] = unit([sum(z[i][c] * f[i][d] for i in images) for d in width])
        variance = [
            sum(z[i][c] * (f[i][d] - means[c][d]) ** 2 for i in images for c in classes) / len(f) for d in width
        ]
    return z


@pytest.mark.parametrize("k", [0, 1, 3, 22, 99])
@pytest.mark.parametrize("chunk", [1, 7, 23, 64])
def test_neighbours_equal_a_loop(k: int, chunk: int):
    features, _ = random_case()
    index, affinity = nearest_neighbours(features, k, chunk=chunk)
    expected = neighbours_reference(features.tolist(), k)
    assert index.tolist() == [[j for j, _ in row] for row in expected]
    assert affinity.tolist() == [pytest.approx([w for _, w in row]) for row in expected]


def test_the_graph_has_both_directions():
    features, _ = random_case()
    edges = edges_reference(features.tolist(), 3)
    graph = affinity_graph(features, 3).to_dense()
    for i in range(len(features)):
        for j in range(len(features)):
            assert float(graph[i, j]) == pytest.approx(edges.get((i, j), 0) + edges.get((j, i), 0))


@pytest.mark.parametrize(
    "options",
    [
        {"text_weight": 1.0, "neighbours": 3, "seeds": 8, "rounds": 3, "steps": 5},
        {"text_weight": 0.3, "neighbours": 1, "seeds": 2, "rounds": 2, "steps": 1},
        {"text_weight": 2.0, "neighbours": 0, "seeds": 50, "rounds": 1, "steps": 2},
        {"text_weight": 1.0, "neighbours": 22, "seeds": 1, "rounds": 4, "steps": 3},
    ],
)
def test_refined_predictions_equal_a_loop(options: dict):
    for seed in range(3):
        features, probs = random_case(seed=seed)
        refined = assignment(features, probs, **options)
        expected = torch.tensor(transclip_reference(features, probs, **options), dtype=torch.float64)
        assert torch.allclose(refined, expected, atol=1e-8)
        assert (refined - probs).abs().max() > 0.01  # else this compares the input with itself


def test_every_option_matters():
    features, probs = random_case()
    plain = assignment(features, probs, rounds=2)
    for changed in ({"text_weight": 0.5}, {"neighbours": 1}, {"seeds": 2}, {"rounds": 1}, {"steps": 1}):
        assert (assignment(features, probs, **{"rounds": 2, **changed}) - plain).abs().max() > 1e-4


def test_rows_sum_to_one_in_the_type_of_the_predictions():
    features, probs, _ = mixture()
    refined = assignment(features, probs)
    assert refined.dtype == torch.float32 and refined.shape == probs.shape
    assert torch.allclose(refined.sum(dim=1), torch.ones(len(probs))) and (refined >= 0).all()


def test_permuting_classes_permutes_the_answer():
    (features, probs), order = random_case(), torch.tensor([2, 0, 3, 1])
    assert torch.allclose(assignment(features, probs[:, order]), assignment(features, probs)[:, order])


def test_permuting_images_permutes_the_answer():
    features, probs = random_case()
    order = torch.randperm(len(probs), generator=torch.Generator().manual_seed(1))
    assert torch.allclose(assignment(features[order], probs[order]), assignment(features, probs)[order])


def test_rotating_by_swapping_dimensions_changes_nothing():
    features, probs = random_case()
    assert torch.allclose(assignment(features[:, [3, 1, 4, 0, 2]], probs), assignment(features, probs))


@pytest.mark.parametrize("chunk", [1, 10, 23])
def test_the_chunk_size_changes_nothing(chunk: int):
    features, probs = random_case()
    assert torch.allclose(assignment(features, probs, chunk=chunk), assignment(features, probs))


def test_it_repairs_bad_predictions_where_the_clusters_are_clear():
    features, probs, label = mixture()
    before = (probs.argmax(dim=1) == label).double().mean()
    after = (assignment(features, probs).argmax(dim=1) == label).double().mean()
    assert before < 0.75 and after > before + 0.15


def test_a_strong_text_weight_keeps_the_predictions():
    features, probs, _ = mixture()
    assert torch.equal(assignment(features, probs, text_weight=1e6).argmax(dim=1), probs.argmax(dim=1))


@pytest.mark.parametrize("text_weight", [1.0, 20.0])  # with the larger one its soft_counts is 0 also in float64
def test_a_class_that_no_image_is_predicted_as_gets_nothing_and_harms_nothing(text_weight: float):
    features, probs, _ = mixture()
    unused = torch.cat([probs, torch.zeros(len(probs), 1)], dim=1)
    refined = assignment(features, unused, text_weight=text_weight)
    assert refined[:, -1].max() < 1e-6
    assert torch.allclose(refined[:, :-1], assignment(features, probs, text_weight=text_weight), atol=1e-6)


def test_without_the_text_a_probability_of_zero_does_no_harm():
    features, probs, _ = mixture()
    hard = torch.nn.functional.one_hot(probs.argmax(dim=1), 4).float()
    refined = assignment(features, hard, text_weight=0.0)
    assert torch.allclose(refined.sum(dim=1), torch.ones(len(probs)))


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_constant_dimensions_do_no_harm(value: float):
    features, probs = random_case()
    more = torch.cat([features, torch.full((len(features), 3), value, dtype=torch.float64)], dim=1)
    assert assignment(normalize(more, dim=1), probs, rounds=4).isfinite().all()


def test_equal_images_keep_what_the_predictions_say():
    features = normalize(torch.ones(6, 5), dim=1)
    probs = torch.tensor([[0.6, 0.4]]).expand(6, 2).contiguous()
    refined = assignment(features, probs)
    assert (refined[:, 0] >= 0.6).all() and refined.isfinite().all()
    alone = assignment(features[:1], probs[:1])  # no neighbours at all
    assert torch.allclose(alone, probs[:1])


def test_the_input_is_left_alone():
    features, probs = random_case()
    copies = features.clone(), probs.clone()
    assignment(features, probs)
    assert torch.equal(features, copies[0]) and torch.equal(probs, copies[1])


def test_new_images_are_classified_by_the_mixture_and_the_text():
    features, probs = random_case()
    new, predictions = random_case(seed=7)
    _, mixture = transclip(features, probs, text_weight=0.5, rounds=3)
    assert len({tuple(row) for row in mixture.variance.tolist()}) == 1  # shared by the classes
    for image, given, row in zip(new.tolist(), predictions.tolist(), mixture.predict(new, predictions), strict=True):
        scores = []
        for mean, variance, probability in zip(mixture.mean.tolist(), mixture.variance.tolist(), given, strict=True):
            squares = sum((a - m) ** 2 / v for a, m, v in zip(image, mean, variance, strict=True))
            scores.append(0.5 * math.log(probability) - squares / 100)
        assert row.tolist() == pytest.approx(torch.tensor(scores, dtype=torch.float64).softmax(0).tolist())


def test_the_mixture_is_that_of_the_last_assignment():
    features, probs = random_case()
    refined, mixture = transclip(features, probs)
    means = torch.stack([normalize((refined[:, c, None] * features).sum(dim=0), dim=0) for c in range(4)])
    assert torch.allclose(mixture.mean, means)
    distance = (features[:, None] - means).square()  # (N, C, D)
    assert torch.allclose(mixture.variance[0], (refined[..., None] * distance).sum(dim=(0, 1)) / len(features))
