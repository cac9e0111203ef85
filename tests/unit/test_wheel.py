"""What the wheel holds and asks for."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
from sources import LIBRARY, ROOT, imports_of

from air_plugin import __version__
from air_plugin.utils.extras import EXTRAS


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from a copy of the checkout so that the build leaves nothing behind."""
    folder = tmp_path_factory.mktemp("wheel")
    leave_out = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "output", "data", "shared")
    shutil.copytree(ROOT, folder / "source", ignore=leave_out)
    code = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], cwd=folder / "source", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_the_library_and_nothing_else(wheel: zipfile.ZipFile):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {re.sub(r"-[\d.]+\.dist-info$", "-dist-info", top) for top in tops} == {"air_plugin", "air_plugin-dist-info"}


def test_the_wheel_holds_all_of_the_library(wheel: zipfile.ZipFile):
    kinds = ("txt", "md", "j2", "yaml", "typed")
    files = [*LIBRARY, *(path for kind in kinds for path in (ROOT / "air_plugin").rglob(f"*.{kind}"))]
    weights = sorted((ROOT / "air_plugin" / "mini" / "weights").iterdir())
    assert {"clip.safetensors", "unet.safetensors", "vae.safetensors"} <= {path.name for path in weights}
    for path in [*files, *weights]:
        assert wheel.read(path.relative_to(ROOT).as_posix()) == path.read_bytes()
    assert len([name for name in wheel.namelist() if name.startswith("air_plugin/")]) == len(files) + len(weights)


def test_the_wheel_brings_the_command_and_its_needs(wheel: zipfile.ZipFile):
    (info,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    points = configparser.ConfigParser()
    points.read_string(wheel.read(f"{info}/entry_points.txt").decode())
    assert dict(points["console_scripts"]) == {"air": "air_plugin.cli:main"}
    metadata = wheel.read(f"{info}/METADATA").decode()
    needs = re.findall(r"^Requires-Dist: ([\w.-]+)(?!.*extra)", metadata, re.MULTILINE)
    third_party = {
        name.split(".")[0]
        for path in LIBRARY
        for name in imports_of(path)
        if name.split(".")[0] not in sys.stdlib_module_names and not name.startswith("air_plugin")
    }
    distribution = {"PIL": "pillow", "yaml": "pyyaml", "open_clip": "open_clip_torch", "sklearn": "scikit-learn"}
    extras = {name for extra in EXTRAS.values() for name in extra}
    unseen = {"accelerate"}  # of diffusers: models are loaded without a second copy in memory
    assert {distribution.get(name, name) for name in third_party - extras} | unseen == {*needs}
    assert f"\nVersion: {__version__}\n" in metadata
