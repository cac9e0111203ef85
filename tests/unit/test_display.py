"""What a script shows while it works, on a terminal and elsewhere."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from sources import ROOT

import scripts.display
from air_plugin.utils.progress import Event
from scripts.display import Display, Line, clock, describe

CONTROL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which the test sets."""
    time_is = [1000.0]
    clocks = SimpleNamespace(monotonic=lambda: time_is[0], time=lambda: time_is[0])
    monkeypatch.setattr(scripts.display, "time", clocks)
    return time_is


def terminal(width: int = 120) -> Any:
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=30, color_system=None)


def shown(display: Display) -> list[str]:
    """What the terminal shows now: the lines after those that were taken away."""
    display.stream.seek(0)
    display.stream.truncate()
    display.refresh()
    text = re.split(r"\x1b\[2K", display.stream.getvalue())[-1]
    return [line.rstrip() for line in CONTROL.sub("", text).splitlines() if line.strip()]


def test_every_run_is_one_line_with_stage_bar_time_left_and_loss(now: list[float]):
    with Display(console=terminal()) as display:
        display.total = 9
        display.show(["AiR, seed 1", "CPL, seed 2", "CPL, seed 3"])
        display.update("AiR, seed 1", Event("LoRA", 100, 300, time=1000.0))
        display.update("AiR, seed 1", Event("LoRA", 150, 300, 0.25, time=1010.0))
        display.update("CPL, seed 2", Event("features of train", time=1005.0))
        now[0] = 1010.0
        lines = shown(display)
    assert len(lines) == 4
    assert re.fullmatch(r"AiR, seed 1 +LoRA +\S+ +150/300 +0:30 left +loss 0\.2500", lines[0])
    assert re.fullmatch(r"CPL, seed 2 +features of train +0:05", lines[1])
    assert re.fullmatch(r"CPL, seed 3 +starting +0:10", lines[2])
    assert lines[3] == "0 of 9 runs have ended, 0:10"


