"""The directions of imports, what the wheel holds, and that every script can say what it is for."""

from __future__ import annotations

import ast
import configparser
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from air_plugin import __version__
from air_plugin.utils.extras import EXTRAS

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = sorted((ROOT / "air_plugin").rglob("*.py"))
PURE = tuple(path.stem for path in (ROOT / "air_plugin" / "functional").glob("[a-z]*.py"))
# Nothing below may import these.
TOP = {f"air_plugin.{name}" for name in ("auxiliary.build", "mixin", "auxiliary.gallery", "cli")}
LATE = {
    "diffusers",
    "peft",
    "transformers",
    "open_clip",
    "torchvision",
    "matplotlib",
    "sklearn",
    "scipy",
    "jinja2",
    "tensorboard",
    "onnx",
    "onnxruntime",
}


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.AST, module: str, *, is_package: bool = False) -> Iterator[str]:
    """Full names of everything that a module imports, wherever the statement stands; `import_module("x")` counts."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: len(module.split(".")) - node.level + is_package] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
                yield str(node.args[0].value)


def imports_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return set(imported(tree, module_name(path), is_package=path.name == "__init__.py"))


def offenders(paths: list[Path], forbidden: set[str]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in paths
        for name in sorted(imports_of(path))
        if name.split(".")[0] in forbidden
    ]


# Imports


def test_the_finder_sees_imports_wherever_they_stand():
    code = """
import a.b
from c import d
if TYPE_CHECKING:
    from e import f
def g():
    import h
    from . import i
    from ..j import k
    importlib.import_module("l.m")
"""
    found = set(imported(ast.parse(code), "top.middle.leaf"))
    assert {"a.b", "c.d", "e.f", "h", "top.middle.i", "top.j.k", "l.m"} <= found


def test_the_library_never_imports_what_uses_it():
    assert len(LIBRARY) > 20
    above = {"dassl", "trainers", "datasets", "train", "compat", "scripts", "tests", "benchmarks"}
    assert not offenders(LIBRARY, above)


def test_the_stand_in_for_dassl_knows_nothing_of_us():
    paths = sorted((ROOT / "compat").rglob("*.py"))
    assert len(paths) > 10
    assert not offenders(paths, {"air_plugin", "trainers", "datasets", "train", "scripts", "tests"})


def test_trainers_and_data_sets_do_not_know_each_other():
    assert not offenders(sorted((ROOT / "trainers").glob("*.py")), {"datasets", "train", "scripts", "tests"})
    assert not offenders(sorted((ROOT / "datasets").glob("*.py")), {"trainers", "train", "scripts", "tests"})


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_import_nothing_of_ours_but_errors_and_each_other(name: str):
    path = ROOT / "air_plugin" / "functional" / f"{name}.py"
    ours = {module for module in imports_of(path) if module.startswith("air_plugin")}
    assert {module.split(".")[2] for module in ours if module.count(".") > 1} <= {*PURE}


def test_nothing_below_imports_the_top():
    for path in LIBRARY:
        if module_name(path) not in TOP:
            assert not imports_of(path) & TOP, path.relative_to(ROOT)


def at_import_time(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run when a module is imported."""
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        for field in ("body", "orelse", "finalbody"):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield from at_import_time(getattr(node, field, []))


def early_imports_of(path: Path) -> set[str]:
    statements = list(at_import_time(ast.parse(path.read_text(encoding="utf-8")).body))
    package = path.name == "__init__.py"
    return {name for node in statements for name in imported(node, module_name(path), is_package=package)}


def test_large_packages_are_imported_where_they_are_needed():
    for path in LIBRARY:
        if "training" not in path.parts:  # `python -m air_plugin.mini.training` needs them all
            assert not {name.split(".")[0] for name in early_imports_of(path)} & LATE, path.relative_to(ROOT)


def test_imports_within_the_library_go_round_in_no_circle():
    names = {module_name(path) for path in LIBRARY}
    graph = {module_name(path): early_imports_of(path) & names - {module_name(path)} for path in LIBRARY}
    assert graph["air_plugin.clip.backbone"]  # the graph is not empty
    while graph:
        leaves = {name for name, below in graph.items() if not below & graph.keys()}
        assert leaves, f"a circle among {sorted(graph)}"
        graph = {name: below for name, below in graph.items() if name not in leaves}


# Habits that the field's own code suffers from


def test_no_pickles_are_read():
    for path in LIBRARY:
        assert not imports_of(path) & {"torch.load", "pickle", "joblib", "dill", "shelve"}, path.relative_to(ROOT)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in ("torch.load", "torch.jit.load"), f"{path.name}:{node.lineno}"
                assert "allow_pickle" not in [word.arg for word in node.keywords], f"{path.name}:{node.lineno}"


def test_no_fault_is_swallowed():
    for folder in ("air_plugin", "trainers", "datasets", "compat", "scripts"):
        for path in [*(ROOT / folder).rglob("*.py"), ROOT / "train.py"]:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ExceptHandler):
                    where = f"{path.relative_to(ROOT)}:{node.lineno}"
                    assert node.type is not None, f"bare except at {where}"
                    silent = all(isinstance(statement, (ast.Pass, ast.Continue)) for statement in node.body)
                    assert not (silent and ast.unparse(node.type) in ("Exception", "BaseException")), where


def test_methods_are_thin_and_listed():
    import train

    methods = {path.stem: path for path in (ROOT / "trainers").glob("*.py")}
    assert methods.pop("__init__").read_text() == ""
    assert methods.pop("prompt_trainer") and methods.pop("self_training")
    assert set(train.TRAINERS) == methods.keys()
    assert all(len(path.read_text().splitlines()) <= 120 for path in methods.values())
    sets = {path.stem for path in (ROOT / "datasets").glob("*.py")} - {"__init__", "base", "download"}
    assert set(train.DATASETS) == sets
    assert (ROOT / "datasets" / "__init__.py").read_text() == ""


# The wheel


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
    distribution = {"PIL": "pillow", "yaml": "pyyaml", "open_clip": "open_clip_torch"}
    extras = {name for extra in EXTRAS.values() for name in extra}
    unseen = {"accelerate"}  # of diffusers: models are loaded without a second copy in memory
    assert {distribution.get(name, name) for name in third_party - extras} | unseen == {*needs}
    assert f"\nVersion: {__version__}\n" in metadata


# Scripts


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
        ["-m", "benchmarks.prompt_step"],
        ["-m", "benchmarks.auxiliary_head"],
        ["-m", "air_plugin.mini.training"],
    ],
)
def test_help_works(command: list[str]):
    done = run(sys.executable, *command, "--help")
    assert done.returncode == 0 and "usage:" in done.stdout and done.stderr == ""


def test_ci_is_one_command():
    ci = ROOT / ".ci" / "run"
    assert run("bash", "-n", str(ci)).returncode == 0
    assert ci.stat().st_mode & 0o100
    assert all(word in ci.read_text() for word in ("ruff", "mypy", "pytest"))
