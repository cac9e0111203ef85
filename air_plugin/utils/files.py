"""Files: written whole or not at all, known by their content, and those of images found."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterable
from pathlib import Path

from air_plugin.utils.errors import UserError


def write_atomically(path: Path, data: bytes, *, durable: bool = False) -> None:
    """Write a file completely or not at all.

    Args:
        path: of the file; its folder is created.
        data: the content.
        durable: return only when the disk has stored it (fsync).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")  # mkstemp would forbid others to read it
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


def digest(data: bytes) -> str:
    """SHA-256 of some bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def digest_files(paths: Iterable[str | os.PathLike[str]]) -> str:
    """SHA-256 over the contents of files in their order; names and folders do not matter.

    Raises:
        UserError: a file cannot be read.
    """
    total = hashlib.sha256()
    for path in paths:
        try:
            total.update(hashlib.sha256(Path(path).read_bytes()).digest())
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
    return total.hexdigest()
