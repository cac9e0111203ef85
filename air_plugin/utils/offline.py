"""The offline switch."""

from __future__ import annotations

import os
import sys


def is_offline() -> bool:
    """Whether AIR_OFFLINE or HF_HUB_OFFLINE (1, true, yes or on) keeps us from the network."""
    values = (os.environ.get(name, "") for name in ("AIR_OFFLINE", "HF_HUB_OFFLINE"))
    return any(value.strip().lower() in ("1", "true", "yes", "on") for value in values)


def go_offline() -> None:
    """Keep this process and the ones that it starts from the network; the hub's libraries are told, too."""
    os.environ["AIR_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"
    hub = sys.modules.get("huggingface_hub.constants")
    if hub is not None:  # it read the environment when it was imported
        hub.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
