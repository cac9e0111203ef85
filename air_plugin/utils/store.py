"""Artifacts on disk: keyed by what made them, atomic, locked, and verified when they are opened.

An artifact is a folder `<root>/<kind>/<key>/`. Its key is the SHA-256 of the settings that made it, among which are the
keys of its parents, so a change anywhere upstream leads to another folder. `entry.json`, written last, names every file
with its checksum: a folder without it is unfinished work, to be resumed by whoever made it.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_safetensors
from torch import Tensor

from air_plugin.utils.files import digest, write_atomically

log = logging.getLogger(__name__)

MARK = "entry.json"


def key_of(settings: Mapping[str, Any]) -> str:
    """The key of an artifact: 16 hexadecimal digits of its settings' SHA-256."""
    return digest(json.dumps(settings, sort_keys=True).encode())[:16]


@dataclass
class Entry:
    """One artifact's folder, held under its lock."""

    path: Path
    settings: dict[str, Any]
    complete: bool

    @property
    def key(self) -> str:
        return self.path.name

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of a file of a complete artifact."""
        return load_safetensors((self.path / name).read_bytes())

    def finish(self, names: list[str]) -> None:
        """Mark the artifact as complete.

        Args:
            names: its files, relative to its folder; any other file is work in progress and is removed.
        """
        files = {name: digest((self.path / name).read_bytes()) for name in names}
        mark = {"settings": self.settings, "files": files}
        write_atomically(self.path / MARK, json.dumps(mark, indent=1, sort_keys=True).encode(), durable=True)
        self.complete = True
        for path in sorted(self.path.rglob("*"), reverse=True):
            relative = path.relative_to(self.path).as_posix()
            if path.is_file() and relative != MARK and relative not in files:
                path.unlink()


class Store:
    """A folder of artifacts that several runs may share at once."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    @contextmanager
    def open(self, kind: str, settings: Mapping[str, Any]) -> Iterator[Entry]:
        """Hold one artifact: complete and verified, or to be made (or resumed) in `entry.path`.

        Args:
            kind: what it is, for instance "features"; the folder that it lies in.
            settings: everything that decides its content, JSON values only.
        """
        from filelock import FileLock

        plain = json.loads(json.dumps(settings))
        path = self.root / kind / key_of(plain)
        path.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            for stale in path.glob(".*.tmp"):  # of a writer that was killed
                stale.unlink()
            fault = _fault(path, plain)
            if fault:
                log.info("cache: %s is thrown away and made again: %s", path, fault)
                shutil.rmtree(path)
                path.mkdir()
            yield Entry(path, plain, complete=(path / MARK).exists())


def _fault(path: Path, settings: dict[str, Any]) -> str | None:
    """What is wrong with an artifact that says it is complete; None where nothing is, or where it is unfinished."""
    try:
        mark = json.loads((path / MARK).read_text())
        if mark["settings"] != settings:
            return "its settings are not those of its key"
        for name, expected in mark["files"].items():
            if not (path / name).is_file():
                return f"{name} is missing"
            if digest((path / name).read_bytes()) != expected:
                return f"the content of {name} does not match its key"
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MARK} is damaged"
    return None
