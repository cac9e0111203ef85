"""Every command and script can be asked what it is for."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from sources import ROOT


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("path", sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("scripts/**/*.sh")))
def test_shell_scripts_are_whole_thin_and_helpful(path: str):
    assert run("bash", "-n", path).returncode == 0
    source = (ROOT / path).read_text()
    assert source.startswith("#!/usr/bin/env bash\n# bash " + path)
    assert not re.search(r"\b(AIR|OPTIM|TRAINER|MODEL|DATALOADER|INPUT|TRAIN)\.[A-Z]", source)  # these are in YAML
    done = run("bash", path, "--help")
    assert done.returncode == 0 and "DATASET" in done.stdout and done.stderr == ""


@pytest.mark.parametrize(
    "command",
    [
        ["train.py"],
        ["scripts/run.py"],
        ["-m", "air_plugin.cli"],
        ["-m", "air_plugin.cli", "prototypes"],
        ["-m", "air_plugin.cli", "report"],
        ["-m", "air_plugin.cli", "predict"],
        ["-m", "air_plugin.cli", "export"],
        ["-m", "benchmarks.selection"],
        ["-m", "benchmarks.scaling"],
        ["-m", "benchmarks.prompt_step"],
        ["-m", "benchmarks.lora_step"],
        ["-m", "benchmarks.auxiliary_head"],
        ["-m", "benchmarks.features"],
        ["-m", "air_plugin.mini.training"],
    ],
)
def test_help_works(command: list[str]):
    done = run(sys.executable, *command, "--help")
    assert done.returncode == 0 and "usage:" in done.stdout and done.stderr == ""


def test_ci_is_one_command_of_four_parts():
    ci = ROOT / ".ci" / "run"
    assert run("bash", "-n", str(ci)).returncode == 0
    assert ci.stat().st_mode & 0o100
    assert all(word in ci.read_text() for word in ("ruff", "mypy", "mkdocs", "pytest"))
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert "[lint, types, docs]" in workflow and ".ci/run tests" in workflow
    done = run("bash", str(ci), "test")
    assert done.returncode == 2 and "known: lint, types, docs, tests" in done.stderr
