"""Ray: the connection to a cluster, what is checked before any work, and workers that are actors."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from air_plugin.utils.errors import UserError
from air_plugin.utils.progress import Event
from air_plugin.utils.units import Bench, Died, Message, Task, pack, unpack

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[2]  # of the package
SOURCES = ("air_plugin", "trainers", "datasets", "scripts", "train")  # code that workers run
PASSED = ("AIR_", "HF_", "TRANSFORMERS_")  # beginnings of environment variables that workers get from this process
PATIENCE = 30  # seconds for a cluster or node to answer
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


@dataclass(frozen=True)
class Node:
    """A machine of the cluster: Ray's name for it, its address, cores and GPUs."""

    id: str
    address: str
    cores: float
    gpus: float


def alive_nodes() -> list[Node]:
    import ray

    return [
        Node(
            node["NodeID"],
            f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}",
            node["Resources"].get("CPU", 0.0),
            node["Resources"].get("GPU", 0.0),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


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


# What is checked before any work


def require_nodes(folders: Sequence[Path]) -> None:
    """Check that every node has this version of the package, and sees the same folders.

    Raises:
        UserError: a node does not; it is named.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    inspect = inspector()
    with probes(folders) as expected:
        here, nodes = inspect(SOURCES, {}), alive_nodes()
        remote = ray.remote(num_cpus=0, max_retries=1)(inspect)
        strategies = [NodeAffinitySchedulingStrategy(node.id, soft=False) for node in nodes]
        answers = [remote.options(scheduling_strategy=one).remote(SOURCES, expected) for one in strategies]
        for node, answer in zip(nodes, answers, strict=True):
            try:
                found = ray.get(answer, timeout=2 * PATIENCE)
            except ray.exceptions.GetTimeoutError:
                raise UserError(f"node {node.address} of the cluster does not answer") from None
            except ray.exceptions.RayError as error:
                raise UserError(
                    f"node {node.address} of the cluster cannot work: {' '.join(str(error).split())[:300]}"
                ) from error
            require_same(node.address, found, here)


def require_same(address: str, found: dict[str, Any], here: dict[str, Any]) -> None:
    """Raise a UserError for what a node has otherwise than this machine; both from `inspector`."""
    if found["version"] is None:
        raise UserError(f"node {address} of the cluster has no package air_plugin; install the same version there")
    if found["version"] != here["version"]:
        raise UserError(
            f"node {address} of the cluster has version {found['version']} of air_plugin, this machine "
            f"{here['version']}; install the same version there"
        )
    other = [name for name in here["sources"] if found["sources"].get(name) != here["sources"][name]]
    if other:
        raise UserError(
            f"node {address} of the cluster has other source files of {', '.join(other)}, in {found['root']}; install "
            "the same version there"
        )
    if found["unseen"]:
        raise UserError(
            f"node {address} of the cluster does not see {found['unseen'][0]} as this machine does; it must lie on a "
            "file system that all nodes share"
        )


def inspector() -> Callable[[Sequence[str], dict[str, str | None]], dict[str, Any]]:
    """The function that looks at a node.

    It is made here, so that Ray sends it as code: a node whose package is another one, or is missing, runs it, too.
    """

    def inspect(sources: Sequence[str], expected: dict[str, str | None]) -> dict[str, Any]:
        import hashlib
        import importlib
        import importlib.util
        import sys
        from pathlib import Path

        def digest(folder: Path, name: str) -> str:
            files = [folder / f"{name}.py"] if (folder / f"{name}.py").is_file() else (folder / name).rglob("*.py")
            total = hashlib.sha256()
            for file in sorted(files):
                total.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
            return total.hexdigest()

        def sees(path: Path, content: str | None) -> bool:
            try:
                return path.is_dir() if content is None else path.read_text() == content
            except OSError:
                return False

        spec = importlib.util.find_spec("air_plugin")
        if spec is None or not spec.submodule_search_locations:
            return {"version": None}
        root = Path(next(iter(spec.submodule_search_locations))).resolve().parent
        sys.path_importer_cache.pop(str(root), None)
        return {
            "version": importlib.import_module("air_plugin").__version__,
            "root": str(root),
            "sources": {name: digest(root, name) for name in sources},
            "unseen": [str(Path(path).parent) for path, text in expected.items() if not sees(Path(path), text)],
        }

    return inspect


@contextmanager
def probes(folders: Sequence[Path]) -> Iterator[dict[str, str | None]]:
    """Files with random content in some folders for a while: path -> content; None for a folder that is only read."""
    made: dict[str, str | None] = {}
    try:
        for folder in folders:
            path, content = folder.absolute() / f".probe-{secrets.token_hex(8)}.tmp", secrets.token_hex(8)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(content)
                made[str(path)] = content
            except OSError:
                made[str(path.parent / ".")] = None
        yield made
    finally:
        for name in made:
            with suppress(OSError):
                Path(name).unlink()


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
