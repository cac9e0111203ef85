"""Our own Python sources, as text and as syntax trees, for the tests of structure and style."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = sorted((ROOT / "air_plugin").rglob("*.py"))
FOLDERS = ("air_plugin", "trainers", "datasets", "scripts")
ENTRIES = [ROOT / "train.py", ROOT / "prepare.py"]
OURS = [*(path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))), *ENTRIES]


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


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
    return set(imported(tree_of(path), module_name(path), is_package=path.name == "__init__.py"))


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
    package = path.name == "__init__.py"
    statements = at_import_time(tree_of(path).body)
    return {name for node in statements for name in imported(node, module_name(path), is_package=package)}
