"""Image transforms by name."""

from typing import Any

from . import transforms
from .transforms import build_transform

__all__ = ["INTERPOLATION_MODES", "build_transform"]


def __getattr__(name: str) -> Any:
    return getattr(transforms, name)
