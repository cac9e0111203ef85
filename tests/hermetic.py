"""The tests do not depend on the machine: its environment, its home folder, its GPU and its network stay outside.

`conftest.py` imports this before anything else, because libraries read the environment when they are imported.
Processes that tests start inherit it all.
"""

from __future__ import annotations

import atexit
import os
import shutil
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

FOREIGN = ("AIR_", "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "DIFFUSERS_", "XDG_", "TORCH_", "MPL", "PYTEST_ADDOPTS")
SETTINGS = (
    "DATA",
    "OUTPUT",
    "SEEDS",
    "JOBS",
    "ENGINE",
    "WORKERS",
    "GPUS_PER_RUN",
    "RAY_ADDRESS",
    "TARGETS",
    "PYTHONPATH",
    "PYTHONWARNINGS",
    "ALL_PROXY",
    "all_proxy",
)
KEPT = ("AIR_NEEDS_CHROMIUM",)
NOBODY = "http://127.0.0.1:9"  # the discard port: no such service
network: list[str] = []  # what this process tried to reach
machine: set[str] = set()  # more addresses that mean this machine


def isolate() -> None:
    """Give this process and its children a clean environment with an empty home folder; workers share one."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    for name in list(os.environ):
        if name not in KEPT and (name.startswith(FOREIGN) or name in SETTINGS):
            del os.environ[name]
    home = Path(tempfile.mkdtemp(prefix="air-tests-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    places = {"HOME": "", "XDG_CACHE_HOME": ".cache", "HF_HOME": "hub", "TORCH_HOME": "torch", "MPLCONFIGDIR": "mpl"}
    os.environ |= {name: str(home / folder) for name, folder in places.items()}
    os.environ |= dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), NOBODY)
    os.environ |= dict.fromkeys(("no_proxy", "NO_PROXY"), "127.0.0.1,localhost")
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


def hide_gpus() -> None:
    """Before the first use of one."""
    os.environ |= dict.fromkeys(("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"), "")


def refuse_the_network() -> None:
    """From now on, an attempt of this process to reach another machine fails, and is noted in `network`."""

    def local(host: Any) -> bool:
        return host in (None, "", b"", "localhost", socket.gethostname()) or str(host).startswith(("127.", "::1"))

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "socket.getaddrinfo":
            host = arguments[0]
        elif event == "socket.connect" and isinstance(arguments[1], tuple):
            host = arguments[1][0]
        else:
            return
        if not local(host) and host not in machine:
            network.append(str(host))
            raise OSError(f"a test reached for the network: {host}")

    sys.addaudithook(watch)
