"""Titles of rows: the trainer, and what tells its rows apart (`AiR, M = 240`)."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from air_plugin.report.record import RunResult

Cell = tuple[str, str]  # trainer, config
OPTION = r"[A-Z][A-Z0-9_]*(\.[A-Z][A-Z0-9_]*)*=.*"
CUT = r".{90}-[0-9a-f]{8}"  # a config's name that was too long
LONGEST = 40  # characters of a value


def plain_title(cell: Cell) -> str:
    """Trainer and config, which always tell two rows apart.

    Example:
        >>> plain_title(("AiR", "mini+AIR.M=240"))
        'AiR (mini+AIR.M=240)'
    """
    return f"{cell[0]} ({cell[1]})"


@dataclass
class _Config:
    """A config's name in its parts.

    files: those of the config. named: values by key, as in the name. settings: every value by key, or empty.
    """

    files: str
    named: dict[str, str]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def value(self, key: str) -> str:
        """A setting in words; the name of a file alone, and not more than `LONGEST` characters."""
        value = self.settings.get(key, self.named.get(key, ""))
        text = f"{value:g}" if isinstance(value, float) else str(value)
        text = PurePath(text).name if text.startswith(("/", "./", "~")) else text
        return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def short_titles(results: Iterable[RunResult]) -> dict[Cell, str]:
    """The titles of rows, given one result of each; the rows of a trainer must differ to need more than its name.

    Files of the config are named where they differ between the rows of a trainer, options where a row has one and not
    all of these rows have the same value.
    """
    groups: dict[str, dict[Cell, RunResult]] = defaultdict(dict)
    for result in results:
        groups[result.trainer].setdefault(result.row, result)
    found: dict[Cell, str] = {}
    for trainer, rows in groups.items():
        configs = {cell: _parts(result, list(rows.values())) for cell, result in rows.items()}
        several = len({config.files for config in configs.values()}) > 1
        keys = list(dict.fromkeys(key for config in configs.values() for key in config.named))
        differing = [key for key in keys if len({config.value(key) for config in configs.values()}) > 1]
        every = {key for config in configs.values() for key in (*config.settings, *config.named)}
        for cell, config in configs.items():
            title = f"{trainer} ({config.files})" if several else trainer
            options = [f"{_short(key, every)} = {config.value(key)}" for key in differing if key in config.named]
            found[cell] = ", ".join([title, *options])
    counts = Counter(found.values())
    return {cell: title if counts[title] == 1 else plain_title(cell) for cell, title in found.items()}


def _parts(result: RunResult, others: Sequence[RunResult]) -> _Config:
    """The parts of a result's config; what its name lacks is found by comparison with other results."""
    words = result.config.split("+")
    files = [word for word in words if not re.fullmatch(OPTION, word)]
    options = [word for word in words if re.fullmatch(OPTION, word)]
    cut = bool(re.fullmatch(CUT, result.config))
    if cut:  # the last word is not whole
        (options if words[-1] in options else files).remove(words[-1])
    named = dict(word.split("=", 1) for word in options)
    config = _Config("+".join(files), named, result.settings)
    for other in others if cut else []:
        if other.dataset == result.dataset and other.config.split("+")[: len(files)] == files:
            both = result.settings.keys() & other.settings.keys() - {"SEED"}
            named |= {
                key: "" for key in sorted(both) if result.settings[key] != other.settings[key] and key not in named
            }
    return config


def _short(key: str, every: Iterable[str]) -> str:
    """The shortest end of a key that no other key has: M, LORA.STEPS."""
    words = key.split(".")
    for length in range(1, len(words)):
        end = words[-length:]
        if not any(other != key and other.split(".")[-length:] == end for other in every):
            return ".".join(end)
    return key
