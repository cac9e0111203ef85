"""Steps of prompt training as a graph (here the CPU's stand-in for a CUDA graph): the same weights, bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Finished
from recorded_graph import RecordedGraph
from runs import arguments, figures, weights

import train
import trainers.prompt_step
from air_plugin.utils.cuda_graph import GraphedStep
from trainers.prompt_trainer import PromptTrainer
from trainers.upl import UPL


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[RecordedGraph]:
    """Every step is given a graph; these are they."""
    made: list[RecordedGraph] = []

    def step(*inputs: Any, **options: Any) -> GraphedStep:
        made.append(RecordedGraph())
        return GraphedStep(*inputs, **options, graph=made[-1])

    monkeypatch.setattr(trainers.prompt_step, "GraphedStep", step)
    return made


def require_equal(output: Path, expected: Path) -> None:
    assert figures(output) == figures(expected)
    ours, theirs = weights(output), weights(expected)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("trainer", "options", "rounds"),
    [
        ("UPL", ["TRAINER.PROMPT.ENSEMBLE", "2", "TRAINER.PROMPT.CLIP_GRAD", "0.01"], 1),
        ("UPL", ["TRAINER.PROMPT.CSC", "True", "OPTIM.NAME", "adam"], 1),
        ("CPL", ["TRAINER.CPL.LOSS", "lw", "TRAINER.PROMPT.ROUNDS", "2"], 2),
        ("AiR", ["AIR.LS", "synthetic", "AIR.BETA", "auto", "TRAINER.PROMPT.CLASS_TOKEN_POSITION", "middle"], 1),
        ("AiR", ["AIR.LS", "synthetic", "AIR.BETA", "auto", "DATASET.PARADIGM", "trzsl"], 1),
        ("GRIP", ["DATASET.PARADIGM", "ssl", "TRAINER.PROMPT.ROUNDS", "2"], 2),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_weights_and_figures_are_those_of_a_plain_loop(
    trainer: str,
    options: list[str],
    rounds: int,
    finished: Finished,
    data: Path,
    cache: str,
    tmp_path: Path,
    graphs: list[RecordedGraph],
):
    options = [*options, "DATALOADER.TRAIN_X.BATCH_SIZE", "24"]
    assert train.main(arguments(trainer, data, tmp_path, "AIR.CACHE", cache, *options)) == 0
    assert len(graphs) == rounds
    for graph in graphs:
        assert graph.log[:4] == ["warm up"] * 3 + ["capture"] and graph.log.count("replay") > 3
    with pytest.MonkeyPatch.context() as plain:
        plain.setattr(trainers.prompt_step, "GraphedStep", GraphedStep)
        require_equal(tmp_path, finished(trainer, *options))


def test_a_kill_changes_nothing(
    finished: Finished,
    data: Path,
    cache: str,
    tmp_path: Path,
    graphs: list[RecordedGraph],
    monkeypatch: pytest.MonkeyPatch,
):
    class Killed(BaseException):
        pass

    step = PromptTrainer.forward_backward
    line = arguments("UPL", data, tmp_path, "AIR.CACHE", cache)

    def stopping(trainer: PromptTrainer, batch: dict[str, torch.Tensor]) -> dict[str, float]:
        if trainer.epoch == 2 and trainer.batch_idx == 1:
            raise Killed
        return step(trainer, batch)

    with monkeypatch.context() as patch:
        patch.setattr(PromptTrainer, "forward_backward", stopping)
        with pytest.raises(Killed):
            train.main(line)
    assert train.main(line) == 0
    assert len(graphs) == 2 and all("replay" in graph.log for graph in graphs)
    with monkeypatch.context() as plain:
        plain.setattr(trainers.prompt_step, "GraphedStep", GraphedStep)
        require_equal(tmp_path, finished("UPL"))


@pytest.mark.parametrize("way", ["switch", "losses that do not say that they are static"])
def test_a_plain_loop_where_a_graph_is_not_wanted(
    way: str, data: Path, cache: str, tmp_path: Path, graphs: list[RecordedGraph], monkeypatch: pytest.MonkeyPatch
):
    if way == "switch":
        options = ["AIR.CUDA_GRAPHS", "False"]
    else:
        options = []
        monkeypatch.delattr(UPL.__mro__[1], "static_losses")  # of the class that defines `losses`
    assert train.main(arguments("UPL", data, tmp_path, "AIR.CACHE", cache, *options)) == 0
    assert [graph.log for graph in graphs] == [[]]


def test_a_loss_that_is_not_finite_stops_training(
    data: Path,
    cache: str,
    tmp_path: Path,
    graphs: list[RecordedGraph],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """Inside of a graph nothing can be looked at: the loss is, after each step."""
    inputs = PromptTrainer.inputs

    def spoiling(trainer: PromptTrainer, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        batch = inputs(trainer, batch)
        return {**batch, "img": batch["img"] / 0} if trainer.epoch == 2 else batch

    monkeypatch.setattr(PromptTrainer, "inputs", spoiling)
    assert train.main(arguments("UPL", data, tmp_path, "AIR.CACHE", cache)) == 2
    assert "The loss is not finite" in capsys.readouterr().err
    assert graphs[0].log[-1] == "replay" and not (tmp_path / "result.json").exists()
