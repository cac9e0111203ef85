"""Where the tests find what they test, and what several of them share."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import hermetic
import pytest

hermetic.isolate()

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.append(str(ROOT / "compat"))  # last: an installed Dassl wins

import torch  # noqa: E402
from shared import make_once  # noqa: E402
from small_models import make_backbone, make_generator, write_pictures  # noqa: E402

from air_plugin.clip.backbone import Backbone  # noqa: E402
from air_plugin.diffusion.pipeline import Generator  # noqa: E402
from air_plugin.utils.store import Store  # noqa: E402

MOST_WORKERS = 8  # each takes about 1 GB


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr != "slow":
        hermetic.hide_gpus()
    hermetic.refuse_the_network()


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A worker for each core; none where single files are asked for, which end sooner without."""
    files = [argument.split("::")[0] for argument in config.args]
    if config.option.markexpr == "slow" or all(Path(file).is_file() for file in files):
        return 0
    config.option.dist = "worksteal"
    return min(MOST_WORKERS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


@pytest.fixture(autouse=True)
def isolated() -> Iterator[None]:
    """Every test finds the same environment and one thread, and reaches for no other machine."""
    before = dict(os.environ)
    torch.set_num_threads(1)  # small tensors; more threads collapse where another process keeps a core busy
    hermetic.network.clear()
    yield
    os.environ.clear()
    os.environ.update(before)
    assert not hermetic.network


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A folder that all workers of this session have in common."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if hasattr(request.config, "workerinput") else base) / "shared"


@pytest.fixture(scope="session")
def digits_root(shared: Path) -> Path:
    """A data root with the four sets of digits, written as a first run writes them. Do not change it."""
    import train
    from datasets import digits

    def make(root: Path) -> None:
        cfg, *_ = train.set_up(train.parse(["--root", str(root)]))
        for kind in (digits.Digits, digits.DigitsInverted, digits.DigitsRotated, digits.DigitsNoisy):
            kind(cfg)

    return make_once(shared / "digits", make)


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
