"""The offline switch."""

from __future__ import annotations

import os
import sys


def is_offline() -> bool:
    """Whether AIR_OFFLINE or HF_HUB_OFFLINE (1, true, yes or on) forbids the network."""
    values = (os.environ.get(name, "") for name in ("AIR_OFFLINE", "HF_HUB_OFFLINE"))
    return any(value.strip().lower() in ("1", "true", "yes", "on") for value in values)


def go_offline() -> None:
    """Forbid the network to this process and its children, including the hub's libraries."""
    os.environ["AIR_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"
    hub = sys.modules.get("huggingface_hub.constants")
    if hub is not None:  # it has read the environment at its import
        hub.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
