"""What a person sees of the library's log."""

from __future__ import annotations

import errno
import io
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from air_plugin.utils.errors import exit_code
from air_plugin.utils.logs import escape_unshowable, show_logs


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


def test_matplotlib_is_silent_where_home_cannot_be_written(tmp_path: Path) -> None:
    code = "from air_plugin.utils.logs import show_logs; show_logs(); import matplotlib"
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MPL", "XDG"))}
    environment |= {"HOME": "/proc/1/none", "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_dassls_log_file_holds_the_notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dassl.utils import setup_logger

    monkeypatch.setattr(sys, "stdout", sys.stdout)  # put back afterwards
    show_logs()
    setup_logger(str(tmp_path))
    logging.getLogger("air_plugin").info("stage lora: 1.0 s")
    sys.stdout.flush()
    assert (tmp_path / "log.txt").read_text() == "stage lora: 1.0 s\n"


@pytest.mark.public_reports
@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_what_a_console_cannot_show_is_escaped(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """17: names in other scripts, and those of files that are no text."""
    console = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="")
    monkeypatch.setattr(sys, "stdout", console)
    escape_unshowable()
    print("\u0432\u0438\u0434 dog\udcff.png", flush=True)
    assert console.buffer.getvalue() == b"\\u0432\\u0438\\u0434 dog\\udcff.png\n"  # type: ignore[attr-defined]


@pytest.mark.public_reports
def test_a_files_name_keeps_its_bytes_where_programs_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """17: `air predict | xargs` finds the file again, whatever its name is; other letters are escaped."""
    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252", newline="")
    monkeypatch.setattr(sys, "stdout", console)
    escape_unshowable(keep_bytes=True)
    print("\u00fc \udcff\udcfe \u0432", flush=True)
    assert console.buffer.getvalue() == b"\xfc \xff\xfe \\u0432\n"  # type: ignore[attr-defined]


@pytest.mark.public_reports
def test_every_command_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """17: in the one place that all of them call."""
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", console)
    assert exit_code(lambda: print("\u65e5", flush=True) or 0) == 0
    assert console.buffer.getvalue() == b"\\u65e5\n"  # type: ignore[attr-defined]


@pytest.mark.public_reports
def test_an_interruption_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """20: exit code 130, and how to go on."""

    def work() -> int:
        raise KeyboardInterrupt

    assert exit_code(work) == 130
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "run the same command again" in err


@pytest.mark.public_reports
@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG])
def test_a_path_that_cannot_be_used_is_one_line(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    """16: wherever it is met; a defect of ours still shows where it is."""

    def work() -> int:
        raise OSError(number, os.strerror(number), "/data/list.json")

    assert exit_code(work) == 2
    assert capsys.readouterr().err == f"error: cannot use /data/list.json: {os.strerror(number)}\n"
    with pytest.raises(OSError):
        exit_code(lambda: os.close(-1) or 0)


@pytest.mark.public_reports
def test_warnings_are_in_the_log_of_a_run_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """9: a person who was not there reads them in log.txt."""
    from dassl.utils import Logger

    show_logs()
    with Logger(str(tmp_path / "log.txt")) as both:
        monkeypatch.setattr(sys, "stdout", both)
        logging.getLogger("air_plugin.some.module").warning("no labels")
    assert (tmp_path / "log.txt").read_text() == "warning: no labels\n"
    assert capsys.readouterr() == ("", "warning: no labels\n")
