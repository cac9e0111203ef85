"""SIGKILL at any stage, then the same command again: the figures are those of an undisturbed run."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

from runs import arguments, command, figures, run, weights


def kill_when(pattern: str, args: list[str], output: Path) -> bool:
    """Start train.py and kill it as soon as a file that matches is there; whether it was killed before it ended."""
    line, environment = command(*args)
    process = subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        if any(output.glob(pattern)):
            process.send_signal(signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.002)
    return False


def test_killed_at_every_stage_and_started_again(tmp_path: Path) -> None:
    import torch

    data = tmp_path / "data"
    data.mkdir()
    calm = tmp_path / "calm"
    done = run(*arguments("AiR", data, calm))
    assert done.returncode == 0, done.stderr

    output = tmp_path / "killed"
    args = arguments("AiR", data, output)
    stages = (
        "cache/features/*",
        "cache/lora/*/checkpoint.safetensors",
        "cache/images/*/manifest.jsonl",
        "cache/prototypes/*",
        "prompt_learner/model.pth.tar-1",
    )
    killed = [kill_when(pattern, args, output) for pattern in stages]
    assert all(killed)
    assert not (output / "result.json").exists()
    done = run(*args)
    assert done.returncode == 0, done.stderr
    assert figures(output) == figures(calm)
    assert torch.equal(weights(output)["ctx"], weights(calm)["ctx"])
