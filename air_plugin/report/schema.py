"""JSON to dataclasses and back. Each value is checked once, against the annotation of its field.

Annotations may be `str`, `bool`, `int`, `float`, `X | None`, `Literal`, `tuple[X, ...]`, `tuple[X, Y]`, `dict[str, X]`,
numpy arrays of one dimension, other dataclasses and `Any`. `Annotated[X, Rule]` adds a condition. A field whose name
ends in an underscore has a key without it (`lambda_`); a field with the metadata `stored=False` is not in the file, one
with OPTIONAL only where it is not None.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

from air_plugin.utils.errors import UserError

T = TypeVar("T")
OPTIONAL = {"optional": True}
LARGE = 1e12  # no count and no lambda is larger, and every plot can hold it
BASIC = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}


class Invalid(ValueError):
    """A value that its field does not accept; the message is one line and names both."""


@dataclass(frozen=True)
class Rule:
    """A condition of a value. what: the accepted values in words, for the message."""

    what: str
    holds: Callable[[Any], bool]


def between(low: float, high: float) -> Rule:
    """A finite number from `low` to `high`."""
    return Rule(f"a number from {low:g} to {high:g}", lambda value: low <= value <= high)  # false for NaN


def is_line(value: Any) -> bool:
    """Text that cannot break a table or a terminal: no control characters, no half of a surrogate pair."""
    return isinstance(value, str) and not re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", value)


Line = Annotated[str, Rule("one line of text", is_line)]
Count = Annotated[int, between(0, LARGE)]
Number = Annotated[float, between(0, LARGE)]
Percent = Annotated[float, between(0, 100)]
Indices = Annotated[np.ndarray, Rule("a list of whole numbers", lambda a: a.dtype.kind == "i")]
Shares = Annotated[
    np.ndarray,
    Rule("a list of numbers from 0 to 1", lambda a: a.dtype.kind in "if" and bool(((a >= 0) & (a <= 1)).all())),
]


def load(kind: type[T], path: Path, *, upgrade: Callable[[dict[str, Any]], dict[str, Any]]) -> T:
    """The dataclass that a JSON file holds.

    Args:
        kind: a dataclass with a field `format`.
        path: the file.
        upgrade: makes the present form of a file that has no `format`, which is from before there was one.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: the file cannot be read, or a value in it is wrong.
    """
    data = read_json(path)
    if isinstance(data, dict) and "format" not in data:
        data = upgrade(data)
    try:
        return read(kind, data)
    except Invalid as error:
        raise UserError(f"{path} is damaged, or another program wrote it: {error}") from error


def read_json(path: Path) -> Any:
    """The content of a JSON file; FileNotFoundError passes, every other fault is a UserError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if path.is_symlink():
            raise UserError(f"{path} cannot be read: it links to nothing") from None
        raise
    except RecursionError as error:
        raise UserError(f"{path} cannot be read: it is nested too deeply") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def read(kind: Any, value: Any, *, name: str = "") -> Any:
    """A JSON value as the type that an annotation names.

    Keys that no field has are ignored. null stands for a field's default where the field has one.

    Args:
        kind: a dataclass or another annotation, see above.
        value: what json.loads returned; tuples count as lists.
        name: what messages call the value.

    Raises:
        Invalid: a value has another type or is out of its range.
    """
    origin, parts = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin is Annotated:
        found = read(parts[0], value, name=name)
        for rule in parts[1:]:
            _require(rule.holds(found), name, value, rule.what)
        return found
    if origin in (Union, UnionType):  # X | None
        return None if value is None else read(parts[0], value, name=name)
    if origin is Literal:
        _require(value in parts, name, value, " or ".join(map(str, parts)))
        return value
    if is_dataclass(kind):
        return _read_dataclass(kind, value, name)
    if origin is dict:
        _require(isinstance(value, dict), name, value, "a mapping")
        keys = (read(parts[0], key, name=f"key of {name}") for key in value)
        return {key: read(parts[1], value[key], name=_join(name, key)) for key in keys}
    if origin is tuple:
        _require(isinstance(value, (list, tuple)), name, value, "a list")
        kinds = parts[:1] * len(value) if parts[-1] is ... else parts
        _require(len(kinds) == len(value), name, value, f"a list of {len(kinds)} values")
        return tuple(read(kinds[i], part, name=f"{name}[{i}]") for i, part in enumerate(value))
    if kind is np.ndarray:
        return _read_array(value, name)
    return _read_basic(kind, value, name)


def _read_dataclass(kind: Any, value: Any, name: str) -> Any:
    _require(isinstance(value, dict), name, value, "a mapping")
    found = {}
    for field, annotation in _stored(kind):
        key = field.name.rstrip("_")
        has_default = field.default is not MISSING or field.default_factory is not MISSING
        if has_default and value.get(key) is None:
            continue
        if key not in value:
            raise Invalid(f"it has no {_join(name, key)}")
        found[field.name] = read(annotation, value[key], name=_join(name, key))
    return kind(**found)


@cache
def _stored(kind: Any) -> list[tuple[Field[Any], Any]]:
    """The fields of a dataclass that are in its file, with their annotations."""
    annotations = get_type_hints(kind, include_extras=True)
    return [(field, annotations[field.name]) for field in fields(kind) if field.metadata.get("stored", True)]


def _read_array(value: Any, name: str) -> np.ndarray:
    _require(isinstance(value, (list, tuple)), name, value, "a list")
    try:
        array = np.asarray(value)
    except (OverflowError, ValueError):  # lists of several lengths
        array = np.zeros((0, 0))
    _require(array.ndim == 1, name, value, "a list of numbers")
    return array


def _read_basic(kind: Any, value: Any, name: str) -> Any:
    accepted = (int, float) if kind is float else kind
    right = isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))
    _require(right, name, value, BASIC[kind])
    try:
        return kind(value)
    except OverflowError:
        raise _fault(name, value, BASIC[kind]) from None


def _require(condition: bool, name: str, value: Any, what: str) -> None:
    if not condition:
        raise _fault(name, value, what)


def _fault(name: str, value: Any, what: str) -> Invalid:
    return Invalid(f"{f'its {name}' if name else 'it'} is {reprlib.repr(value)}; it must be {what}")


def _join(name: str, key: str) -> str:
    """heads, text -> heads.text; a key that is no plain word is quoted."""
    if not re.fullmatch(r"[\w-]+", key):
        return f"{name}[{reprlib.repr(key)}]"
    return f"{name}.{key}" if name else key


def plain(value: Any) -> Any:
    """A dataclass as values that json.dumps takes; the inverse of `read`."""
    kind: Any = type(value)
    if is_dataclass(value):
        found = ((field, getattr(value, field.name)) for field, _ in _stored(kind))
        kept = ((field, part) for field, part in found if part is not None or not field.metadata.get("optional"))
        return {field.name.rstrip("_"): plain(part) for field, part in kept}
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return value.tolist() if isinstance(value, np.ndarray) else value
