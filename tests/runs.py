"""Short runs for the integration tests: every stage really runs, only briefly."""

from __future__ import annotations

import io
import json
import os
import runpy
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {
    "AIR.M": 4,
    "AIR.K": 2,
    "AIR.STEPS": 2,
    "AIR.BATCH": 10,
    "AIR.LORA.STEPS": 6,
    "AIR.LORA.BATCH": 4,
    "AIR.LORA.CHECKPOINT": 2,
    "AIR.LORA.PER_CLASS": 2,
    "OPTIM.MAX_EPOCH": 3,
    "TRAINER.PROMPT.VIEWS": 2,
    "TRAIN.CHECKPOINT_FREQ": 1,
}
SHORT = [str(part) for pair in SETTINGS.items() for part in pair]


def arguments(trainer: str, data: Path, output: Path, *options: str, config: str = "mini", seed: int = 1) -> list[str]:
    """The command line of train.py; X+AiR has the config of X."""
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
        str(ROOT / f"configs/trainers/{trainer.partition('+')[0]}/{config}.yaml"),
        *SHORT,
        *options,
    ]


def bash(script: str, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script as a person types it, with this python, activated or not."""
    path = environment.pop("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return subprocess.run(
        ["bash", str(ROOT / script), *args],
        env={**os.environ, "PATH": path, **environment},
        capture_output=True,
        text=True,
    )


def python_that_prints_its_arguments(folder: Path, *, fails_at: str = "") -> str:
    """A search path whose python runs nothing; it ends with 2 where one of its arguments is `fails_at`."""
    folder.mkdir(exist_ok=True)
    (folder / "python").write_text(
        "#!/usr/bin/env bash\nprintf '<%s>' \"${@:2}\"; echo\n"
        f'for one in "$@"; do [ "$one" != \'{fails_at}\' ] || exit 2; done\n'
    )
    (folder / "python").chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def script(name: str, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """As `bash`, but scripts/run.py, which all of them start, runs in this process: that saves seconds of imports."""
    home = Path(os.environ["HOME"])
    started = bash(name, *args, PATH=python_that_prints_its_arguments(home / "bin"))
    (line,) = started.stdout.splitlines()
    words = line.removeprefix("<").removesuffix(">").split("><")
    path = str(ROOT / "scripts" / "run.py")
    out, err = io.StringIO(), io.StringIO()
    with (
        redirect_stdout(out),
        redirect_stderr(err),
        mock.patch.dict(os.environ, {"JOBS": "1", **environment}),
        mock.patch.object(sys, "argv", [path, *words]),
    ):
        try:
            runpy.run_path(path, run_name="__main__")
            code: Any = 0
        except SystemExit as end:
            code = end.code
    return subprocess.CompletedProcess([name, *args], code or 0, out.getvalue(), err.getvalue())


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
