"""What runs with seen and unseen classes leave: the harmonic mean in result.json, log.txt and the curve of lambda."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import arguments

import train

SEEN = [4, 2, 9, 3, 0, 5]  # of ten classes with seed 500


def groups(run: Path, head: str) -> list[float]:
    """s, u and H, counted image by image."""
    made = json.loads((run / "predictions.json").read_text())
    assert made["seen"] == SEEN
    right, total = {True: 0, False: 0}, {True: 0, False: 0}
    for label, predicted in zip(made["labels"], made["heads"][head]["predicted"], strict=True):
        total[label in SEEN] += 1
        right[label in SEEN] += label == predicted
    s, u = (100 * right[group] / total[group] for group in (True, False))
    return [s, u, 2 * s * u / (s + u) if s + u else 0.0]


def test_every_head_has_them_and_lambda_is_measured_by_them(finished: Callable[..., Path]):
    run = finished("ZeroshotAiR", "AIR.PROTOTYPES", "real", "DATASET.PARADIGM", "trzsl")
    result = json.loads((run / "result.json").read_text())
    assert result["paradigm"] == "trzsl" and set(result["heads"]) == {"text", "fused"}
    for head, metrics in result["heads"].items():
        assert [metrics[name] for name in ("seen", "unseen", "harmonic")] == pytest.approx(groups(run, head))
    curve = dict(result["by_lambda"])
    assert curve[0.0] == pytest.approx(result["heads"]["text"]["harmonic"])
    assert curve[result["auxiliary"][-1]["lambda"]] == pytest.approx(result["heads"]["fused"]["harmonic"])
    assert curve[0.0] != result["heads"]["text"]["accuracy"]
    printed = re.findall(r"\* (seen|unseen|harmonic): ([\d.]+)%", (run / "log.txt").read_text())
    metrics = result["heads"][result["primary"]]
    assert printed[-3:] == [(name, f"{metrics[name]:.1f}") for name in ("seen", "unseen", "harmonic")]


@pytest.mark.parametrize("paradigm", ["ul", "ssl"])
def test_other_paradigms_have_none_of_them(paradigm: str, finished: Callable[..., Path]):
    run = finished("ZeroshotCLIP", "DATASET.PARADIGM", paradigm)
    result, made = (json.loads((run / name).read_text()) for name in ("result.json", "predictions.json"))
    assert result["paradigm"] == paradigm and set(result["heads"]["text"]) == {"accuracy", "macro_f1", "per_class"}
    assert "seen" not in made and "harmonic" not in (run / "log.txt").read_text()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["DATASET.PARADIGM", "zsl"], "DATASET.PARADIGM is 'zsl'; it must be one of ul, ssl, trzsl"),
        (["DATASET.PARADIGM", "ssl", "DATASET.LABELS_PER_CLASS", "500"], "class 'zero' has "),
        (
            ["DATASET.PARADIGM", "trzsl", "DATASET.SUBSAMPLE_CLASSES", "new"],
            "DATASET.SUBSAMPLE_CLASSES is new and must",
        ),
        (["DATASET.PARADIGM", "trzsl", "DATASET.SEEN_LABELLED", "0"], "DATASET.SEEN_LABELLED is 0.0; it must be "),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    options: list[str], says: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert train.main(arguments("ZeroshotCLIP", data, tmp_path / "run", *options)) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1
    assert not (tmp_path / "run" / "settings.json").exists()
