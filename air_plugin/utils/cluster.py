"""Ray: the connection to a cluster, and workers that are actors."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from air_plugin.utils.errors import UserError
from air_plugin.utils.nodes import alive_nodes
from air_plugin.utils.progress import Event
from air_plugin.utils.units import Bench, Died, Message, Task, pack, unpack

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[2]  # of the package
PASSED = ("AIR_", "HF_", "TRANSFORMERS_")  # beginnings of environment variables that workers get from this process
PATIENCE = 30  # seconds for a cluster to answer
MEMORY = 100 * 2**20  # bytes for results on their way, where Ray starts on this machine


def connect() -> None:
    """Join the cluster that RAY_ADDRESS names, else start Ray on this machine; nothing where that is done.

    Raises:
        UserError: Ray is not installed, or the cluster does not answer or has another version of Ray or Python.
    """
    if find_spec("ray") is None:
        raise UserError('ENGINE=ray needs the package ray, which is not installed; run: pip install -e ".[ray]"')
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")  # a lost worker is reported by the engine
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")  # workers without a GPU see none
    import ray

    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS") or "local"
    options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        options.update(num_cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None)
        options.update(object_store_memory=MEMORY)
    elif address != "auto":
        require_reachable(address)
    try:
        context = ray.init(**options)
    except (RuntimeError, OSError, ValueError) as error:  # other versions, or this machine is not part of it
        text = " ".join(str(error).split())
        raise UserError(f"the cluster at RAY_ADDRESS {address} cannot be used: {text}") from error
    nodes = alive_nodes()
    link = f"; dashboard: http://{context.dashboard_url}" if context.dashboard_url else ""
    log.info("Ray: %d nodes, %s%s", len(nodes), described(ray.cluster_resources()), link)


def require_reachable(address: str) -> None:
    """Raise a UserError where no cluster answers at HOST:PORT within `PATIENCE` seconds."""
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        raise UserError(
            f"RAY_ADDRESS is '{address}'; it must be HOST:PORT of a cluster's head, as `ray start` prints it"
        )
    problem = f"no Ray cluster answers at RAY_ADDRESS {address}; start one with: ray start --head"
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise UserError(f"{problem} ({error})") from None
    # Ray itself waits for a very long time, and cannot be interrupted.
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        done = subprocess.run(command, capture_output=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        raise UserError(problem) from None
    if done.returncode:
        raise UserError(problem)


def described(resources: dict[str, float]) -> str:
    return f"{resources.get('CPU', 0):g} cores, {resources.get('GPU', 0):g} GPUs"


def capacity(*, gpus: float) -> int:
    """How many workers of one core and so many GPUs fit on the cluster.

    Raises:
        UserError: none.
    """
    nodes = alive_nodes()
    if gpus and not any(node.gpus >= gpus for node in nodes):
        most = max((node.gpus for node in nodes), default=0)
        raise UserError(
            f"{gpus:g} GPUs are asked for each worker, and no node of the cluster has them (the most: {most:g})"
        )
    count = sum(int(min(node.cores, node.gpus / gpus if gpus else node.cores)) for node in nodes)
    if not count:
        raise UserError("no node of the cluster has a core for a worker")
    return count


# Workers


class Actor:
    """A worker's process; its code lies beside the package.

    Args:
        number: of the worker.
        folder: the driver's present one, which relative paths begin at.
        environment: variables that are set before anything else is imported.
        task: a pickled `Task`.
        mailbox: of events; None where nobody wants them.
    """

    def __init__(self, number: int, folder: str, environment: dict[str, str], task: bytes, mailbox: Any | None) -> None:
        with suppress(OSError):
            os.chdir(folder)
        os.environ.update(environment)
        if str(ROOT) not in sys.path:
            sys.path.insert(0, str(ROOT))
        self.number, self.task, self.mailbox = number, task, mailbox

    def _send(self, event: Event) -> None:
        if self.mailbox is not None:
            self.mailbox.put.remote(self.number, event)

    def set_up(self) -> bytes:
        """Make the state; returns a packed message."""
        self.bench = Bench(unpack(self.task), self._send if self.mailbox is not None else None)
        return self.bench.set_up()

    def do(self, unit: bytes) -> bytes:
        return self.bench.do(unpack(unit))


class Mailbox:
    """Events of all workers until the driver takes them."""

    def __init__(self) -> None:
        self.events: list[tuple[int, Event]] = []

    def put(self, number: int, event: Event) -> None:
        self.events.append((number, event))

    def take(self) -> list[tuple[int, Event]]:
        taken, self.events = self.events, []
        return taken


class Actors:
    """Starts actors and waits for their messages.

    gpus: of an actor, which has one core.
    events: whether they send events.
    """

    copies: Callable[[], bool] | None = None

    def __init__(self, task: Task, *, gpus: float, events: bool) -> None:
        import ray

        passed = {name: value for name, value in os.environ.items() if name.startswith(PASSED)}
        self.mailbox = ray.remote(num_cpus=0)(Mailbox).remote() if events else None
        self.arguments = (os.getcwd(), passed, pack(task), self.mailbox)
        self.kind = ray.remote(num_cpus=1, num_gpus=gpus, scheduling_strategy="SPREAD")(Actor)
        self.actors: dict[int, Any] = {}
        self.coming: dict[Any, int] = {}  # a message that will come -> number of the worker
        self.events: Any = None  # that will come

    def hire(self, number: int) -> None:
        self.actors[number] = self.kind.remote(number, *self.arguments)
        self.coming[self.actors[number].set_up.remote()] = number

    def begin(self, number: int, unit: Any) -> None:
        self.coming[self.actors[number].do.remote(pack(unit))] = number

    def messages(self, timeout: float) -> list[tuple[int, Message]]:
        """Messages with the numbers of their workers, as soon as there are any."""
        import ray

        there, _ = ray.wait(list(self.coming), timeout=timeout)
        received: list[tuple[int, Message]] = self._events()
        for reference in there:
            number = self.coming.pop(reference)
            try:
                received.append((number, unpack(ray.get(reference))))
            except ray.exceptions.RayTaskError as error:
                raise error from None
            except ray.exceptions.RayError as error:
                received.append((number, Died(f"was lost ({type(error).__name__})")))
        return received

    def _events(self) -> list[tuple[int, Message]]:
        """The events that have come."""
        import ray

        if self.mailbox is None:
            return []
        taken: list[tuple[int, Message]] = []
        with suppress(ray.exceptions.RayError):  # its node was lost: there is no more progress to see
            if self.events is not None and ray.wait([self.events], timeout=0)[0]:
                taken, self.events = ray.get(self.events), None
            if self.events is None:
                self.events = self.mailbox.take.remote()
        return taken

    def dismiss(self, number: int) -> None:
        self._kill(self.actors.pop(number, None))

    def close(self, *, now: bool) -> None:
        for actor in [*self.actors.values(), self.mailbox]:
            self._kill(actor)
        self.actors, self.coming = {}, {}

    def _kill(self, actor: Any) -> None:
        import ray

        if actor is not None:
            with suppress(ray.exceptions.RayError, ValueError):
                ray.kill(actor)
