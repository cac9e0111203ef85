"""Files: written whole or not at all, and known by their content."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from air_plugin.utils.errors import UserError

FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")  # how formulas begin; four are full-width


def write_atomically(path: Path, data: bytes, *, durable: bool = False) -> None:
    """Write a file completely or not at all.

    Args:
        path: of the file; its folder is created.
        data: the content.
        durable: return only when the disk has stored it (fsync).
    """
    with written_atomically(path, durable=durable) as file:
        file.write(data)


@contextlib.contextmanager
def written_atomically(path: Path, *, durable: bool = False) -> Iterator[BinaryIO]:
    """A file to write to; it is at `path` when the block ends, and gone where the block fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")  # mkstemp would forbid others to read it
    try:
        with open(temporary, "wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def require_writable(path: Path, what: str, *, folder: bool = False) -> None:
    """Check that a file or folder can be written, before any work is done for it. Missing parents are made.

    Args:
        path: of the file, which need not exist; an existing one is not changed.
        what: it is for a person, for instance "--csv".
        folder: it is a folder, in which files will be written.

    Raises:
        UserError: it cannot be written; the message says why.
    """
    home = path if folder else path.parent
    probe = home / f".{uuid.uuid4().hex}.tmp"
    try:
        if folder:
            str(path).encode()  # tensorboard and torch take no other names
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISDIR(os.stat(path).st_mode) != folder:  # raises for a name that is too long
                raise OSError(0, "it is a file" if folder else "it is a folder")
        home.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except UnicodeEncodeError as error:
        raise UserError(f"{what} is {path}, which is not UTF-8; choose another") from error
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; choose another {what}") from error


def csv_text(text: str) -> str:
    """A text as a cell of a CSV file: no spreadsheet runs it as a formula.

    Example:
        >>> csv_text("=1+1"), csv_text("cat")
        ("'=1+1", 'cat')
    """
    return f"'{text}" if text.lstrip().startswith(FORMULA) else text


def to_json(value: Any, **options: Any) -> str:
    """A value as JSON; `options` are json.dumps's.

    Raises:
        ValueError: it holds NaN or infinity, which are no JSON; the message names the first one.

    Example:
        >>> to_json({"accuracy": 0.5})
        '{"accuracy": 0.5}'
    """
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError as error:
        raise ValueError(f"{_first_not_finite(value) or 'a value'} is no JSON: {error}") from error


def _first_not_finite(value: Any, name: str = "") -> str:
    """The place of the first number that is NaN or infinite; empty where there is none."""
    if isinstance(value, float):
        return "" if math.isfinite(value) else f"{name or 'the value'} {value}"
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    found = (_first_not_finite(part, f"{name}.{key}" if name else str(key)) for key, part in items)
    return next(filter(None, found), "")


def digest(data: bytes) -> str:
    """SHA-256 of some bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def file_digest(path: Path) -> str:
    """`digest` of a file's content, which may be larger than memory."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()
