"""What a person sees of the library's log."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from air_plugin.utils.logs import show_logs


@pytest.fixture(autouse=True)
def as_in_a_new_process() -> Iterator[None]:
    """No handler of the library's, and afterwards what was there."""
    logger = logging.getLogger("air_plugin")
    handlers, level = logger.handlers[:], logger.level
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)


def test_notes_on_stdout_warnings_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    show_logs()
    log = logging.getLogger("air_plugin.some.module")
    log.debug("a detail")
    log.info("stage %s: %.1f s", "lora", 1.0)
    log.warning("the %s is full", "cup")
    log.error("stop")
    captured = capsys.readouterr()
    assert captured.out == "stage lora: 1.0 s\n"
    assert captured.err == "warning: the cup is full\nerror: stop\n"


def test_twice_shown_is_shown_once(capsys: pytest.CaptureFixture[str]) -> None:
    show_logs()
    show_logs()
    logging.getLogger("air_plugin").info("once")
    assert capsys.readouterr().out == "once\n"


def test_streams_are_those_of_the_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dassl's setup_logger replaces sys.stdout after the handler was made."""
    show_logs()
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    logging.getLogger("air_plugin").info("note")
    logging.getLogger("air_plugin").warning("careful")
    assert (out.getvalue(), err.getvalue()) == ("note\n", "warning: careful\n")


def test_without_it_the_library_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    logging.getLogger("air_plugin.x").info("nobody asked")
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_other_libraries_are_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    show_logs()
    logging.getLogger("somebody").info("theirs")
    assert capsys.readouterr().out == ""
    assert not any(type(handler).__module__.startswith("air_plugin") for handler in logging.getLogger().handlers)


def test_dassls_log_file_holds_the_notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dassl.utils import setup_logger

    monkeypatch.setattr(sys, "stdout", sys.stdout)  # put back afterwards
    show_logs()
    setup_logger(str(tmp_path))
    logging.getLogger("air_plugin").info("stage lora: 1.0 s")
    sys.stdout.flush()
    assert (tmp_path / "log.txt").read_text() == "stage lora: 1.0 s\n"
