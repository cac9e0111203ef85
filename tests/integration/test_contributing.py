"""The examples of CONTRIBUTING.md, put where it says, work by themselves."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import ROOT

from air_plugin.config import AirSettings, merge_file

TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
# A path in backquotes, and the block of code that follows it.
EXAMPLES = dict(re.findall(r"`([\w./]+)`:\n\n```\w+\n(.*?)```\n", TEXT, re.DOTALL))
COMMANDS = [line.strip() for line in re.findall(r"^    ((?:DATA|python).*animals.*)$", TEXT, re.MULTILINE)]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout with the examples in it, and images of the data set below its folder `data`."""
    root = tmp_path_factory.mktemp("checkout")
    leave_out = shutil.ignore_patterns("__pycache__")
    for name in ("compat", "configs", "datasets", "scripts", "trainers"):
        shutil.copytree(ROOT / name, root / name, ignore=leave_out)
    for name in ("train.py", "prepare.py"):
        shutil.copy(ROOT / name, root / name)
    (root / "air_plugin").symlink_to(ROOT / "air_plugin")
    for path, code in EXAMPLES.items():
        assert not (root / path).exists(), f"{path} is there already"
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).write_text(code, encoding="utf-8")
    rng = np.random.default_rng(1)
    for part, label, number in np.ndindex(2, 2, 3):
        folder = root / "DATA" / "animals" / ("train", "test")[part] / ("cat", "dog")[label]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 100, (32, 32, 3)) + 100 * label
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return root


def run(checkout: Path, command: str) -> Path:
    """Run a command of the page; returns the folder of its results."""
    words = shlex.split(command)
    environment = {
        **os.environ,
        "SEEDS": "1",
        "DATA": "DATA",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    words = [word for word in words if not word.startswith("DATA=")]
    done = subprocess.run(words, cwd=checkout, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return checkout / "output" / "animals"


def test_every_example_and_command_is_found():
    assert {path.split("/")[0] for path in EXAMPLES} == {"configs", "datasets", "trainers"} and len(EXAMPLES) == 6
    assert len(COMMANDS) == 2, COMMANDS


@pytest.mark.full
def test_the_data_set_is_found_and_trained_on(checkout: Path):
    (command,) = [line for line in COMMANDS if "zeroshot/main.sh" in line]
    (result,) = run(checkout, command).glob("ZeroshotCLIP/*/seed1/result.json")
    found = json.loads(result.read_text())
    assert found["template"] == "a photo of a {}, a kind of animal." and found["dataset"] == "animals"
    assert {*found["heads"]["text"]["per_class"]} == {"cat", "dog"}


@pytest.mark.full
def test_the_trainer_is_found_and_trains(checkout: Path):
    (command,) = [line for line in COMMANDS if "SmoothCoOp" in line]
    (result,) = run(checkout, command).glob("SmoothCoOp/*/seed1/result.json")
    assert json.loads(result.read_text())["trainer"] == "SmoothCoOp"


def test_the_generators_settings_are_valid(checkout: Path):
    from dassl.config import get_cfg_default

    from air_plugin.config import add_air_config

    cfg = get_cfg_default()
    add_air_config(cfg)
    merge_file(cfg, checkout / "configs" / "generators" / "my_sd.yaml")
    settings = AirSettings.from_cfg(cfg)
    assert settings.generator == "someone/my-stable-diffusion" and settings.lora.steps == 1000


def test_examples_are_in_the_style_of_the_project(checkout: Path):
    """The rules that hold for the code hold for what the page shows."""
    paths = [str(checkout / path) for path in EXAMPLES if path.endswith(".py")]
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--config", str(ROOT / "pyproject.toml"), *paths],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
