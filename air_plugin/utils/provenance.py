"""Provenance of a result, and the time of its stages."""

from __future__ import annotations

import logging
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from air_plugin import __version__
from air_plugin.utils.progress import waiting

log = logging.getLogger(__name__)

PACKAGES = ("torch", "torchvision", "open_clip_torch", "diffusers", "transformers", "peft", "numpy")


@dataclass
class Stage:
    """One stage of a run: its time in seconds, and whether its result was taken from the store."""

    name: str
    seconds: float = 0.0
    cached: bool = False


@dataclass
class Stages:
    """The stages of a run, in order."""

    done: list[Stage] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Time a stage, show that it goes on and log its end; the caller sets `.cached` of the yielded stage."""
        stage = Stage(name)
        start = time.perf_counter()
        with waiting(name):
            yield stage
        stage.seconds = round(time.perf_counter() - start, 3)
        self.done.append(stage)
        log.info("stage %s: %.1f s%s", name, stage.seconds, " (from the store)" if stage.cached else "")


def collect(root: Path) -> dict[str, Any]:
    """Commit and state of the checkout at `root`, versions, platform, command line, and where dassl came from."""
    dassl = sys.modules.get("dassl")
    status = _git(root, "status", "--porcelain")
    return {
        "commit": _git(root, "rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {"air-plugin": __version__, **{name: _version(name) for name in PACKAGES}},
        "dassl": None if dassl is None else {"version": dassl.__version__, "path": str(dassl.__file__)},
    }


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
