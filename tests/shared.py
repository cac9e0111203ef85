"""What is made once a session, whichever worker needs it first."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


def make_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """A folder that `make` fills; other workers wait for it. Its files are for reading only from then on."""
    ready = folder.with_name(f"{folder.name}.ready")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not ready.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            set_writable(folder, False)
            ready.touch()
    return folder


def set_writable(folder: Path, writable: bool) -> None:
    """Allow or forbid changes to all files below a folder (the superuser may change them all the same)."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            os.chmod(path, 0o644 if writable else 0o444)


def copy_to_change(folder: Path, target: Path, *changed: str) -> Path:
    """A copy in which these files may be changed or damaged; the others are links to the originals."""
    shutil.copytree(folder, target, copy_function=os.link)
    for name in changed:
        (target / name).unlink()
        (target / name).write_bytes((folder / name).read_bytes())
    return target
