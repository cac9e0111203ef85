"""Habits: short files and functions, no prints in the library, no pickles, no swallowed faults."""

from __future__ import annotations

import ast

import pytest
from sources import LIBRARY, OURS, ROOT, imports_of, tree_of

LONGEST_FILE, LONGEST_FUNCTION = 350, 60
# These print: the command line, its one line of error, the handler that shows what the library logs, and the commands
# `python -m air_plugin.config` and `python -m air_plugin.mini.training`.
PRINT = {
    *(path.relative_to(ROOT).as_posix() for path in (ROOT / "air_plugin" / "cli").glob("*.py")),
    "air_plugin/config.py",
    "air_plugin/utils/errors.py",
    "air_plugin/utils/logs.py",
    *(path.relative_to(ROOT).as_posix() for path in (ROOT / "air_plugin" / "mini" / "training").glob("*.py")),
}


def too_long(source: str) -> list[str]:
    """What is too long of a file: itself, or functions of it by name."""
    lines = len(source.splitlines())
    functions = [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > LONGEST_FUNCTION
    ]
    return [f"{lines} lines"] * (lines > LONGEST_FILE) + functions


def calls_of(tree: ast.AST, *names: str) -> list[int]:
    """The lines in which functions of these names are called."""
    return [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) in names]


def swallowed(tree: ast.AST) -> list[int]:
    """The lines of handlers that catch everything, or any Exception without a word."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            silent = all(isinstance(statement, (ast.Pass, ast.Continue)) for statement in node.body)
            kind = "" if node.type is None else ast.unparse(node.type)
            if not kind or (silent and kind in ("Exception", "BaseException")):
                lines.append(node.lineno)
    return lines


# The checks themselves


def test_what_is_too_long_is_found():
    body = "    pass\n"
    assert too_long("x = 1\n" * LONGEST_FILE) == [] == too_long("def f():\n" + body * (LONGEST_FUNCTION - 1))
    assert too_long("x = 1\n" * (LONGEST_FILE + 1)) == [f"{LONGEST_FILE + 1} lines"]
    method = "class A:\n    async def g(self):\n" + "    " + (body + "    ") * LONGEST_FUNCTION
    assert too_long(method.rstrip() + "\n") == [f"g: {LONGEST_FUNCTION + 1} lines"]


@pytest.mark.parametrize(
    ("handler", "wrong"),
    [
        ("except: log()", True),
        ("except Exception: pass", True),
        ("except Exception: log()", False),
        ("except KeyError: pass", False),
    ],
)
def test_a_swallowed_fault_is_found(handler: str, wrong: bool):
    assert swallowed(ast.parse(f"try:\n    run()\n{handler}")) == ([3] if wrong else [])


def test_a_print_is_found():
    assert calls_of(ast.parse("def f():\n    print(1)\nfingerprint()"), "print") == [2]


# The habits


def test_files_and_functions_are_short():
    found = {str(path.relative_to(ROOT)): too_long(path.read_text(encoding="utf-8")) for path in OURS}
    assert len(found) > 80 and not {path: faults for path, faults in found.items() if faults}


def test_the_library_logs_and_the_command_line_prints():
    printing = {path.relative_to(ROOT).as_posix() for path in LIBRARY if calls_of(tree_of(path), "print")}
    assert "air_plugin/cli/report.py" in printing and printing <= PRINT


def test_no_line_is_exempt_from_the_formatter():
    exempt = "fmt: " + "skip"
    others = [path for folder in ("tests", "benchmarks", "compat") for path in (ROOT / folder).rglob("*.py")]
    for path in [*OURS, *others]:
        assert exempt not in path.read_text(encoding="utf-8"), path.relative_to(ROOT)


def test_no_pickles_are_read():
    for path in LIBRARY:
        # Messages of our own worker processes, in memory; spread.py only asks whether something can be sent.
        allowed = {"pickle"} if path.name in ("units.py", "spread.py") else set()
        assert path.name == "units.py" or not calls_of(tree_of(path), "pickle.load", "pickle.loads")
        found = imports_of(path) & {"torch.load", "pickle", "joblib", "dill", "shelve"}
        assert found <= allowed, path.relative_to(ROOT)
        if path.name != "train_vit.py":  # its checkpoints have an optimiser; of these it reads tensors only
            assert not calls_of(tree_of(path), "torch.load"), path.relative_to(ROOT)
        if path.name != "openai_archive.py":  # opens files of a known SHA-256 alone: unit/clip/test_backbone.py
            assert not calls_of(tree_of(path), "torch.jit.load"), path.relative_to(ROOT)
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Call):
                words = {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert "allow_pickle" not in words, f"{path.name}:{node.lineno}"
                assert ast.unparse(node.func) != "torch.load" or words["weights_only"] == "True", path.name


def test_no_fault_is_swallowed():
    for path in [*OURS, *(ROOT / "compat").rglob("*.py")]:
        assert swallowed(tree_of(path)) == [], path.relative_to(ROOT)


def test_methods_are_thin_and_listed():
    from dassl.data.datasets import DATASET_REGISTRY
    from dassl.engine import TRAINER_REGISTRY

    from scripts.compose import register_all

    methods = {path.stem: path for path in (ROOT / "trainers").glob("*.py")}
    assert methods.pop("__init__").read_text() == ""
    shared = ("prompt_trainer", "prompt_step", "prompted_models", "self_training", "labelled", "fused_heads", "tables")
    assert all(methods.pop(name) for name in (*shared, "resuming", "transduction", "evaluation"))
    register_all("trainers")
    kinds = [TRAINER_REGISTRY.get(name) for name in TRAINER_REGISTRY.registered_names()]
    assert methods.keys() <= {kind.__module__.removeprefix("trainers.") for kind in kinds}
    assert all(len(path.read_text().splitlines()) <= 120 for path in methods.values())
    others = {
        "__init__",
        "base",
        "published",
        "splits",
        "sources",
        "download",
        "archives",
        "class_folders",
        "paradigms",
        "incomplete",
        "drive",
    }
    register_all("datasets")
    kinds = [DATASET_REGISTRY.get(name) for name in DATASET_REGISTRY.registered_names()]
    sets = {kind.__module__.removeprefix("datasets.") for kind in kinds}
    assert {path.stem for path in (ROOT / "datasets").glob("*.py")} - others <= sets
    assert (ROOT / "datasets" / "__init__.py").read_text() == ""
