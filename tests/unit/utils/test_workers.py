"""Work in other processes: nothing of it goes through /dev/shm, and nobody waits for a dead process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from air_plugin.utils.errors import UserError, exit_code
from air_plugin.utils.workers import batched, behind, map_in_processes, one_ahead

pytestmark = [pytest.mark.public_reports, pytest.mark.skipif(sys.platform != "linux", reason="signals of Linux")]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("workers", [0, 1, 3, 20])
def test_results_come_in_the_order_of_the_items(workers: int):
    def work(item: int) -> tuple[int, int]:
        time.sleep(0.02 * (item % 3))
        return item, os.getpid()

    found = list(map_in_processes(work, range(10), workers=workers))
    assert [item for item, _ in found] == list(range(10))
    assert len({pid for _, pid in found} - {os.getpid()}) == min(workers, 10)
    assert not any(is_alive(pid) for _, pid in found if pid != os.getpid())
    assert list(map_in_processes(work, [], workers=workers)) == []


def test_a_killed_worker_ends_the_work_with_one_line(capsys: pytest.CaptureFixture[str]):
    """Item 13: what was made before it is there, and nobody waits."""

    def work(item: int) -> int:
        if item == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    found: list[int] = []

    def collect() -> int:
        for item in map_in_processes(work, range(20), workers=3):
            found.append(item)
        return 0

    assert exit_code(collect) == 2
    assert found == [0, 1, 2, 3, 4, 5]
    line = capsys.readouterr().err
    assert "was killed by signal 9" in line and "DATALOADER.NUM_WORKERS is 3" in line and line.count("\n") == 1


def test_a_worker_that_is_killed_while_it_writes_is_noticed():
    """Item 13: its result is half in the pipe then."""

    def work(item: int) -> np.ndarray:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return np.zeros(10_000_000, np.uint8)  # more than a pipe holds

    found = map_in_processes(work, range(2), workers=2)
    next(found)  # meanwhile the second worker waits for its pipe to be read
    time.sleep(0.6)
    with pytest.raises(UserError, match="was killed by signal 9"):
        next(found)


def test_an_error_in_a_worker_is_one_line_and_ends_all_workers():
    """Item 13."""

    def work(item: int) -> int:
        if item == 4:
            raise ValueError("two\nlines")
        return os.getpid()

    results = map_in_processes(work, range(9), workers=2)
    pids = list(islice(results, 4))
    with pytest.raises(UserError, match=r"^ValueError: two lines \(in a worker process, at 4\)") as raised:
        next(results)
    assert not any(map(is_alive, pids))
    assert "in work" in str(raised.value.__cause__)
    with pytest.raises(ValueError, match="two"):
        list(map_in_processes(work, range(9), workers=0))


def test_a_result_that_cannot_be_pickled_is_an_error():
    with pytest.raises(UserError, match="ended with exit code 1"):
        list(map_in_processes(lambda item: lambda: item, range(2), workers=1))


def test_workers_end_with_the_main_process():
    """Items 13 and 20: also where it is killed, so that it cannot end them itself."""
    code = """if True:
        import os, signal
        from air_plugin.utils.workers import map_in_processes
        found = map_in_processes(lambda item: (os.getpid(), bytes(4_000_000)), range(90), workers=3)
        print(*(next(found)[0] for _ in range(3)), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    pids = [int(pid) for pid in done.stdout.split()]
    assert done.returncode == -signal.SIGKILL and len(set(pids)) == 3
    until = time.monotonic() + 30
    while any(map(is_alive, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(is_alive, pids))


def test_batches_are_made_ahead_and_in_order():
    made: list[int] = []

    def count():
        for number in range(7):
            made.append(number)
            yield number

    with closing(one_ahead(batched(count(), 3))) as batches:
        assert next(batches) == [0, 1, 2]
        until = time.monotonic() + 30
        while len(made) < 6 and time.monotonic() < until:
            time.sleep(0.01)
        assert made == [0, 1, 2, 3, 4, 5]
        assert list(batches) == [[3, 4, 5], [6]]
    assert list(one_ahead(iter([]))) == []


def test_an_error_ahead_is_raised_in_its_turn():
    def broken():
        yield 1
        raise UserError("no more")

    found = []
    with pytest.raises(UserError, match="no more"):
        for item in one_ahead(broken()):
            found.append(item)
    assert found == [1]


@pytest.mark.parametrize("by", [0, 1, 3])
def test_items_come_behind(by: int):
    taken: list[int] = []

    def count():
        for number in range(5):
            taken.append(number)
            yield number

    found = []
    for number in behind(count(), by=by):
        found.append(number)
        assert len(taken) == min(number + 1 + by, 5)
    assert found == [0, 1, 2, 3, 4]


def test_what_waits_is_not_lost_by_an_error():
    def broken():
        yield from (1, 2)
        raise UserError("no more")

    found = []
    with pytest.raises(UserError, match="no more"):
        for item in behind(broken(), by=1):
            found.append(item)
    assert found == [1, 2]
