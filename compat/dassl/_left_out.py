"""Clear errors for what the stand-in does not have."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from typing import Any

UPSTREAM = "https://github.com/KaiyangZhou/Dassl.pytorch"


def left_out(what: str) -> str:
    """The message for something that upstream has and the stand-in has not."""
    return f"{what} is left out of AiR's stand-in for Dassl; install Dassl.pytorch for it: {UPSTREAM}"


class _MissingModules(MetaPathFinder):
    """The last of the finders: a module below `package` that reaches it was not found by the others.

    Python also asks for a module where `from package import name` finds no attribute of that name, so that
    this covers missing functions and classes of packages, too. The error carries no `name`: Python would
    swallow it.
    """

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname.startswith(self.package + "."):
            raise ModuleNotFoundError(left_out(fullname))


def refuse_missing_modules(package: str) -> None:
    """Let an import of what `package` does not have fail with a message: what is missing, and where to get it."""
    sys.meta_path.append(_MissingModules(package))


def refuse_names(module: str, *names: str) -> Callable[[str], Any]:
    """The same for a module that is a single file: its `__getattr__`, which refuses `names`.

    It raises ImportError, since `from module import name` would replace an AttributeError's message by its
    own. Names that upstream does not have either get the usual AttributeError, so that `hasattr` works.
    """

    def module_getattr(name: str) -> Any:
        if name in names:
            raise ImportError(left_out(f"{module}.{name}"))
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return module_getattr
