"""Progress of long work, on a terminal and without one."""

from __future__ import annotations

import io
import logging
import sys

import pytest

from air_plugin.utils import progress as progress_module
from air_plugin.utils.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which the test sets."""
    now = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
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
