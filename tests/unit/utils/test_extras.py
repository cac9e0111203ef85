"""What works without the extras, and the one line where an extra is needed."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import prepare
import train
from air_plugin.cli import main as air
from air_plugin.utils.errors import UserError
from air_plugin.utils.extras import EXTRAS, require_extra

ROOT = Path(__file__).resolve().parents[3]
EVERY = sorted({module for extra in EXTRAS.values() for module in extra})


@pytest.mark.full
def test_a_drop_in_needs_no_extra(tmp_path: Path):
    hidden = [module for module in EVERY if module != "scipy"]  # it comes with scikit-learn
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "without_extras.py"), str(tmp_path), *hidden],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "(4, 2)"


@pytest.mark.parametrize(
    ("hidden", "package", "main", "arguments"),
    [
        ("jinja2", "jinja2", air, ["report", "output"]),
        ("onnxscript", "onnxscript", air, ["export", "bundle", "x.onnx"]),
        ("tensorboard", "tensorboard", train.main, ["--trainer", "AiR"]),
        ("scipy", "'scipy>=1.15'", prepare.main, ["digits", "--root", "."]),
    ],
)
def test_a_command_without_its_extra_ends_in_one_line(
    hidden: str,
    package: str,
    main: Callable[[list[str]], int],
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setitem(sys.modules, hidden, None)
    assert main(arguments) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("error: ") and error.count("\n") == 1
    assert f"run: pip install {package}  (extra: " in error


def test_nothing_is_missing_here():
    for extra in EXTRAS.keys() - {"demo"}:  # the extra `test` brings them
        require_extra(extra, purpose="this")


def test_all_missing_packages_stand_in_one_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.setitem(sys.modules, "tabulate", None)
    with pytest.raises(UserError, match=r"pip install jinja2 tabulate  \(extra: report\)"):
        require_extra("report", purpose="this")


def test_extras_are_those_of_the_project_file():
    section = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    declared = {
        name: set(re.findall(r'"([^"]+)"', packages))
        for name, packages in re.findall(r"^(\w+) = (\[.*\])", section, re.MULTILINE)
    }
    assert declared["report"] == {*EXTRAS["report"].values()}
    assert declared["train"] | declared["report"] == {*EXTRAS["train"].values(), "air-plugin[report]"}
    assert declared["onnx"] == {*EXTRAS["onnx"].values(), "torch>=2.6"}
    assert declared["ray"] == {*EXTRAS["ray"].values()}
    assert "air-plugin[train,onnx,ray]" in declared["test"]
