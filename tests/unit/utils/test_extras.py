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

DROP_IN = f"""
import sys
from pathlib import Path

for hidden in {EVERY}:
    sys.modules[hidden] = None  # an import of it fails as if it were not installed

import air_plugin
from air_plugin import *

sys.path.append("compat")
from dassl.config import get_cfg_default

class Trainer:
    pass

assert issubclass(augment(Trainer), AuxiliaryMixin) and augment(Trainer).__name__ == "Trainer+AiR"
cfg = get_cfg_default()
add_air_config(cfg)

from PIL import Image
from air_plugin.config import AirSettings
from air_plugin.utils.provenance import Stages

folder = Path(sys.argv[1])
paths = []
for shade in range(4):
    paths.append(str(folder / f"{{shade}}.png"))
    Image.new("RGB", (32, 32), (60 * shade, 0, 0)).save(paths[-1])
for key, value in {{"M": 2, "K": 1, "STEPS": 1, "GENERATOR": "mini", "PROMPT": "a photo of the digit {{}}."}}.items():
    cfg.AIR[key] = value
cfg.AIR.LORA.STEPS = 1
backbone = load_backbone("mini")
table, _ = extract_features(backbone, paths, store=Store(folder / "store"))
probs = backbone.text_probs(table.plain, backbone.encode_texts(["zero", "one"]))
auxiliary = build_auxiliary(
    backbone, ["zero", "one"], paths, features=table.plain, probs=probs, settings=AirSettings.from_cfg(cfg),
    store=Store(folder / "store"), stages=Stages()
)
print(tuple(auxiliary.classifier.probs(table.plain).shape))
"""


def test_a_drop_in_needs_no_extra(tmp_path: Path):
    done = subprocess.run([sys.executable, "-c", DROP_IN, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "(4, 2)"


@pytest.mark.parametrize(
    ("hidden", "package", "main", "arguments"),
    [
        ("jinja2", "jinja2", air, ["report", "output"]),
        ("onnxscript", "onnxscript", air, ["export", "bundle", "x.onnx"]),
        ("sklearn", "scikit-learn", train.main, ["--trainer", "AiR"]),
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
    for extra in EXTRAS:  # the extra `test` brings all of them
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
    assert "air-plugin[train,onnx]" in declared["test"]