def test_the_bar_is_as_long_as_what_is_done(now: list[float]):
    lengths = []
    with Display(console=terminal()) as display:
        for done in (0, 150, 300):
            display.show(["a"])
            display.update("a", Event("LoRA", done, 300))
            lengths.append(shown(display)[0].count("\u2501"))
    assert lengths == [0, scripts.display.BAR // 2, scripts.display.BAR]


def test_eighty_characters_are_enough(now: list[float]):
    """The data set, which is the same for all, is left out; a long stage is cut, numbers are not."""
    with Display(console=terminal(80)) as display:
        display.show(["digits / ZeroshotAiR / seed 1", "digits / CPL / seed 1"])
        display.update("digits / ZeroshotAiR / seed 1", Event("LoRA", 100, 300, 0.5, time=1000.0))
        display.update("digits / ZeroshotAiR / seed 1", Event("LoRA", 200, 300, 0.25, time=1100.0))
        display.update("digits / CPL / seed 1", Event("features of train", 1000, 5000, time=1000.0))
        now[0] = 1100.0
        lines = shown(display)
    assert re.fullmatch(r"ZeroshotAiR / seed 1 +LoRA +\S+ +200/300 +1:40 left +loss 0\.2500", lines[0])
    assert re.fullmatch(r"CPL / seed 1 +features of … +\S+ +1,000/5,000 +1:40", lines[1])


def test_a_narrow_terminal_still_shows_a_line_a_run(now: list[float]):
    with Display(console=terminal(60)) as display:
        display.show(["digits / + auxiliary classifier, without LoRA / seed 1", "b"])
        display.update("b", Event("features of a very long name of a part", 1, 2, 0.5))
        assert len(shown(display)) == 2


def test_a_run_that_ended_is_a_line_above(now: list[float]):
    with Display(console=terminal()) as display:
        display.total = 2
        display.show(["a", "b"])
        display.end("a")
        display.print("[odd] \\ name")
        text = CONTROL.sub("", display.stream.getvalue())
        assert "== a (1 of 2)\n" in text and "[odd] \\ name\n" in text
        assert [line.split()[0] for line in shown(display)] == ["b", "1"]
    assert not display.live.is_started


def test_what_is_printed_and_warned_meanwhile_stands_above(now: list[float], capsys):
    with Display(console=terminal()) as display:
        display.show(["a"])
        print("left out: CoOp")
        assert "left out: CoOp\n" in CONTROL.sub("", display.stream.getvalue())
    print("after")
    assert capsys.readouterr().out == "after\n"


def test_elsewhere_a_line_a_run_comes_every_thirty_seconds(now: list[float], capsys):
    with Display() as display:
        display.show(["a", "b"])
        display.update("a", Event("lora", 1, 4, time=1000.0))
        display.update("a", Event("lora", 2, 4, 0.5, time=1020.0))
        display.update("a", Event("lora", 3, 4, time=1021.0))
        for now[0] in (1001.0, 1029.0, 1031.0, 1060.0, 1062.0):
            display.show(["a", "b"])
    assert capsys.readouterr().out.splitlines() == [
        "-- a: lora 3 of 4 (75 %), loss 0.5000, 31 s",
        "-- b: starting, 31 s",
        "-- a: lora 3 of 4 (75 %), loss 0.5000, 62 s",
        "-- b: starting, 62 s",
    ]


def test_what_the_script_itself_works_on_is_shown(now: list[float], capsys):
    with Display(console=terminal()) as display, display.working("preparing"):
        now[0] += 75
        assert shown(display) == ["preparing, 1:15"]
    with Display() as display, display.working("preparing"):
        now[0] += 31
        display.refresh()
    assert capsys.readouterr().out == "-- preparing, 31 s\n"


def test_the_display_lives_while_this_process_is_busy():
    """The time goes on without any event, and no thread is left: workers are copies of this process afterwards."""
    before = threading.active_count()
    with Display(console=terminal()) as display, display.working("importing"):
        end, text = time.monotonic() + 30, ""
        while "importing, 0:02" not in text and time.monotonic() < end:
            sum(range(100_000))
            text = display.stream.getvalue()
    assert "importing, 0:01" in text and "importing, 0:02" in text
    assert threading.active_count() == before


def test_time_left_is_that_of_the_stage_and_unknown_before_it_has_a_rate(now: list[float]):
    line = Line()
    assert line.seconds_left is None
    line.update(Event("images", 40, 100, time=1000.0))  # 40 were there already
    assert line.seconds_left is None
    line.update(Event("images", 60, 100, time=1010.0))
    now[0] = 1015.0
    assert line.seconds_left == pytest.approx(15.0)
    now[0] = 1100.0
    assert line.seconds_left == 0.0
    line.update(Event("features", 1, 5, time=1100.0))
    assert line.seconds_left is None and line.begun == 1100.0


def test_times_and_stages_in_words():
    assert [clock(s) for s in (0, 9.9, 75, 3700)] == ["0:00", "0:09", "1:15", "1:01:40"]
    assert describe(Event("lora", 120, 300, loss=0.5)) == "lora 120 of 300 (40 %), loss 0.5000"
    assert describe(Event("generator")) == "generator"


@pytest.mark.skipif(sys.platform == "win32", reason="there is no pty")
def test_on_a_real_terminal_lines_are_replaced_and_in_a_pipe_they_are_not():
    code = (
        "import sys, time; sys.path.insert(0, '.')\n"
        "from scripts.display import Display, Event\n"
        "with Display() as display:\n"
        "    for done in range(3):\n"
        "        display.show(['a']); display.update('a', Event('LoRA', done, 2)); display.refresh()\n"
        "print('the table')\n"
    )
    import pty

    written: list[bytes] = []

    def read(master: int) -> bytes:
        written.append(os.read(master, 4096))
        return written[-1]

    pty.spawn([sys.executable, "-c", f"import os; os.chdir({str(ROOT)!r})\n{code}"], read)
    text = b"".join(written).decode()
    assert "\x1b[" in text and text.count("LoRA") >= 3 and text.splitlines()[-1].endswith("the table")
    piped = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert piped.stdout == "the table\n" and piped.stderr == ""
