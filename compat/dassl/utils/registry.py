"""Names for classes and functions."""

from __future__ import annotations

from typing import Any


class Registry:
    """Maps the names of classes or functions to themselves.

    Use `@REGISTRY.register()` over a definition, or `REGISTRY.register(thing)`.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._obj_map: dict[str, Any] = {}

    def register(self, obj: Any = None, force: bool = False) -> Any:
        """Register obj, or return the decorator that registers; `force` allows to replace a name."""
        if obj is not None:
            self._add(obj, force)
            return None

        def decorator(thing: Any) -> Any:
            self._add(thing, force)
            return thing

        return decorator

    def _add(self, obj: Any, force: bool) -> None:
        name = obj.__name__
        if name in self._obj_map and not force:
            raise KeyError(f"{name!r} is already registered in {self._name}")
        self._obj_map[name] = obj

    def get(self, name: str) -> Any:
        """The class or function of that name."""
        if name not in self._obj_map:
            raise KeyError(f"{name!r} is not registered in {self._name}; available: {sorted(self._obj_map)}")
        return self._obj_map[name]

    def registered_names(self) -> list[str]:
        """All names, in the order of their registration."""
        return list(self._obj_map)
