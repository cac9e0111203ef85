"""The longest time for which a command shows nothing new on a terminal.

    python -m benchmarks.silence bash scripts/air/main.sh digits
    python -m benchmarks.silence --limit 5 --cast digits.cast bash scripts/air/main.sh digits

The command gets a terminal of its own (pty). What it writes is shown; drawing the same text again is no news. `--cast`
keeps a recording that `asciinema play` shows (asciicast, version 2). Exit code: the command's; 1 where it was 0 and
the longest silence is above `--limit` seconds.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import pty
import re
import select
import struct
import sys
import termios
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

CONTROL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\r")
COLUMNS, LINES = 120, 40


@dataclass
class Recording:
    """What a terminal has shown.

    chunks: (seconds since the start, text) of everything that was written.
    silences: (seconds, when it began, the text before it) of every time without news.
    """

    chunks: list[tuple[float, str]] = field(default_factory=list)
    silences: list[tuple[float, float, str]] = field(default_factory=list)
    last: float = 0.0  # when there was news
    text: str = "(nothing)"

    def add(self, now: float, written: str) -> None:
        self.chunks.append((now, written))
        text = " ".join(CONTROL.sub("", written).split())
        if text and text != self.text:
            self.close(now)
            self.last, self.text = now, text

    def close(self, now: float) -> None:
        """The silence ends."""
        self.silences.append((now - self.last, self.last, self.text))

    @property
    def longest(self) -> tuple[float, float, str]:
        return max(self.silences)

    def save(self, path: Path, command: Sequence[str]) -> None:
        """As asciicast, version 2."""
        header = {"version": 2, "width": COLUMNS, "height": LINES, "title": " ".join(command)}
        lines = [json.dumps(header), *(json.dumps([round(now, 3), "o", text]) for now, text in self.chunks)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def record(command: Sequence[str], *, show: Callable[[str], object] = lambda text: None) -> tuple[int, Recording]:
    """Run a command in a terminal of its own; returns its exit code and what it has shown."""
    pid, master = pty.fork()
    if not pid:
        try:
            os.execvp(command[0], list(command))
        except OSError as error:
            os.write(2, f"{command[0]}: {error.strerror}\n".encode())
            os._exit(127)
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    recording, start = Recording(), time.monotonic()
    while True:
        select.select([master], [], [])
        try:
            data = os.read(master, 1 << 16)
        except OSError:  # Linux: the terminal was closed
            data = b""
        if not data:
            break
        text = data.decode("utf-8", "replace")
        show(text)
        recording.add(time.monotonic() - start, text)
    _, status = os.waitpid(pid, 0)
    os.close(master)
    recording.close(time.monotonic() - start)
    return os.waitstatus_to_exitcode(status), recording


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=float, help="seconds of silence that are too many")
    parser.add_argument("--cast", metavar="FILE", type=Path, help="of the recording")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND ...")
    args = parser.parse_args(argv)
    if not args.command:
        parser.error("name a command")

    def show(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    code, recording = record(args.command, show=show)
    if args.cast:
        recording.save(args.cast, args.command)
    seconds, begin, text = recording.longest
    print(f"longest silence: {seconds:.1f} s, {begin:.1f} s after the start, after: {text[-100:]}")
    return code or int(args.limit is not None and seconds > args.limit)


if __name__ == "__main__":
    sys.exit(main())
