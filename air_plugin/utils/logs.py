"""The library's log on the terminal. The library only logs; an entry (`air`, train.py) shows the log to a person."""

from __future__ import annotations

import logging
import sys
from contextlib import nullcontext


def show_logs() -> None:
    """Show what `air_plugin` logs from now on: notes on stdout, warnings and errors on stderr. May be called again.

    Example:
        >>> show_logs()
        >>> logging.getLogger("air_plugin.clip").info("features: 12 images")
        features: 12 images
    """
    logger = logging.getLogger("air_plugin")
    logger.setLevel(logging.INFO)
    if not any(isinstance(handler, _Terminal) for handler in logger.handlers):
        logger.addHandler(_Terminal())


class _Terminal(logging.Handler):
    """Prints a record. The stream is looked up every time, since Dassl replaces sys.stdout to fill log.txt."""

    def emit(self, record: logging.LogRecord) -> None:
        text, stream = self.format(record), sys.stdout
        if record.levelno >= logging.WARNING:
            text, stream = f"{record.levelname.lower()}: {text}", sys.stderr
        progress = getattr(sys.modules.get("tqdm"), "tqdm", None)
        with progress.external_write_mode(stream) if progress else nullcontext():  # takes progress bars off meanwhile
            print(text, file=stream, flush=True)
