"""Figures against loops and scikit-learn."""

from __future__ import annotations

import pytest
import torch

from air_plugin.functional.metrics import harmonic_mean, head_metrics, primary_metric, pseudo_label_metrics

NAMES = ["ant", "bee", "cat", "dog"]


def f1_reference(true: list[int], predicted: list[int]) -> float:
    """Mean F1 over the classes that occur among the true labels, in percent."""
    values = []
    for c in sorted(set(true)):
        hits = sum(t == p == c for t, p in zip(true, predicted, strict=True))
        denominator = true.count(c) + predicted.count(c)
        values.append(2 * hits / denominator)
    return 100 * sum(values) / len(values)


def test_head_metrics_equal_a_loop():
    rng = torch.Generator().manual_seed(0)
    scores, labels = torch.rand(50, 4, generator=rng), torch.randint(4, (50,), generator=rng)
    scores[torch.arange(50), labels] += 0.3
    true, predicted = labels.tolist(), scores.argmax(dim=1).tolist()
    metrics = head_metrics(scores, labels, NAMES)
    hits = [t == p for t, p in zip(true, predicted, strict=True)]
    assert metrics["accuracy"] == pytest.approx(100 * sum(hits) / 50)
    assert metrics["macro_f1"] == pytest.approx(f1_reference(true, predicted))
    for c, name in enumerate(NAMES):
        of_class = [hit for hit, t in zip(hits, true, strict=True) if t == c]
        assert metrics["per_class"][name] == pytest.approx(100 * sum(of_class) / len(of_class))


def test_classes_that_do_not_occur_are_left_out():
    scores = torch.eye(4)[[0, 0, 2, 3]]
    labels = torch.tensor([0, 0, 2, 2])
    metrics = head_metrics(scores, labels, NAMES)
    assert metrics["per_class"] == {"ant": 100.0, "cat": 50.0}
    assert metrics["accuracy"] == 75.0
    assert metrics["macro_f1"] == pytest.approx((100 + 100 * 2 / 3) / 2)


def groups_reference(true: list[int], predicted: list[int], seen: list[int]) -> list[float | None]:
    """Percent right of the images of seen and of unseen classes, counted one by one, and the harmonic mean."""
    right, total = {True: 0, False: 0}, {True: 0, False: 0}
    for t, p in zip(true, predicted, strict=True):
        total[t in seen] += 1
        right[t in seen] += t == p
    s, u = (100 * right[group] / total[group] if total[group] else None for group in (True, False))
    if s is None or u is None:
        return [s, u, None]
    return [s, u, 0.0 if s == u == 0 else 1 / ((1 / s + 1 / u) / 2) if s and u else 0.0]


@pytest.mark.parametrize("seen", [[2, 0], [3], [0, 1, 2]])
@pytest.mark.parametrize("bias", [0.3, -1.0])  # with -1 nothing is right
def test_seen_and_unseen_classes_equal_a_loop(seen: list[int], bias: float):
    rng = torch.Generator().manual_seed(1)
    scores, labels = torch.rand(50, 4, generator=rng), torch.randint(4, (50,), generator=rng)
    scores[torch.arange(50), labels] += bias
    metrics = head_metrics(scores, labels, NAMES, seen=seen)
    expected = groups_reference(labels.tolist(), scores.argmax(dim=1).tolist(), seen)
    assert [metrics[name] for name in ("seen", "unseen", "harmonic")] == pytest.approx(expected)
    assert (metrics["harmonic"] == 0) == (bias < 0)
    assert primary_metric(scores.argmax(dim=1), labels, seen=seen) == metrics["harmonic"]
    plain = head_metrics(scores, labels, NAMES)
    assert plain == {name: metrics[name] for name in ("accuracy", "macro_f1", "per_class")}
    assert primary_metric(scores.argmax(dim=1), labels) == pytest.approx(plain["accuracy"])


def test_a_group_without_images_has_no_accuracy_and_no_mean():
    metrics = head_metrics(torch.eye(4)[[0, 1, 1]], torch.tensor([0, 1, 0]), NAMES, seen=[0, 1])
    assert metrics["seen"] == pytest.approx(200 / 3) and metrics["unseen"] is metrics["harmonic"] is None
    assert head_metrics(torch.eye(4), None, NAMES, seen=[0]) == {"accuracy": None, "macro_f1": None, "per_class": {}}


def test_harmonic_means_of_arrays():
    found = harmonic_mean(torch.tensor([0.0, 0.0, 80.0]).numpy(), torch.tensor([0.0, 50.0, 20.0]).numpy())
    assert found.tolist() == [0.0, 0.0, 32.0]


def test_figures_are_plain_numbers():
    import json

    metrics = head_metrics(torch.eye(4), torch.arange(4), NAMES)
    assert json.loads(json.dumps(metrics)) == metrics
    assert metrics["accuracy"] == metrics["macro_f1"] == 100.0


def test_pseudo_label_metrics_by_hand():
    index = torch.tensor([1, 3, 4, 7])
    mask = torch.tensor([[1, 1, 0], [0, 1, 0], [0, 0, 1], [1, 0, 1]]).bool()
    top1 = torch.tensor([0, 1, 2, 2])
    labels = torch.tensor([9, 0, 9, 0, 2, 9, 9, 0])
    # The labels of the selected images are 0, 0, 2, 0; candidates hold the label in rows 0, 2, 3.
    assert pseudo_label_metrics(index, mask, top1, total=8, labels=labels) == {
        "selected": 4,
        "coverage": 50.0,
        "accuracy": 50.0,
        "candidates": 1.5,
        "candidate_recall": 75.0,
    }


def test_pseudo_label_metrics_without_labels_or_without_images():
    mask, top1 = torch.ones(2, 3, dtype=torch.bool), torch.tensor([0, 2])
    figures = pseudo_label_metrics(torch.tensor([0, 1]), mask, top1, total=4, labels=None)
    assert figures["accuracy"] is None and figures["candidate_recall"] is None and figures["candidates"] == 3.0
    none = torch.tensor([], dtype=torch.long)
    empty = pseudo_label_metrics(none, mask[:0], none, total=4, labels=torch.ones(4))
    assert empty["selected"] == 0 and empty["coverage"] == 0.0 and empty["accuracy"] is None


@pytest.mark.public_reports
def test_classes_of_one_name_keep_their_own_accuracies():
    """Item 11: the last one replaced the others. A name that looks numbered is nobody else's."""
    names = ["mitten", "cap", "cap", "cap (2)", "mitten"]
    labels = torch.tensor([0, 1, 1, 2, 3, 4])
    predicted = torch.tensor([4, 1, 0, 2, 3, 4])
    found = head_metrics(torch.eye(5)[predicted], labels, names)["per_class"]
    assert found == {"mitten": 0.0, "cap": 50.0, "cap (3)": 100.0, "cap (2)": 100.0, "mitten (2)": 100.0}
