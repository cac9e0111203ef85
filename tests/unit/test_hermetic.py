"""What keeps the tests apart from the machine that they run on."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import hermetic
import pytest

TESTS = Path(__file__).resolve().parents[1]


def test_another_machine_is_out_of_reach_and_this_one_is_not():
    with pytest.raises(OSError, match=r"reached for the network: example\.org"):
        socket.create_connection(("example.org", 80), timeout=1)
    with socket.socket() as plain, pytest.raises(OSError, match=r"reached for the network: 192\.0\.2\.1"):
        plain.connect(("192.0.2.1", 80))
    assert hermetic.network == ["example.org", "192.0.2.1"]
    hermetic.network.clear()  # or this test would fail
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()
    assert hermetic.network == []


def test_the_environment_is_clean_whatever_it_was():
    code = f"import sys; sys.path.insert(0, {str(TESTS)!r}); import hermetic, os; hermetic.isolate(); print(os.environ)"
    foreign = {"AIR_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HOME": "/none", "SEEDS": "7", "XDG_CACHE_HOME": "/none"}
    environment = {"PATH": os.environ["PATH"], "AIR_NEEDS_CHROMIUM": "1", **foreign}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "AIR_OFFLINE" not in done.stdout and "HF_HUB_OFFLINE" not in done.stdout and "SEEDS" not in done.stdout
    assert "/none" not in done.stdout and "'AIR_NEEDS_CHROMIUM': '1'" in done.stdout
    left = done.stdout.split("'HOME': '")[1].split("'")[0]
    assert not Path(left).exists()  # removed at the end


def test_gpus_are_hidden_and_home_can_be_written_to():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert os.access(os.environ["HOME"], os.W_OK) and "AIR_OFFLINE" not in os.environ
