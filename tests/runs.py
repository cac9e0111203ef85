"""Short runs for the recipe tests: every stage really runs, only briefly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHORT = [
    "AIR.M",
    "4",
    "AIR.K",
    "2",
    "AIR.STEPS",
    "2",
    "AIR.BATCH",
    "10",
    "AIR.LORA.STEPS",
    "6",
    "AIR.LORA.BATCH",
    "4",
    "AIR.LORA.CHECKPOINT",
    "2",
    "AIR.LORA.PER_CLASS",
    "2",
    "OPTIM.MAX_EPOCH",
    "3",
    "TRAINER.PROMPT.VIEWS",
    "2",
    "TRAIN.CHECKPOINT_FREQ",
    "1",
]


def arguments(trainer: str, data: Path, output: Path, *options: str, config: str = "mini", seed: int = 1) -> list[str]:
    """The command line of train.py."""
    return [
        "--root",
        str(data),
        "--seed",
        str(seed),
        "--trainer",
        trainer,
        "--output-dir",
        str(output),
        "--dataset-config-file",
        str(ROOT / "configs/datasets/digits.yaml"),
        "--config-file",
        str(ROOT / f"configs/trainers/{trainer}/{config}.yaml"),
        *SHORT,
        *options,
    ]


def command(*args: str) -> tuple[list[str], dict[str, str]]:
    """A command and environment that run train.py in a process of its own."""
    return [sys.executable, str(ROOT / "train.py"), *args], dict(os.environ)


def run(*args: str) -> subprocess.CompletedProcess[str]:
    """Run train.py in a process of its own."""
    line, environment = command(*args)
    return subprocess.run(line, env=environment, capture_output=True, text=True)


def figures(output: Path) -> dict[str, Any]:
    """What must be equal between two runs of the same settings: everything but times and circumstances."""
    result = json.loads((output / "result.json").read_text())
    return {key: value for key, value in result.items() if key not in ("stages", "provenance")}


def weights(output: Path) -> dict[str, Any]:
    """The state dict of the last checkpoint."""
    import torch

    folder = output / "prompt_learner"
    name = (folder / "checkpoint").read_text().strip()
    return torch.load(folder / name, weights_only=True)["state_dict"]
