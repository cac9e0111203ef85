"""benchmarks/prompt_step.py on a small model: what it prints, and that it finds a difference."""

from __future__ import annotations

import re

import pytest
import torch
from recorded_graph import RecordedGraph
from small_models import make_backbone

from air_plugin.clip.prompts import PromptedCLIP
from air_plugin.clip.text_encoder import TextEncoder
from benchmarks import prompt_step

ARGUMENTS = ["--classes", "4", "--steps", "2", "--batch", "3", "--threads", "1"]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_step, "random_backbone", make_backbone)


def test_three_ways_are_compared(capsys: pytest.CaptureFixture[str]):
    assert prompt_step.main(ARGUMENTS) == 0
    printed = capsys.readouterr().out
    times = {
        name: float(re.search(rf"{name} +([\d.]+) ms", printed)[1]) for name in ("shared prefix", "cut tower", "CoOp's")
    }
    for other in ("cut tower", "CoOp's"):
        ratio = float(re.search(rf"{other} / shared prefix +([\d.]+)", printed)[1])
        assert ratio == pytest.approx(times[other] / times["shared prefix"], rel=0.1, abs=0.1)
    # airplane, airport, baseball diamond, basketball court: 1, 1, 2 and 2 tokens, each with a full stop and an end
    assert "31 tokens in all" in printed and "84 in all" in printed and "308 tokens in all" in printed


def test_a_step_as_a_graph_is_the_same():
    backbone = make_backbone()
    label, image = torch.tensor([0, 1, 2]), torch.randn(3, 24, generator=torch.Generator().manual_seed(1))
    graph = RecordedGraph()
    plain, graphed = (
        prompt_step.Way(
            backbone,
            prompt_step.CLASSES[:3],
            image=lambda: image,
            text=PromptedCLIP.text_features,
            graphed=wanted is not None,
            graph=wanted,
        )
        for wanted in (None, graph)
    )
    for _ in range(4):
        assert prompt_step.difference(graphed.step(label), plain.step(label)) == (0, 0)
    assert graph.log == ["warm up", "capture", "replay", "replay", "replay"]
    assert torch.equal(graphed.learner.ctx, plain.learner.ctx) and len(graphed.seconds) == 4


def test_a_difference_is_an_error(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    encode = TextEncoder.encode_packed
    monkeypatch.setattr(TextEncoder, "encode_packed", lambda *inputs: encode(*inputs) + torch.eye(4, 24))
    assert prompt_step.main(ARGUMENTS) == 1
    assert "differ by more than" in capsys.readouterr().err


def test_a_gpu_that_is_not_there_is_an_error(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        prompt_step.main([*ARGUMENTS, "--device", "cuda"])
    assert "finds no GPU" in capsys.readouterr().err
