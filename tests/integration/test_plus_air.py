"""`train.py --trainer X+AiR` for every trainer of ours, briefly, in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from runs import arguments, figures, weights

import train

SMALL = ["DATASET.NUM_SHOTS", "2", "OPTIM.MAX_EPOCH", "2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store for all, so that the images are generated once."""
    return tmp_path_factory.mktemp("cache")


def run(trainer: str, data: Path, output: Path, cache: Path, *options: str) -> int:
    """Run a trainer with the config of what stands before its +."""
    args = arguments(trainer.partition("+")[0], data, output, "AIR.CACHE", str(cache), *SMALL, *options)
    args[args.index("--trainer") + 1] = trainer
    return train.main(args)


@pytest.mark.parametrize("trainer", ["ZeroshotCLIP", "CoOp", "UPL", "CPL"])
def test_every_trainer_gains_the_fused_head(trainer: str, data: Path, cache: Path, tmp_path: Path) -> None:
    assert run(f"{trainer}+AiR", data, tmp_path, cache) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["trainer"] == f"{trainer}+AiR" and set(result["heads"]) == {"text", "fused"}
    assert result["primary"] == "fused"
    log = (tmp_path / "log.txt").read_text()
    last = [line for line in log.splitlines() if line.startswith("* accuracy:")][-1]
    assert last == f"* accuracy: {result['heads']['fused']['accuracy']:.1f}%"
    assert any(weight == 0 for weight, _ in result["by_lambda"])


@pytest.mark.parametrize("trainer", ["CoOp", "ZeroshotCLIP"])
def test_where_no_pseudo_label_is_made_the_text_head_stays_as_it_was(
    trainer: str, data: Path, cache: Path, tmp_path: Path
) -> None:
    for name in (trainer, f"{trainer}+AiR"):
        assert run(name, data, tmp_path / name, cache) == 0
    plain, ours = (figures(tmp_path / name) for name in (trainer, f"{trainer}+AiR"))
    assert ours["heads"]["text"] == plain["heads"]["text"] and set(plain["heads"]) == {"text"}
    if trainer == "CoOp":
        one, other = (weights(tmp_path / name) for name in (trainer, f"{trainer}+AiR"))
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_pseudo_labels_hear_the_auxiliary_classifier(data: Path, cache: Path, tmp_path: Path) -> None:
    """UPL+AiR is AiR over UPL without L_s."""
    assert run("UPL+AiR", data, tmp_path / "plus", cache) == 0
    assert run("AiR", data, tmp_path / "air", cache, "TRAINER.AIR.LABELER", "UPL", "AIR.BETA", "0") == 0
    assert run("UPL", data, tmp_path / "upl", cache) == 0
    one, other, plain = (figures(tmp_path / name) for name in ("plus", "air", "upl"))
    assert one["heads"] == other["heads"] and one["pseudo_labels"] == other["pseudo_labels"]
    assert one["pseudo_labels"] != plain["pseudo_labels"]
    first, second = weights(tmp_path / "plus"), weights(tmp_path / "air")
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_the_headline_can_be_the_text_head(data: Path, cache: Path, tmp_path: Path) -> None:
    assert run("CoOp+AiR", data, tmp_path, cache, "AIR.PRIMARY", "text") == 0
    result = json.loads((tmp_path / "result.json").read_text())
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
    trainer: str, said: str, data: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = arguments("CoOp", data, tmp_path / "run")
    args[args.index("--trainer") + 1] = trainer
    assert train.main(args) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1
