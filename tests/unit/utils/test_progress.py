"""Progress of long work, on a terminal and without one."""

from __future__ import annotations

import io
import logging
import os
import sys
import threading
import time

import pytest

from air_plugin.utils import progress as progress_module
from air_plugin.utils.progress import Event, Progress, handled_by, report
from air_plugin.utils.provenance import Stages


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which the test sets."""
    now = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress_module, "_reported", 0.0)
    return now


def test_without_a_terminal_a_line_is_logged_from_time_to_time(clock: list[float], caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, logger="air_plugin")
    with Progress(5000, title="features of train", unit="images") as progress:
        progress.skip(4000)
        for _ in range(10):
            clock[0] += 8.0
            progress.update(100)
    assert caplog.messages == [
        "features of train: 4,400 of 5,000 images, 12.5 images/s",
        "features of train: 4,800 of 5,000 images, 12.5 images/s",
    ]


def test_short_work_logs_nothing(clock: list[float], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture):
    caplog.set_level(logging.INFO, logger="air_plugin")
    with Progress(10, title="features", unit="images") as progress:
        clock[0] += 29.0
        progress.update(10)
    assert caplog.messages == [] and capfd.readouterr() == ("", "")


def test_on_a_terminal_the_bar_shows_the_rate(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, logger="air_plugin")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(8, title="features of test", unit="images") as progress:
        progress.skip(2)
        progress.bar.start_t -= 3.0
        progress.update(6)
        progress.bar.refresh()
    shown = terminal.getvalue()
    assert "features of test: 100%" in shown and "8/8" in shown and " images/s" in shown
    assert caplog.messages == []


def test_events_reach_the_handler_of_the_moment_only():
    outer: list[Event] = []
    inner: list[Event] = []
    report("before", 1, 2)
    with handled_by(outer.append):
        report("first", 1, 2, loss=0.5)
        with handled_by(inner.append):
            report("second")
        report("third", 2, 2)
    report("after")
    assert [(event.stage, event.done, event.total, event.loss) for event in outer] == [
        ("first", 1, 2, 0.5),
        ("third", 2, 2, None),
    ]
    assert [event.stage for event in inner] == ["second"] and abs(inner[0].time - time.time()) < 60


def test_a_handler_does_not_outlive_an_error():
    found: list[Event] = []
    with pytest.raises(RuntimeError), handled_by(found.append):
        raise RuntimeError
    report("lost")
    assert found == []


def test_a_stage_reports_that_it_begins():
    found: list[Event] = []
    with handled_by(found.append), Stages().stage("lora"):
        assert [(event.stage, event.total) for event in found] == [("lora", 0)]
    assert len(found) == 1


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_reports_whether_it_is_shown_or_not(terminal: bool, monkeypatch: pytest.MonkeyPatch):
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    found: list[Event] = []
    with handled_by(found.append), Progress(300, title="LoRA", unit="steps") as progress:
        progress.skip(200)
        progress.update(loss=0.25)
        progress.update(9)
        progress.bar.refresh()
    assert [(event.stage, event.done, event.total, event.loss) for event in found] == [
        ("LoRA", 200, 300, None),
        ("LoRA", 201, 300, 0.25),
        ("LoRA", 210, 300, None),
    ]
    assert ("loss=0.2500" in stream.getvalue()) is terminal


# Signs of life


def test_a_thread_calls_meanwhile_and_ends():
    calls: list[float] = []
    before = threading.active_count()
    with progress_module.ticking(lambda: calls.append(time.monotonic()), every=0.01):
        end = time.monotonic() + 30
        while len(calls) < 3 and time.monotonic() < end:
            time.sleep(0.01)
    found = len(calls)
    assert found >= 3 and threading.active_count() == before
    time.sleep(0.05)
    assert len(calls) == found


@pytest.mark.skipif(sys.platform != "linux", reason="no process is copied there")
def test_a_copy_of_this_process_is_made_between_two_calls():
    """Else it might be copied while a call holds the lock of a stream, on which the copy would wait for ever."""
    inside = [False]

    def call() -> None:
        inside[0] = True
        time.sleep(0.02)
        inside[0] = False

    with progress_module.ticking(call, every=0.001):
        for _ in range(20):
            pid = os.fork()
            if not pid:
                os._exit(int(inside[0]))
            assert os.waitpid(pid, 0)[1] == 0


def test_a_stage_without_events_shows_its_time_on_a_terminal(clock: list[float], monkeypatch: pytest.MonkeyPatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    sign = progress_module._Sign("generator")
    monkeypatch.setattr(progress_module, "_signs", [sign])
    clock[0] += 1.0
    sign.show()
    assert terminal.getvalue() == ""
    clock[0] += 64.0
    sign.show()
    assert terminal.getvalue() == "\rgenerator: 1:05\x1b[K\r"
    report("generator", 1, 2)
    sign.show()
    assert terminal.getvalue().count("generator") == 1
    sign.clear()
    assert terminal.getvalue().endswith("\r\x1b[K")


def test_only_the_innermost_stage_shows_itself_and_a_bar_that_stands_still_is_drawn_again(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    outer, inner = (progress_module._Sign(title) for title in ("outer", "inner"))
    monkeypatch.setattr(progress_module, "_signs", [outer, inner])
    clock[0] += 9.0
    outer.show()
    assert terminal.getvalue() == ""
    with Progress(8, title="images", unit="images") as progress:
        clock[0] += 9.0
        before = terminal.getvalue().count("images:")
        inner.show()
        assert terminal.getvalue().count("images:") == before + 1 and "inner" not in terminal.getvalue()
        progress.update(8)


def test_a_stage_without_events_is_logged_elsewhere(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, logger="air_plugin")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    sign = progress_module._Sign("generator")
    monkeypatch.setattr(progress_module, "_signs", [sign])
    for clock[0] in (110.0, 131.0, 140.0, 162.0):
        sign.show()
    assert caplog.messages == ["generator: 31 s so far", "generator: 62 s so far"]


def test_waiting_reports_its_stage_and_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch):
    terminal, found = Terminal(), list[Event]()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress_module, "SILENCE", 0.02)
    with pytest.raises(RuntimeError), handled_by(found.append), progress_module.waiting("generator"):
        end = time.monotonic() + 30
        while "generator" not in terminal.getvalue() and time.monotonic() < end:
            time.sleep(0.01)
        raise RuntimeError
    assert [event.stage for event in found] == ["generator"]
    assert "\rgenerator: 0:00" in terminal.getvalue() and terminal.getvalue().endswith("\r\x1b[K")
    assert progress_module._signs == []
