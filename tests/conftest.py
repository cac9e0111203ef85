"""Where the tests find what they test, and what several of them share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.append(str(ROOT / "compat"))  # last: an installed Dassl wins

import torch  # noqa: E402
from small_models import make_backbone, make_generator, write_pictures  # noqa: E402

from air_plugin.clip.backbone import Backbone  # noqa: E402
from air_plugin.diffusion.pipeline import Generator  # noqa: E402
from air_plugin.utils.store import Store  # noqa: E402

torch.set_num_threads(1)  # small models; two threads collapse where another process keeps a core busy


@pytest.fixture(scope="session")
def tiny_backbone() -> Backbone:
    """A small random backbone. Everybody has the same one: do not change it."""
    return make_backbone()


@pytest.fixture
def tiny_generator() -> Generator:
    """A small random generator, a new one for every test with always the same weights."""
    return make_generator()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store."""
    return Store(tmp_path / "store")


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    """Seven different picture files."""
    return write_pictures(tmp_path / "pictures", 7)
