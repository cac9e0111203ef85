"""Every benchmark runs, in small, and finds that the fast way and the plain one agree. Speed is measured elsewhere."""

from __future__ import annotations

import importlib

import pytest


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("auxiliary_head", "--backbone mini --classes 10 --batch 4 --repeats 1"),
        ("em", "--images 300 --dimensions 8 --classes 3 --chunk 64"),
        ("selection", "--images 500 --classes 5 --subset 200 --repeat 1 --per-class 4"),
    ],
)
def test_a_benchmark_runs_and_agrees(name: str, options: str, capsys: pytest.CaptureFixture[str]):
    benchmark = importlib.import_module(f"benchmarks.{name}")
    assert benchmark.main([*options.split(), "--threads", "1"]) == 0
    out, error = capsys.readouterr()
    assert "1 threads" in out and error == ""
