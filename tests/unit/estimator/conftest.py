"""A small random backbone and generator in place of the embedded ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_models import SIDE, make_backbone, make_generator

from air_plugin.auxiliary import build
from air_plugin.estimator import classifier as module
from air_plugin.inference import bundle


@pytest.fixture
def parameters(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Parameters of a quick fit with the small models, for three classes."""
    monkeypatch.setattr(module, "load_backbone", lambda *_, **__: make_backbone())
    monkeypatch.setattr(bundle, "load_backbone", lambda *_, **__: make_backbone())
    monkeypatch.setattr(build, "load_generator", lambda *_, **__: make_generator())
    options = {"SIZE": SIDE, "STEPS": 1, "M": 3, "K": 2, "LORA.STEPS": 2, "LORA.RANK": 2, "LORA.BATCH": 2}
    return {
        "class_names": ["dog", "cat", "sea lion"],
        "backbone": "mini",
        "generator": "mini",
        "cache": tmp_path / "cache",
        "settings": {f"AIR.{key}": value for key, value in options.items()} | {"AIR.LORA.TARGETS": ["to_q", "to_v"]},
    }
