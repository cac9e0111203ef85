"""benchmarks.silence: how long a command shows nothing new on a terminal."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("pty")
from benchmarks.silence import Recording, main, record

CODE = """
import sys, time
assert sys.stdout.isatty()
print("one", flush=True)
for _ in range(8):  # the same text again is no news
    time.sleep(0.1); print("\\r\\x1b[2Kone", end="", flush=True)
print("\\ntwo", flush=True)
sys.exit(3)
"""


def test_the_longest_silence_and_the_exit_code_of_a_command():
    code, recording = record([sys.executable, "-c", CODE])
    seconds, begin, text = recording.longest
    assert code == 3 and text == "one" and seconds > 0.7 and begin > 0
    assert "".join(text for _, text in recording.chunks).split() == ["one", *["\x1b[2Kone"] * 8, "two"]


def test_silence_before_the_first_and_after_the_last_words_counts():
    recording = Recording()
    recording.add(4.0, "a")
    recording.add(5.0, "b")
    recording.close(8.0)
    assert [seconds for seconds, _, _ in recording.silences] == [4.0, 1.0, 3.0]
    assert recording.longest == (4.0, 0.0, "(nothing)")


@pytest.mark.parametrize(("limit", "code"), [("0.5", 1), ("60", 0)])
def test_a_limit_and_a_recording(limit: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    command = [sys.executable, "-c", CODE.replace("exit(3)", "exit(0)")]
    assert main(["--limit", limit, "--cast", str(tmp_path / "x.cast"), *command]) == code
    header, *events = map(json.loads, (tmp_path / "x.cast").read_text("utf-8").splitlines())
    assert header["version"] == 2 and header["width"] == 120
    assert all(kind == "o" for _, kind, _ in events) and events[0][0] <= events[-1][0]
    assert "longest silence: " in capsys.readouterr().out


def test_a_command_that_is_missing():
    code, recording = record(["no-such-command-here"])
    assert code == 127 and "no-such-command-here" in recording.chunks[0][1]
