"""methods.json of a data set's results: the titles of an experiment's rows, in order."""

from __future__ import annotations

import json
from pathlib import Path

from air_plugin.utils.files import to_json, write_atomically


def remember_titles(path: Path, titles: dict[tuple[str, str], str]) -> None:
    """Let `air report` know the titles of an experiment's rows; those of an earlier one stay as they are."""
    try:
        known = json.loads(path.read_text("utf-8"))
        cells = {(row["trainer"], row["config"]) for row in known}
    except (FileNotFoundError, ValueError, TypeError, KeyError):  # none yet, or not ours
        known, cells = [], set()
    new = [
        {"trainer": trainer, "config": config, "title": title}
        for (trainer, config), title in titles.items()
        if (trainer, config) not in cells
    ]
    write_atomically(path, to_json([*known, *new], indent=1).encode())
