"""Work in other processes, without shared memory: results come through one pipe for each process.

torch's DataLoader hands tensors over in /dev/shm, of which a container has 64 MB by default, and waits for ever where
it is full or where a worker is killed while it writes. Here the end of a process closes its pipe, so nobody waits.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch

from air_plugin.utils.errors import UserError

if sys.platform == "linux":
    import fcntl

PIPE = 1 << 20  # bytes
Item = TypeVar("Item")


class _Failure:
    """An error in a worker: its type and message, and its traceback as text."""

    def __init__(self, error: Exception) -> None:
        self.message = " ".join(f"{type(error).__name__}: {error}".split())
        self.traceback = traceback.format_exc()


def map_in_processes(work: Callable[[Any], Any], items: Sequence[Any], *, workers: int) -> Generator[Any, None, None]:
    """`map(work, items)`, by several processes with one thread each; each of them works at most one item ahead.

    Args:
        work: a function of an item. Its results are pickled, so they should hold arrays of NumPy, not tensors, which
            torch would move to /dev/shm.
        items: what it is called with.
        workers: number of processes; 0 works in this one.

    Yields:
        The results in the order of the items.

    Raises:
        UserError: a worker was killed, or `work` raised an error in it. With 0 workers the error itself.
    """
    if workers == 0:
        yield from map(work, items)
        return
    started: list[tuple[Any, Connection]] = []
    try:
        for number in range(min(workers, len(items))):
            started.append(_start(work, items[number::workers], [reader for _, reader in started]))
        for number, item in enumerate(items):
            process, reader = started[number % len(started)]
            result = _receive(process, reader, workers)
            if isinstance(result, _Failure):
                raise UserError(
                    f"{result.message} (in a worker process, at {item}); DATALOADER.NUM_WORKERS 0 shows where"
                ) from RuntimeError(result.traceback)
            yield result
    finally:
        for process, reader in started:
            reader.close()
            process.kill()  # nothing is shared that it could leave locked
        for process, _ in started:
            process.join()


def _start(work: Callable[[Any], Any], items: Sequence[Any], others: list[Connection]) -> tuple[Any, Connection]:
    """A worker and the end of its pipe that its results come from."""
    forks = sys.platform == "linux"  # as DataLoader: transforms need not be picklable then
    context: Any = multiprocessing.get_context("fork" if forks else "spawn")
    reader, writer = context.Pipe(duplex=False)
    if forks:
        with contextlib.suppress(OSError):  # a larger pipe is quicker
            fcntl.fcntl(writer.fileno(), fcntl.F_SETPIPE_SZ, PIPE)
    inherited = [*others, reader] if forks else []
    process = context.Process(target=_serve, args=(work, items, writer, inherited), daemon=True)
    process.start()
    writer.close()  # the worker has the only one now, so its end is the pipe's
    return process, reader


def _serve(work: Callable[[Any], Any], items: Sequence[Any], writer: Connection, inherited: list[Connection]) -> None:
    """A worker's life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the main process, which ends the workers
    for reader in inherited:  # else nobody would notice that the main process was killed
        reader.close()
    torch.set_num_threads(1)
    try:
        for item in items:
            try:
                result = work(item)
            except Exception as error:
                result = _Failure(error)
            writer.send(result)
    except BrokenPipeError:  # the main process has ended
        pass


def _receive(process: Any, reader: Connection, workers: int) -> Any:
    """A worker's next result."""
    try:
        return reader.recv()
    except (EOFError, OSError) as error:
        process.join(10)
        code = process.exitcode
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
        raise UserError(
            f"a worker process {how}, perhaps for lack of memory; use fewer, DATALOADER.NUM_WORKERS is {workers}; "
            "finished work is kept"
        ) from error


def batched(items: Iterable[Item], size: int) -> Generator[list[Item], None, None]:
    """The items in lists of `size`; the last one may be shorter."""
    left = iter(items)
    while batch := list(islice(left, size)):
        yield batch


def one_ahead(items: Iterator[Item]) -> Generator[Item, None, None]:
    """The items of an iterator; the next one is made in a thread meanwhile. Close it before the iterator."""
    end = object()
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, items, end)
            yield item  # type: ignore[misc]


def behind(items: Iterable[Item], *, by: int) -> Generator[Item, None, None]:
    """The items, each when `by` more were taken from the iterator; at its end, or before its error, the rest."""
    waiting: deque[Item] = deque()
    try:
        for item in items:
            waiting.append(item)
            if len(waiting) > by:
                yield waiting.popleft()
    except Exception:
        yield from waiting
        raise
    yield from waiting
