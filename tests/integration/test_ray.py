"""Ray: a real cluster of two nodes on this machine, and clusters that cannot be used."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import hermetic
import pytest
import units_of_work as of_work
from runs import SHORT
from small_models import write_pictures
from sources import ROOT

from air_plugin.auxiliary.stages import generate_images
from air_plugin.clip import features as features_module
from air_plugin.clip import spread as feature_spread
from air_plugin.clip.features import extract_features
from air_plugin.clip.loading import load_backbone
from air_plugin.config import AirSettings
from air_plugin.diffusion import spread as spread_module
from air_plugin.diffusion.pipeline import load_generator
from air_plugin.engine import RayEngine
from air_plugin.utils import cluster, nodes
from air_plugin.utils.errors import UserError
from air_plugin.utils.store import Store
from benchmarks.same_results import differences

pytest.importorskip("ray", reason='needs the extra ray: pip install -e ".[ray]"')
pytestmark = pytest.mark.full

PATHS = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "compat")])
MEMORY = 100 * 2**20
NODE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": MEMORY, "env_vars": {"PYTHONPATH": PATHS}}


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Any]:
    """A cluster of two nodes, each with one core and, by its word, one GPU."""
    import ray
    from ray.cluster_utils import Cluster

    # This machine's address. A UDP socket "to" 8.8.8.8, which sends nothing, is how Ray finds it.
    hermetic.machine |= {"8.8.8.8"}
    hermetic.machine.add(ray.util.get_node_ip_address())
    cluster_of_two = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        cluster_of_two.add_node(**NODE, num_gpus=1)
    cluster_of_two.wait_for_nodes()
    yield cluster_of_two
    cluster_of_two.shutdown()


@pytest.fixture
def driver(two_nodes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RayEngine]:
    """An engine that joins the cluster."""
    import ray

    monkeypatch.setenv("RAY_ADDRESS", two_nodes.address)
    monkeypatch.setenv("AIR_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)  # Ray's workers import from the driver's folder
    yield RayEngine()
    ray.shutdown()


def spread(engine: RayEngine, work: Any, folder: Path, units: Any = range(5), **options: Any) -> dict[int, Any]:
    options = {"workers": 2, "title": "number", "folders": [folder]} | options
    return dict(engine.map(partial(of_work.set_up, folder), work, list(units), **options))


def test_both_nodes_work_and_a_killed_workers_unit_is_done_again(
    driver: RayEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    results = spread(driver, of_work.die_once, tmp_path)
    assert [results[unit][0] for unit in range(5)] == [100, 101, 104, 109, 116]
    assert (tmp_path / "died").exists()
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        "the worker of number 3 of 5 was lost (ActorDiedError); another one does it again"
    ]


def test_a_unit_that_kills_its_workers_is_given_up(driver: RayEngine, tmp_path: Path):
    with pytest.raises(UserError, match=r"^number 3 of 5: 3 workers died of it, the last one was lost"):
        spread(driver, of_work.die_always, tmp_path)
    assert (tmp_path / "deaths").read_text() == "xxx"


def test_an_error_of_the_work_arrives_as_it_is(driver: RayEngine, tmp_path: Path):
    with pytest.raises(UserError, match=r"^AIR.LAMBDA is 2; it must be at most 1$") as caught:
        spread(driver, of_work.refuse, tmp_path)
    assert "in refuse" in str(caught.value.__cause__)


def test_progress_arrives_and_workers_have_the_drivers_settings(driver: RayEngine, tmp_path: Path):
    seen = set()

    def look(index: int, event: Any) -> None:
        seen.add((index, event.stage, event.done))
        (tmp_path / f"seen-{index}").touch()

    spread(driver, of_work.report_and_wait, tmp_path, units=range(2), progress=look)
    assert seen == {(0, "lora", 0), (1, "lora", 1)}
    found = spread(driver, of_work.describe_process, tmp_path, units=[0], workers=1, gpus=0.5)[0]
    assert found == {"threads": 1, "offline": "1", "cards": "0", "alone": True}


def test_capacity_and_gpus_that_no_node_has(driver: RayEngine, tmp_path: Path):
    assert driver.capacity() == 2 and driver.capacity(gpus=1) == 1
    with pytest.raises(UserError, match=r"^2 GPUs are asked for each worker, and no node .* \(the most: 1\)$"):
        spread(driver, of_work.square, tmp_path, gpus=2)
    assert not list(tmp_path.iterdir())  # nothing was begun


def test_a_node_with_other_sources_is_refused(two_nodes: Any, driver: RayEngine, tmp_path: Path):
    for name in nodes.SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / "other" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(f"{source}.py", tmp_path / "other")
    with open(tmp_path / "other" / "air_plugin" / "settings.py", "a") as file:
        file.write("# changed\n")
    paths = os.pathsep.join([str(tmp_path / "other"), str(ROOT / "tests")])
    node = two_nodes.add_node(**{**NODE, "env_vars": {"PYTHONPATH": paths}})
    try:
        address = f":{node.node_manager_port}" if hasattr(node, "node_manager_port") else ""
        with pytest.raises(
            UserError, match=rf"^node .*{address} of the cluster has other source files of air_plugin, in"
        ):
            spread(driver, of_work.square, tmp_path)
    finally:
        two_nodes.remove_node(node)


def test_a_node_that_does_not_see_the_folder_is_refused(two_nodes: Any, driver: RayEngine, tmp_path: Path):
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode:
        pytest.skip("only root may give a process other file systems")
    (tmp_path / "store").mkdir()
    start = (
        f"mount -t tmpfs none {tmp_path / 'store'} && exec {sys.executable} -m ray.scripts.scripts start "
        f"--address={two_nodes.address} --num-cpus=1 --object-store-memory={MEMORY} --block --disable-usage-stats"
    )
    blind = subprocess.Popen(
        ["unshare", "--mount", "bash", "-c", start],
        env={**os.environ, "PYTHONPATH": PATHS},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        cluster.connect()
        end = time.monotonic() + 60
        while len(nodes.alive_nodes()) < 3:
            assert time.monotonic() < end and blind.poll() is None
            time.sleep(0.2)
        with pytest.raises(UserError, match=rf"^node .* does not see {tmp_path / 'store'} as this machine does"):
            spread(driver, of_work.square, tmp_path / "store")
        assert not list((tmp_path / "store").iterdir())
    finally:
        blind.send_signal(signal.SIGTERM)
        blind.wait(60)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", "no Ray cluster answers at RAY_ADDRESS 127.0.0.1:1"),
        ("ray://127.0.0.1:1", "RAY_ADDRESS is 'ray://127.0.0.1:1'; it must be HOST:PORT"),
        ("head", "RAY_ADDRESS is 'head'; it must be HOST:PORT"),
    ],
)
def test_an_address_without_a_cluster(address: str, message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError) as caught:
        cluster.connect()
    assert str(caught.value).startswith(message)


def test_something_else_answers_at_the_address(monkeypatch: pytest.MonkeyPatch):
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(cluster, "PATIENCE", 8)
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.server_port}")
    with pytest.raises(UserError, match=r"^no Ray cluster answers at RAY_ADDRESS 127.0.0.1:"):
        cluster.connect()
    server.shutdown()
    server.server_close()


# The work itself


def images_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*.png")}


def test_a_worker_killed_during_generation_changes_nothing(
    driver: RayEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    settings = AirSettings(prompt="a photo of a {}.", images_per_class=3, kept_per_class=1, batch=2, steps=2)
    generator = load_generator("mini", **settings.loading)

    def generate(name: str) -> Any:
        store = Store(tmp_path / name)
        return generate_images(generator, None, ["cat", "dog"], settings=settings, store=store)

    monkeypatch.setenv("ENGINE", "local")
    generate("local")
    monkeypatch.setenv("ENGINE", "ray")
    monkeypatch.setattr(spread_module, "generate_portion", of_work.generate_and_die_once)
    monkeypatch.setattr(RayEngine, "gpus", lambda self: 0.0)  # the node's GPU is only a word
    report = generate("ray")
    assert (tmp_path / "ray" / "images" / "died").exists() and "another one does it again" in caplog.text
    assert report.generated == 6 and images_of(tmp_path / "ray") == images_of(tmp_path / "local")
    (manifest,) = (tmp_path / "ray").rglob("manifest.jsonl")
    assert sorted(json.loads(line)["key"] for line in manifest.read_text().splitlines()) == sorted(
        path.stem for path in report.paths
    )


def test_a_worker_killed_while_it_encodes_changes_nothing(
    driver: RayEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(features_module, "CHUNK", 4)
    paths, backbone = write_pictures(tmp_path / "pictures", 11), load_backbone("mini")
    tables = {}
    for name in ("local", "ray"):
        monkeypatch.setenv("ENGINE", name)
        table, _ = extract_features(backbone, paths, store=Store(tmp_path / name), batch_size=2)
        assert table.path is not None
        tables[name] = table.path.read_bytes()
        monkeypatch.setattr(feature_spread, "encode_chunk", of_work.encode_and_die_once)
        monkeypatch.setattr(RayEngine, "gpus", lambda self: 0.0)  # the node's GPU is only a word
    assert (tmp_path / "ray" / "features" / "died").exists() and "another one does it again" in caplog.text
    assert not (tmp_path / "local" / "features" / "encoded").exists()
    assert tables["ray"] == tables["local"]


def worker_of_a_run() -> int | None:
    """A process that does a run now."""
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if (folder / "cmdline").read_bytes().startswith(b"ray::Actor.do"):
                return int(folder.name)
    return None


def test_a_worker_killed_during_a_run_changes_nothing(two_nodes: Any, data: Path, tmp_path: Path):
    """`ENGINE=ray` gives the results of `ENGINE=local`, and says nothing but that a worker was lost."""
    arguments = ["bash", str(ROOT / "scripts" / "cpl" / "main.sh"), "digits", *SHORT, "OPTIM.MAX_EPOCH", "12"]
    python = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    common = {**os.environ, "PATH": python, "DATA": str(data), "SEEDS": "1 2", "GPUS_PER_RUN": "0"}
    environment = {**common, "OUTPUT": str(tmp_path / "ray"), "ENGINE": "ray", "RAY_ADDRESS": two_nodes.address}
    script = subprocess.Popen(
        arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    end = time.monotonic() + 240
    while not list((tmp_path / "ray").rglob("prompt_learner/*")):
        assert time.monotonic() < end and script.poll() is None, script.communicate()
        time.sleep(0.02)
    worker = worker_of_a_run()
    assert worker is not None
    os.kill(worker, signal.SIGKILL)
    out, err = script.communicate(timeout=240)
    assert script.returncode == 0, (out, err)
    assert out.startswith("Ray: 2 nodes, 2 cores, 1 GPUs\n")
    assert re.fullmatch("warning: the worker of run digits / .* was lost .*; another one does it again\n", err)
    local = {**common, "OUTPUT": str(tmp_path / "local"), "JOBS": "1"}
    subprocess.run(arguments, env=local, check=True, capture_output=True, cwd=tmp_path)
    assert not list(differences(tmp_path / "local", tmp_path / "ray"))
    assert len(list((tmp_path / "local").rglob("result.json"))) == 2
