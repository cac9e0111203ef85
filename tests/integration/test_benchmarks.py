"""Every benchmark runs, in small, and finds that the fast way and the plain one agree. Speed is measured elsewhere."""

from __future__ import annotations

import importlib
from argparse import Namespace

import pytest

from benchmarks import lora_step
from benchmarks.generator_flops import lora_cost


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("auxiliary_head", "--backbone mini --classes 10 --batch 4 --repeats 1"),
        ("em", "--images 300 --dimensions 8 --classes 3 --chunk 64"),
        ("lora_step", "--size tiny --batch 2 --turns 1 --steps 1"),
        ("selection", "--images 500 --classes 5 --subset 200 --repeat 1 --per-class 4"),
    ],
)
def test_a_benchmark_runs_and_agrees(name: str, options: str, capsys: pytest.CaptureFixture[str]):
    benchmark = importlib.import_module(f"benchmarks.{name}")
    assert benchmark.main([*options.split(), "--threads", "1"]) == 0
    out, error = capsys.readouterr()
    assert "1 threads" in out and error == ""


def test_the_operations_of_a_lora_step_are_those_that_are_counted_for_the_published_architecture():
    options = Namespace(device="meta", size="sd15", precision="bf16", rank=16, batch=None)
    case = lora_step.make_case(options)
    assert (case.settings.batch, case.pixels) == (16, 256)
    assert lora_step.flops_of(case) == lora_cost("sd15", 256, 16).flops


def test_a_gpu_that_is_not_there_is_an_error_of_the_command(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit:
        lora_step.main(["--device", "cuda"])
    assert exit.value.code == 2 and "torch finds no GPU" in capsys.readouterr().err
