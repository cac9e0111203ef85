"""`train.py --trainer X+AiR` for every trainer of ours, briefly, in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import arguments, figures, weights

import train

SMALL = ["DATASET.NUM_SHOTS", "2", "OPTIM.MAX_EPOCH", "2"]


Finished = Callable[..., Path]


@pytest.mark.parametrize("trainer", ["ZeroshotCLIP", "CoOp", "UPL", "CPL"])
def test_every_trainer_gains_the_fused_head(trainer: str, finished: Finished) -> None:
    run = finished(f"{trainer}+AiR", *SMALL)
    result = json.loads((run / "result.json").read_text())
    assert result["trainer"] == f"{trainer}+AiR" and set(result["heads"]) == {"text", "fused"}
    assert result["primary"] == "fused"
    log = (run / "log.txt").read_text()
    last = [line for line in log.splitlines() if line.startswith("* accuracy:")][-1]
    assert last == f"* accuracy: {result['heads']['fused']['accuracy']:.1f}%"
    assert any(weight == 0 for weight, _ in result["by_lambda"])


@pytest.mark.parametrize("trainer", ["CoOp", "ZeroshotCLIP"])
def test_where_no_pseudo_label_is_made_the_text_head_stays_as_it_was(trainer: str, finished: Finished) -> None:
    runs = finished(trainer, *SMALL), finished(f"{trainer}+AiR", *SMALL)
    plain, ours = map(figures, runs)
    assert ours["heads"]["text"] == plain["heads"]["text"] and set(plain["heads"]) == {"text"}
    if trainer == "CoOp":
        one, other = map(weights, runs)
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_pseudo_labels_use_the_auxiliary_classifier(finished: Finished) -> None:
    """UPL+AiR is AiR over UPL without L_s."""
    runs = (
        finished("UPL+AiR", *SMALL),
        finished("AiR", *SMALL, "TRAINER.AIR.LABELER", "UPL", "AIR.BETA", "0"),
        finished("UPL", *SMALL),
    )
    one, other, plain = map(figures, runs)
    assert one["heads"] == other["heads"] and one["pseudo_labels"] == other["pseudo_labels"]
    assert one["pseudo_labels"] != plain["pseudo_labels"]
    first, second = weights(runs[0]), weights(runs[1])
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_the_primary_classifier_can_be_the_text_head(finished: Finished) -> None:
    result = json.loads((finished("CoOp+AiR", *SMALL, "AIR.PRIMARY", "text") / "result.json").read_text())
    assert result["primary"] == "text" and set(result["heads"]) == {"text", "fused"}


@pytest.mark.parametrize(
    ("trainer", "said"),
    [
        ("AiR+AiR", "AiR has the auxiliary classifier already"),
        ("ZeroshotAiR+AiR", "ZeroshotAiR has the auxiliary classifier already"),
        ("Foo+AiR", "unknown trainer 'Foo+AiR'"),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_code_2(
    trainer: str, said: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = arguments("CoOp", data, tmp_path / "run")
    args[args.index("--trainer") + 1] = trainer
    assert train.main(args) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1
