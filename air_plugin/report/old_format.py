"""result.json of version 0.1, which has no `format`, in the present form."""

from __future__ import annotations

from typing import Any

from air_plugin.former_settings import upgrade

ROUND_KEYS = {"anchor": "prior_strength", "mass": "soft_counts"}


def upgrade_result(old: dict[str, Any]) -> dict[str, Any]:
    """The content of a result.json without `format`, in format 1. What is damaged stays so, for the reader to name."""
    new = _renamed(old, {"headline": "primary"})
    provenance, rounds = new.get("provenance"), new.get("auxiliary")
    if isinstance(rounds, list):
        new["auxiliary"] = [_renamed(entry, ROUND_KEYS) if isinstance(entry, dict) else entry for entry in rounds]
    settings = provenance.get("settings") if isinstance(provenance, dict) else None
    if isinstance(provenance, dict) and isinstance(settings, dict):
        settings = upgrade(settings)
        new["provenance"] = {**provenance, "settings": settings}
        new["class_names"] = settings.get("DATASET.CLASS_NAMES")  # None: from before there were two
    return new


def _renamed(values: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {names.get(key, key): value for key, value in values.items()}
