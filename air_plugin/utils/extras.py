"""Packages that only some commands need: the extras of pyproject.toml, and one message where they are missing."""

from __future__ import annotations

from importlib.util import find_spec

from air_plugin.utils.errors import UserError

# Extra -> {name to import: name to install}.
_REPORT = {
    "jinja2": "jinja2",
    "markupsafe": "markupsafe",
    "matplotlib": "matplotlib",
    "scipy": "scipy>=1.15",
    "tabulate": "tabulate",
}
EXTRAS = {
    "report": _REPORT,
    "train": {**_REPORT, "rich": "rich>=13", "tensorboard": "tensorboard"},
    "onnx": {"onnx": "onnx", "onnxruntime": "onnxruntime", "onnxscript": "onnxscript"},
    "demo": {"gradio": "gradio>=6", "starlette": "starlette"},
    "ray": {"ray": "ray>=2.40"},
}


def require_extra(extra: str, *, purpose: str) -> None:
    """Raise an error with the command to run where a package of an extra is missing.

    Args:
        extra: a key of EXTRAS.
        purpose: what the packages are for, the first words of the message.

    Raises:
        UserError: a package is missing.

    Example:
        >>> require_extra("report", purpose="air report")
    """
    missing = [package for module, package in EXTRAS[extra].items() if find_spec(module) is None]
    if missing:
        packages = " ".join(f"'{package}'" if ">" in package else package for package in missing)
        raise UserError(
            f"{purpose} needs packages that are not installed; run: pip install {packages}  (extra: {extra})"
        )
