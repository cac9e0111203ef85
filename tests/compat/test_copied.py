"""`trainers/` and `datasets/` copied by themselves beside another Dassl, as into somebody's CoOp checkout."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from dassl_small import ROOT, standin_only

CODE = """
import importlib, json, sys
from pathlib import Path

names = [f"{folder}.{path.stem}" for folder in ("trainers", "datasets") for path in sorted(Path(folder).glob("*.py"))]
modules = [importlib.import_module(name) for name in names]
import air_plugin, dassl
from dassl.data.datasets import DATASET_REGISTRY
from dassl.engine import TRAINER_REGISTRY
print(json.dumps({
    "modules": [module.__file__ for module in modules], "dassl": [dassl.__file__, dassl.__version__],
    "library": air_plugin.__file__, "path": sys.path,
    "trainers": TRAINER_REGISTRY.registered_names(), "datasets": DATASET_REGISTRY.registered_names(),
}))
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with our two folders in it, and nothing else of ours."""
    folder = tmp_path / "checkout"
    for name in ("trainers", "datasets"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def python(checkout: Path, *paths: Path) -> subprocess.CompletedProcess[str]:
    """Import it all in a process of its own, with the library and these paths alone."""
    library = checkout.parent / "library"
    library.mkdir()
    (library / "air_plugin").symlink_to(ROOT / "air_plugin")  # as if installed: the repository is not on the path
    path = os.pathsep.join(map(str, [*paths, library]))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, "-c", CODE], cwd=checkout, env=environment, capture_output=True, text=True)


def test_they_import_and_register_with_another_dassl(checkout: Path, tmp_path: Path):
    other = tmp_path / "other"
    shutil.copytree(ROOT / "compat" / "dassl", other / "dassl", ignore=shutil.ignore_patterns("__pycache__"))
    init = other / "dassl" / "__init__.py"
    text, count = re.subn(r'__version__ = ".*"', '__version__ = "9.9.9"', init.read_text())
    assert count == 1
    init.write_text(text)

    done = python(checkout, other)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["dassl"] == [str(init), "9.9.9"]
    assert len(found["modules"]) > 20 and all(Path(file).is_relative_to(checkout) for file in found["modules"])
    assert not {str(ROOT), str(ROOT / "compat")} & set(found["path"])
    assert found["library"].endswith("library/air_plugin/__init__.py")
    assert set(found["trainers"]) == {"ZeroshotCLIP", "ZeroshotAiR", "CoOp", "UPL", "GRIP", "CPL", "AiR"}
    configs = [yaml.safe_load(path.read_text()) for path in (ROOT / "configs" / "datasets").glob("*.yaml")]
    assert set(found["datasets"]) == {config["DATASET"]["NAME"] for config in configs}


@standin_only
def test_without_a_dassl_it_is_dassl_that_is_missing(checkout: Path):
    """So the other Dassl above is really the one in use: nothing of ours brings the stand-in along."""
    done = python(checkout)
    assert done.returncode == 1 and "No module named 'dassl'" in done.stderr
