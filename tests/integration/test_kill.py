"""SIGKILL at any stage, then the same command again: the result is that of an undisturbed run."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import ROOT, arguments, figures, weights

import train

LIBRARIES = ["train", "trainers.air", "datasets.digits", "open_clip", "diffusers", "peft", "sklearn.metrics"]


def begin(args: list[str]) -> None:
    """What a process does: train.py, without its output."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1), os.dup2(nowhere.fileno(), 2)
    raise SystemExit(train.main(args))


@pytest.mark.full
def test_killed_at_every_stage_and_started_again(
    finished: Callable[..., Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = multiprocessing.get_context("forkserver")  # one process imports the libraries, each run is a copy of it
    server.set_forkserver_preload(LIBRARIES)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def start() -> multiprocessing.Process:
        process = server.Process(target=begin, args=[arguments("AiR", data, tmp_path)])
        process.start()
        return process

    def kill_when(pattern: str) -> bool:
        """Kill a run as soon as a file that matches is there; whether it was killed before it ended."""
        process = start()
        while process.is_alive() and not any(tmp_path.glob(pattern)):
            time.sleep(0.002)
        process.kill()
        process.join()
        return process.exitcode == -9

    stages = (
        "cache/features/*",
        "cache/lora/*/checkpoint.safetensors",
        "cache/images/*/manifest.jsonl",
        "cache/prototypes/*",
        "prompt_learner/model.pth.tar-1",
    )
    killed = [kill_when(pattern) for pattern in stages]
    assert all(killed)
    assert not (tmp_path / "result.json").exists()
    last = start()
    last.join()
    assert last.exitcode == 0
    calm = finished("AiR")
    assert figures(tmp_path) == figures(calm)
    assert torch.equal(weights(tmp_path)["ctx"], weights(calm)["ctx"])
