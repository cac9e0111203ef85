"""The library's log on the terminal. The library only logs; an entry (`air`, train.py) shows the log to a person."""

from __future__ import annotations

import codecs
import io
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
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns of a home folder that cannot be written
    logger = logging.getLogger("air_plugin")
    logger.setLevel(logging.INFO)
    if not any(isinstance(handler, _Terminal) for handler in logger.handlers):
        logger.addHandler(_Terminal())


def escape_unshowable(*, keep_bytes: bool = False) -> None:
    """Let stdout and stderr show what their encoding (cp1252, C) lacks as escapes, instead of an error.

    Args:
        keep_bytes: bytes of a file's name that are no text stay as they are, so that the name still opens the file.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="air.bytes" if keep_bytes else "backslashreplace")


def _bytes_or_escapes(error: UnicodeError) -> tuple[str | bytes, int]:
    """An error handler of `codecs`: bytes that Python holds as surrogates, and escapes for all other letters."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letter, following = ord(error.object[error.start]), error.start + 1
    if 0xDC80 <= letter <= 0xDCFF:
        return bytes([letter - 0xDC00]), following
    one = UnicodeEncodeError(error.encoding, error.object, error.start, following, error.reason)
    return codecs.backslashreplace_errors(one)


codecs.register_error("air.bytes", _bytes_or_escapes)


class _Terminal(logging.Handler):
    """Prints a record. The stream is looked up every time, since Dassl replaces sys.stdout to fill log.txt."""

    def emit(self, record: logging.LogRecord) -> None:
        text, stream = self.format(record), sys.stdout
        if record.levelno >= logging.WARNING:
            text, stream = f"{record.levelname.lower()}: {text}", sys.stderr
        progress = getattr(sys.modules.get("tqdm"), "tqdm", None)
        with progress.external_write_mode(stream) if progress else nullcontext():  # takes progress bars off meanwhile
            print(text, file=stream, flush=True)
        if stream is sys.stderr and (file := getattr(sys.stdout, "file", None)):  # Dassl's copy of stdout: log.txt
            file.write(f"{text}\n")
