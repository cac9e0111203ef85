"""Artifacts on disk: keyed by their settings, written atomically, locked, and verified when they are opened.

An artifact is a folder `<root>/<kind>/<key>/`. Its key is the SHA-256 of its settings, which include the keys of its
parents, so every change upstream leads to another folder. `entry.json`, written last, lists all files with their
checksums: a folder without it is unfinished work that can be resumed.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_safetensors
from torch import Tensor

from air_plugin.utils.digests import FILE
from air_plugin.utils.errors import UserError
from air_plugin.utils.files import digest, file_digest, to_json, write_atomically
from air_plugin.utils.tables import LARGE, map_tensors

log = logging.getLogger(__name__)

MARK = "entry.json"
LONG = 3600.0  # seconds; nobody writes a single file for so long


def key_of(settings: Mapping[str, Any]) -> str:
    """The key of an artifact: the first 16 hexadecimal digits of the SHA-256 of its settings."""
    return digest(to_json(settings, sort_keys=True).encode())[:16]


@dataclass
class Entry:
    """The locked folder of an artifact.

    path: the folder.
    settings: which determine its content.
    complete: whether all its files exist; `finish` sets it.
    """

    path: Path
    settings: dict[str, Any]
    complete: bool

    @property
    def key(self) -> str:
        return self.path.name

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of a file of a complete artifact; above `LARGE` bytes, memory-mapped and read-only."""
        path = self.path / name
        return map_tensors(path) if path.stat().st_size > LARGE else load_safetensors(path.read_bytes())

    def finish(self, names: list[str]) -> None:
        """Mark the artifact as complete.

        Args:
            names: its files, relative to its folder; all other files are work in progress and are removed.
        """
        files = {name: file_digest(self.path / name) for name in names}
        mark = {"settings": self.settings, "files": files}
        write_atomically(self.path / MARK, to_json(mark, indent=1, sort_keys=True).encode(), durable=True)
        self.complete = True
        for path in sorted(self.path.rglob("*"), reverse=True):
            relative = path.relative_to(self.path).as_posix()
            if path.is_file() and relative != MARK and relative not in files:
                path.unlink()


class NotStored(UserError):
    """A store that is only read has no such artifact."""


class Store:
    """A folder of artifacts that several runs may use at the same time.

    read_only: what is not there is not made: `open` raises NotStored. Evaluation uses such a store.

    Example:
        >>> with Store("output/cache").open("squares", {"recipe": 1, "n": 3}) as entry:
        ...     if not entry.complete:
        ...         save_tensors(entry.path / "squares.safetensors", {"x": torch.arange(3) ** 2})
        ...         entry.finish(["squares.safetensors"])
        ...     squares = entry.tensors("squares.safetensors")["x"]
    """

    def __init__(self, root: str | Path, *, read_only: bool = False) -> None:
        self.root, self.read_only = Path(root), read_only

    @property
    def digests(self) -> Path:
        """The file of the digests of images, for `content_digest`."""
        return self.root / FILE

    @contextmanager
    def open(self, kind: str, settings: Mapping[str, Any], *, grows: bool = False) -> Iterator[Entry]:
        """Lock an artifact: complete and verified, or to be made (or resumed) in `entry.path`.

        Args:
            kind: of the artifact, for instance "features"; the name of the folder above it.
            settings: everything that determines its content; JSON values only.
            grows: it is never complete, as the folder of images, and is opened in a read-only store, too. Others may
                work in it after the lock is left.

        Raises:
            NotStored: the store is only read, and the artifact is not there or unfinished.
        """
        from filelock import FileLock

        plain = json.loads(to_json(settings))
        path = self.root / kind / key_of(plain)
        if self.read_only and not (path if grows else path / MARK).exists():
            raise NotStored(f"{self.root} has no {kind} of these settings, classes and images")
        path.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            for stale in path.glob(".*.tmp"):  # of a process that was killed
                if not grows or time.time() - stale.stat().st_mtime > LONG:
                    stale.unlink()
            fault = _fault(path, plain)
            if fault and self.read_only:
                raise NotStored(f"{path} in the store is damaged: {fault}")
            if fault:
                log.info("cache: %s is thrown away and made again: %s", path, fault)
                shutil.rmtree(path)
                path.mkdir()
            yield Entry(path, plain, complete=(path / MARK).exists())


def _fault(path: Path, settings: dict[str, Any]) -> str | None:
    """The fault of an artifact that is marked as complete; None where there is none, or where it is unfinished."""
    try:
        mark = json.loads((path / MARK).read_text())
        if mark["settings"] != settings:
            return "its settings are not those of its key"
        for name, expected in mark["files"].items():
            if not (path / name).is_file():
                return f"{name} is missing"
            if file_digest(path / name) != expected:
                return f"the content of {name} does not match its key"
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MARK} is damaged"
    return None
