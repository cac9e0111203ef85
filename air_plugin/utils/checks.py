"""Checks at the edge: each names the key and the value that is wrong."""

from __future__ import annotations

from string import Formatter
from typing import Any, get_args

from air_plugin.utils.errors import UserError


def require(condition: bool, key: str, value: object, what: str) -> None:
    if not condition:
        raise UserError(f"{key} is {value}; it must be {what}")


def require_choice(key: str, value: str, choices: Any) -> None:
    """Raise a UserError that names a config key whose value is none of a Literal's."""
    require(value in get_args(choices), key, repr(value), f"one of {', '.join(get_args(choices))}")


def require_range(key: str, value: float, low: float, high: float) -> None:
    """Raise a UserError that names a config key whose value is not in [low, high]."""
    require(low <= value <= high, key, value, f"in [{low}, {high}]")


def require_template(key: str, value: str) -> None:
    """Raise a UserError that names a config key whose value is no text with one {} in it."""
    try:
        fields = [field for _, field, _, _ in Formatter().parse(value) if field is not None]
    except (ValueError, TypeError):  # a brace without its partner; no text
        fields = []
    require(fields == [""], key, repr(value), "a template with one {} for the class name")
