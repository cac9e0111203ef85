"""The nodes of a Ray cluster, and what is checked on each of them before any work."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from air_plugin.utils.errors import UserError

SOURCES = ("air_plugin", "trainers", "datasets", "scripts", "train")  # code that workers run
PATIENCE = 60  # seconds for a node to answer


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
                found = ray.get(answer, timeout=PATIENCE)
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
