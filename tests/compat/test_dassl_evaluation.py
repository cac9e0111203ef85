"""What evaluators print and return, and accuracy."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from dassl_small import CLASSNAMES, standin_only, tiny_cfg


def evaluate(cfg, labels, predictions, *, batch=2):
    """Let the configured evaluator judge predictions, in batches."""
    from dassl.evaluation import build_evaluator

    names = dict(enumerate(CLASSNAMES))
    evaluator = build_evaluator(cfg, lab2cname=names)
    scores = torch.nn.functional.one_hot(torch.tensor(predictions), len(names)).float()
    evaluator.reset()
    for first in range(0, len(labels), batch):
        evaluator.process(scores[first : first + batch], torch.tensor(labels[first : first + batch]))
    return evaluator.evaluate()


LABELS = [0, 0, 0, 0, 1, 1, 2]
PREDICTIONS = [0, 0, 0, 1, 1, 0, 1]


def test_printed_lines(tmp_path, capsys):
    evaluate(tiny_cfg("", tmp_path, TEST__PER_CLASS_RESULT=True), LABELS, PREDICTIONS)
    printed = capsys.readouterr().out
    assert printed.splitlines() == [
        "Loading evaluator: Classification",
        "=> result",
        "* total: 7",
        "* correct: 4",
        "* accuracy: 57.1%",
        "* error: 42.9%",
        "* macro_f1: 38.3%",
        "=> per-class result",
        "* class: 0 (red)\ttotal: 4\tcorrect: 3\tacc: 75.0%",
        "* class: 1 (green)\ttotal: 2\tcorrect: 1\tacc: 50.0%",
        "* class: 2 (blue)\ttotal: 1\tcorrect: 0\tacc: 0.0%",
        "* average: 41.7%",
    ]


def test_lines_are_found_by_peoples_scripts(tmp_path, capsys):
    evaluate(tiny_cfg("", tmp_path), LABELS, PREDICTIONS)
    printed = capsys.readouterr().out
    for key, value in (("accuracy", 57.1), ("error", 42.9), ("macro_f1", 38.3)):
        assert float(re.search(rf"\* {key}: ([\.\deE+-]+)%", printed).group(1)) == value


def test_results_by_name(tmp_path):
    results = evaluate(tiny_cfg("", tmp_path, TEST__PER_CLASS_RESULT=True), LABELS, PREDICTIONS)
    assert list(results) == ["accuracy", "error_rate", "macro_f1", "perclass_accuracy"]
    assert results["accuracy"] == pytest.approx(100 * 4 / 7)
    assert results["error_rate"] == pytest.approx(100 * 3 / 7)
    assert results["perclass_accuracy"] == pytest.approx((75 + 50 + 0) / 3)


@standin_only  # upstream's are numpy numbers, which safe loading of checkpoints refuses
def test_results_are_plain_floats(tmp_path):
    results = evaluate(tiny_cfg("", tmp_path, TEST__PER_CLASS_RESULT=True), LABELS, PREDICTIONS)
    assert {type(value) for value in results.values()} == {float}


def test_counts_have_thousands_separators(tmp_path, capsys):
    evaluate(tiny_cfg("", tmp_path), [0] * 1500, [0] * 1200 + [1] * 300, batch=1500)
    assert "* total: 1,500\n* correct: 1,200\n* accuracy: 80.0%" in capsys.readouterr().out


def test_macro_f1_and_confusion_matrix_are_scikit_learns(tmp_path, capsys):
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    cfg = tiny_cfg("", tmp_path, TEST__COMPUTE_CMAT=True)
    for classes in (2, 3):  # with 2, the class 2 is predicted but never true
        labels, predictions = rng.integers(classes, size=40).tolist(), rng.integers(3, size=40).tolist()
        results = evaluate(cfg, labels, predictions)
        f1 = metrics.f1_score(labels, predictions, average="macro", labels=np.unique(labels))
        assert results["macro_f1"] == pytest.approx(100 * f1)

        assert f"Confusion matrix is saved to {tmp_path / 'cmat.pt'}" in capsys.readouterr().out
        saved = torch.load(tmp_path / "cmat.pt", weights_only=False)
        expected = metrics.confusion_matrix(labels, predictions, normalize="true")
        np.testing.assert_allclose(np.asarray(saved), expected)


@standin_only
def test_the_confusion_matrix_can_be_loaded_safely(tmp_path):
    evaluate(tiny_cfg("", tmp_path / "new", TEST__COMPUTE_CMAT=True), LABELS, PREDICTIONS)
    assert torch.load(tmp_path / "new" / "cmat.pt", weights_only=True).shape == (3, 3)


def test_reset_forgets(tmp_path):
    from dassl.evaluation import Classification

    evaluator = Classification(tiny_cfg("", tmp_path))
    for predictions, accuracy in (([0, 0], 50.0), ([0, 1], 100.0)):
        evaluator.reset()
        evaluator.process(torch.eye(2)[predictions], torch.tensor([0, 1]))
        assert evaluator.evaluate()["accuracy"] == accuracy


@standin_only
def test_nothing_to_evaluate_is_an_error(tmp_path):
    from dassl.evaluation import Classification

    with pytest.raises(ValueError, match="nothing to evaluate"):
        Classification(tiny_cfg("", tmp_path)).evaluate()


def slow_accuracy(output, target, k):
    """By the definition, image by image."""
    hits = 0
    for scores, label in zip(output.tolist(), target.tolist(), strict=True):
        best = sorted(range(len(scores)), key=lambda index: -scores[index])[:k]
        hits += label in best
    return 100.0 * hits / len(target)


@standin_only  # upstream fails for k > 1
@pytest.mark.parametrize("topk", [(1,), (1, 3), (5, 2)])
def test_topk_accuracy(topk):
    from dassl.metrics import compute_accuracy

    generator = torch.Generator().manual_seed(0)
    output = torch.rand(20, 5, generator=generator)
    target = torch.randint(5, (20,), generator=generator)
    accuracies = compute_accuracy(output, target, topk=topk)
    assert [accuracy.shape for accuracy in accuracies] == [(1,)] * len(topk)
    expected = [slow_accuracy(output, target, k) for k in topk]
    assert [accuracy.item() for accuracy in accuracies] == pytest.approx(expected)


def test_accuracy_in_percent_as_clients_read_it():
    from dassl.metrics import compute_accuracy

    output = torch.tensor([[2.0, 1.0], [1.0, 2.0], [2.0, 1.0], [1.0, 2.0]])
    target = torch.tensor([0, 1, 1, 1])
    assert compute_accuracy(output, target)[0].item() == 75.0
    assert compute_accuracy((output, "features"), target)[0].item() == 75.0
