"""Errors for the user: one line, exit code 2, no traceback."""

from __future__ import annotations

import difflib
import errno
import re
import sys
from collections.abc import Callable, Iterable

from air_plugin.utils.logs import escape_unshowable

# Why a path cannot be read or written, where the person can change that; a missing file is left to who looks for it.
UNUSABLE = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
)


class UserError(Exception):
    """Bad input. The message is one line: what is wrong, where, and how to correct it."""


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """An error for an unknown name, with near matches.

    Args:
        kind: of the name, for instance "data set".
        name: the unknown name.
        known: all valid names.

    Example:
        >>> str(unknown("data set", "eurosta", ["eurosat", "dtd"]))
        "unknown data set 'eurosta'; did you mean eurosat?"
    """
    names = sorted(known)
    lowered = {candidate.lower(): candidate for candidate in names}
    near = [lowered[match] for match in difflib.get_close_matches(name.lower(), lowered, n=3, cutoff=0.5)]
    some = f"{', '.join(names[:20])}{', ...' if len(names) > 20 else ''}"
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {some}"
    return UserError(f"unknown {kind} '{name}'; {hint}")


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, or one of its causes, means that a disk or quota is full."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        if "No space left on device" in str(seen) or "PytorchStreamWriter failed" in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch found too little memory, on a card or on the host."""
    reasons = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "DefaultCPUAllocator: can't allocate memory")
    return type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and any(reason in str(error) for reason in reasons)
    )


def first_line(error: Exception) -> str:
    """The first line of an error's message; its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def explain(error: Exception) -> str | None:
    """The message for an error that the user can correct; None where it is a defect of this package."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, FloatingPointError):
        return f"{error} Lower OPTIM.LR"
    if is_disk_full(error):
        return "the disk is full; free some space and run again, finished work is kept"
    if is_out_of_memory(error):
        return (
            "out of memory: lower AIR.LORA.BATCH, AIR.BATCH or AIR.SIZE, use AIR.PRECISION bf16, or end other programs "
            "on the card; finished work is kept"
        )
    if isinstance(error, OSError) and error.filename and error.errno in UNUSABLE:
        return f"cannot use {error.filename}: {error.strerror}"
    if re.match(r"[A-Z]+(\.[A-Z_]+)+ ", str(error)):  # Dassl's message about a config key
        return str(error)
    return None


def exit_code(work: Callable[[], int], *, resume: str = "finished work is kept; run the same command again") -> int:
    """Run a command of a terminal; returns its exit code.

    An error that the user can correct becomes one line on stderr and exit code 2, an interruption (Ctrl-C) one line
    and 130. What the console's encoding lacks is shown as an escape, such as \\u5bff.

    Args:
        work: the command.
        resume: how to go on after an interruption, in words.
    """
    escape_unshowable()
    try:
        return work()
    except KeyboardInterrupt:
        print(f"interrupted: {resume}", file=sys.stderr)
        return 130
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2
