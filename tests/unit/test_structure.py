"""The directions of imports: the floors of the house, and who may import what.

An import counts wherever it stands: at the top, in a function, or under TYPE_CHECKING.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
from sources import ENTRIES, LIBRARY, ROOT, early_imports_of, imported, imports_of, module_name

# From the top. A room imports from its own floor and from those below. README shows the same tree.
FLOORS = (
    ("train", "prepare", "scripts", "compose"),  # compose: what the other three use of scripts/
    ("trainers", "cli", "benchmarks"),
    ("demo",),
    ("estimator",),
    ("mixin", "inference"),
    ("auxiliary",),
    ("diffusion",),
    (
        "clip",
        "report",
        "config",
        "settings",
        "former_settings",
        "merging",
        "dassl_settings",
        "dataset_settings",
        "transduction_settings",
        "datasets",
    ),
    ("functional", "utils", "engine", "mini", "compat"),
)
LEVEL = {room: -number for number, floor in enumerate(FLOORS) for room in floor}
OUTSIDE = ("train", "prepare", "scripts", "trainers", "datasets", "benchmarks", "compat")  # of the library
ALL = [*LIBRARY, *ENTRIES, *(path for room in OUTSIDE for path in sorted((ROOT / room).rglob("*.py")))]
# What a module may need when it runs, not when it is imported.
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
    "ray",
    "gradio",
    "starlette",
}


def room(module: str) -> str:
    """The room of one of our modules; empty where it is not ours, or is the public API `air_plugin` itself."""
    if module.startswith(("scripts.compose", "scripts.identity")):
        return "compose"
    first, _, rest = module.partition(".")
    if first == "air_plugin":
        name = rest.split(".")[0]
        return "" if name.startswith("__") else name
    return first if first in OUTSIDE else ""


def upward(imports: Mapping[str, Iterable[str]]) -> list[str]:
    """Of modules with what they import, the imports that point to a higher floor."""
    return [
        f"{module} imports {name}"
        for module, names in imports.items()
        for name in names
        if room(module) and room(name) and LEVEL[room(name)] > LEVEL[room(module)]
    ]


def circle(graph: Mapping[str, set[str]]) -> set[str]:
    """The nodes that lie in circles, or behind one."""
    left = {node: below & graph.keys() - {node} for node, below in graph.items()}
    while leaves := {node for node, below in left.items() if not below & left.keys()}:
        left = {node: below for node, below in left.items() if node not in leaves}
    return set(left)


def offenders(paths: list[Path], forbidden: set[str]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in paths
        for name in sorted(imports_of(path))
        if name.split(".")[0] in forbidden
    ]


def python_below(folder: str) -> list[Path]:
    paths = sorted((ROOT / folder).rglob("*.py"))
    assert len(paths) > 3
    return paths


# The checks themselves


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


@pytest.mark.parametrize(
    ("module", "name", "wrong"),
    [
        ("air_plugin.clip.prompts", "air_plugin.diffusion.lora", True),
        ("air_plugin.utils.store", "air_plugin.config", True),
        ("air_plugin.mixin", "air_plugin.cli", True),
        ("air_plugin.inference.bundle", "trainers.air", True),
        ("datasets.folder", "trainers.cpl.CPL", True),
        ("benchmarks.em", "train.main", True),
        ("air_plugin.report.page", "air_plugin.config.flatten", False),
        ("trainers.air", "air_plugin.mixin", False),
        ("train", "datasets.folder", False),
        ("air_plugin.utils.provenance", "air_plugin.__version__", False),
        ("air_plugin.clip.loading", "open_clip", False),
    ],
)
def test_a_step_upwards_is_found(module: str, name: str, wrong: bool):
    assert bool(upward({module: [name]})) is wrong


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == {"a", "b", "c"}
    assert circle({"a": {"b", "c"}, "b": {"c", "elsewhere"}, "c": set()}) == set()


# The house


def test_every_room_stands_on_a_floor():
    names = {room(module_name(path)) for path in ALL} - {""}
    assert names == LEVEL.keys()


def test_readme_shows_every_room():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (tree,) = re.findall(r"^train\.py .*?(?=^```)", readme, re.MULTILINE | re.DOTALL)
    shown = {name for line in tree.splitlines() for name in re.findall(r"(\w+)(?:/|\.py)", line[:24])}
    within = {
        "settings",
        "former_settings",
        "dassl_settings",
        "dataset_settings",
        "transduction_settings",
        "merging",
        "compose",
    }  # parts of config, and of scripts
    assert shown - {"air_plugin", "configs", "tests"} == LEVEL.keys() - within


def test_nothing_imports_upwards():
    assert len(ALL) > 90
    assert not upward({module_name(path): imports_of(path) for path in ALL})


def test_rooms_import_one_another_in_no_circle():
    graph: dict[str, set[str]] = {name: set() for name in LEVEL}
    for path in ALL:
        if room(module_name(path)):
            graph[room(module_name(path))] |= {room(name) for name in imports_of(path)} - {""}
    assert {"clip", "diffusion", "functional"} <= graph["auxiliary"]  # the graph is not empty
    assert not circle(graph)


def test_modules_import_one_another_in_no_circle():
    graph = {module_name(path): early_imports_of(path) for path in ALL}
    assert any(name.startswith("air_plugin.utils.") for name in graph["air_plugin.clip.features"])
    assert not circle(graph)


def test_the_library_never_imports_what_uses_it():
    assert len(LIBRARY) > 20
    assert not offenders(LIBRARY, {"dassl", "tests", *OUTSIDE})


def test_the_stand_in_for_dassl_imports_nothing_of_ours():
    assert not offenders(python_below("compat"), {"air_plugin", "tests", *OUTSIDE} - {"compat"})


def test_trainers_and_data_sets_do_not_import_each_other():
    assert not offenders(python_below("trainers"), {"datasets", "train", "prepare", "scripts", "tests"})
    assert not offenders(python_below("datasets"), {"trainers", "train", "prepare", "scripts", "tests"})


def test_formulas_import_nothing_of_ours_but_each_other():
    for path in python_below("air_plugin/functional"):
        rooms = {name.split(".")[1] for name in imports_of(path) if name.startswith("air_plugin.")}
        assert rooms <= {"functional"}, path.name


def test_large_packages_are_imported_where_they_are_needed():
    for path in LIBRARY:
        if "training" not in path.parts:  # `python -m air_plugin.mini.training` needs them all
            early = {name.split(".")[0] for name in early_imports_of(path)}
            allowed = {"sklearn"} if path.parent.name == "estimator" else set()  # its base classes
            assert early & LATE <= allowed, path.relative_to(ROOT)
