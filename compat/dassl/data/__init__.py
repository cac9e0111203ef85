"""Data sets, transforms, loaders. The loaders are imported when somebody asks for them: they need torch."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .data_manager import DataManager, DatasetWrapper

__all__ = ["DataManager", "DatasetWrapper"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from . import data_manager

        return getattr(data_manager, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
