"""Files: written whole or not at all, and known by their content."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import uuid
from pathlib import Path

from air_plugin.utils.errors import UserError

FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")  # how formulas begin; four are full-width


def write_atomically(path: Path, data: bytes, *, durable: bool = False) -> None:
    """Write a file completely or not at all.

    Args:
        path: of the file; its folder is created.
        data: the content.
        durable: return only when the disk has stored it (fsync).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")  # mkstemp would forbid others to read it
    try:
        with open(temporary, "wb") as file:
            file.write(data)
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


def digest(data: bytes) -> str:
    """SHA-256 of some bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()
