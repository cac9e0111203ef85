"""What checkpoints belong to: a run goes on only from those of the same trainer, seed, images and classes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from air_plugin.utils.errors import UserError
from air_plugin.utils.files import to_json, write_atomically

MARK = "trained_on.json"  # beside the checkpoints


def has_checkpoint(folder: Path, models: Iterable[str]) -> bool:
    """Whether there is a checkpoint of every model."""
    return all((folder / model / "checkpoint").is_file() for model in models)


def require_same(folder: Path, identity: Mapping[str, Any]) -> None:
    """Raise a UserError where the checkpoints in a folder are of another run; older versions wrote no identity."""
    try:
        found = json.loads((folder / MARK).read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return
    if not isinstance(found, dict):
        return
    other = [name for name, value in identity.items() if name in found and found[name] != value]
    if other:
        changes = ", ".join(
            f"{name} {found[name]} (now {identity[name]})" if isinstance(identity[name], int) else f"other {name}"
            for name in other
        )
        raise UserError(
            f"{folder} holds checkpoints of another run: {changes}; choose another --output-dir or remove it"
        )


def write_identity(folder: Path, identity: Mapping[str, Any]) -> None:
    """Note what the checkpoints of a folder will be of."""
    write_atomically(folder / MARK, to_json(dict(identity), indent=1, sort_keys=True).encode(), durable=True)
