"""What is printed also goes to a file."""

from __future__ import annotations

import os.path as osp
import sys
import time
from typing import Any, TextIO

from .tools import mkdir_if_missing


class Logger:
    """A standard output that writes to the console and to a file, the latter line by line.

    Unlike upstream's, it never closes the console, and one Logger never writes into another.
    """

    def __init__(self, fpath: str | None = None) -> None:
        stdout = sys.stdout
        self.console: TextIO = stdout.console if isinstance(stdout, Logger) else stdout
        self.file: TextIO | None = None
        if fpath is not None:
            mkdir_if_missing(osp.dirname(fpath))
            self.file = open(fpath, "a", buffering=1, encoding="utf-8", errors="backslashreplace")  # noqa: SIM115

    def __enter__(self) -> Logger:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        """All other attributes of a standard output (isatty, encoding, ...) are those of the console."""
        if name in ("console", "file"):  # not set yet: the constructor failed
            raise AttributeError(name)
        return getattr(self.console, name)

    def write(self, msg: str) -> int:
        """Write to both."""
        if self.file is not None:
            self.file.write(msg)
        return self.console.write(msg)

    def flush(self) -> None:
        """Flush both."""
        self.console.flush()
        if self.file is not None:
            self.file.flush()

    def close(self) -> None:
        """Close the file; what is written from now on goes to the console alone."""
        if self.file is not None:
            self.file.close()
            self.file = None


def setup_logger(output: str | None = None) -> None:
    """Copy standard output to a file from now on.

    Args:
        output: a `.txt` or `.log` file, or a directory, for the file `log.txt` in it. Where that file exists,
            the time is added to the name: `log.txt-YYYY-mm-dd-HH-MM-SS`. None: change nothing.
    """
    if output is None:
        return
    fpath = output if output.endswith((".txt", ".log")) else osp.join(output, "log.txt")
    if osp.exists(fpath):
        fpath += time.strftime("-%Y-%m-%d-%H-%M-%S")
    previous = sys.stdout
    sys.stdout = Logger(fpath)
    if isinstance(previous, Logger):
        previous.close()
