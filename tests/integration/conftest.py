"""Data, caches and finished runs that the integration tests share."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from runs import arguments
from shared import make_once

Finished = Callable[..., Path]


@pytest.fixture(scope="session")
def data(shared: Path) -> Path:
    """A data root with the digits. Do not change it."""
    from datasets.digits import write_digits

    return make_once(shared / "data", lambda root: write_digits(root / "digits")).resolve()


@pytest.fixture(scope="session")
def cache(shared: Path) -> str:
    """A store for all runs whose point is not that something is made anew."""
    (shared / "cache").mkdir(parents=True, exist_ok=True)
    return str(shared / "cache")


@pytest.fixture(scope="session")
def finished(shared: Path, data: Path, cache: str) -> Finished:
    """`finished(trainer, *options)` is the folder of a short, finished run; one for all that ask. Do not change it."""

    def get(trainer: str, *options: str, seed: int = 1) -> Path:
        import train

        def make(folder: Path) -> None:
            line = arguments(trainer, data, folder, "AIR.CACHE", cache, *options, seed=seed)
            output = io.StringIO()
            with redirect_stdout(output), redirect_stderr(output):
                code = train.main(line)
            assert code == 0, output.getvalue()

        name = hashlib.sha256(repr((trainer, options, seed)).encode()).hexdigest()[:12]
        return make_once(shared / "runs" / f"{trainer}-{name}", make)

    return get
