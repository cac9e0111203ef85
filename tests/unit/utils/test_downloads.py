"""What is about to be downloaded, in one line. The hub is a server on this machine, or a stand-in."""

from __future__ import annotations

import http.server
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from air_plugin.utils import downloads
from air_plugin.utils.downloads import announce_backbone, announce_generator
from air_plugin.utils.progress import handled_by
from scripts.data import announce_weights

ROOT = Path(__file__).resolve().parents[3]
SD = {
    "model_index.json": 500,
    "v1-5-pruned.safetensors": 4_000_000_000,
    "unet/config.json": 700,
    "unet/diffusion_pytorch_model.safetensors": 3_000_000_000,
    "unet/diffusion_pytorch_model.fp16.safetensors": 1_500_000_000,
    "unet/diffusion_pytorch_model.non_ema.safetensors": 3_000_000_000,
    "unet/diffusion_pytorch_model.bin": 3_000_000_000,
    "text_encoder/model.safetensors": 500_000_000,
    "text_encoder/model.fp16.safetensors": 250_000_000,
    "vae/diffusion_pytorch_model-00001-of-00002.safetensors": 200_000_000,
    "vae/diffusion_pytorch_model-00002-of-00002.safetensors": 100_000_000,
    "safety_checker/model.safetensors": 1_000_000_000,
}
CLIP = dict.fromkeys(("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors"), 600_000_000)


@pytest.fixture(autouse=True)
def network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AIR_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(downloads, "_cached", lambda repository, file, revision="": None)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """The repositories whose files and sizes the hub was asked for, and their revisions."""
    found: list[tuple[str, str | None]] = []

    def model_info(self: Any, repository: str, *, revision: str | None, files_metadata: bool, timeout: float) -> Any:
        assert files_metadata and timeout <= 10
        found.append((repository, revision))
        if repository.startswith("nobody/"):
            raise ConnectionError("no route")
        files = CLIP if "clip" in repository.lower() else SD
        if repository.endswith("-lcm"):
            files = {"pytorch_lora_weights.safetensors": 135_000_000}
        siblings = [SimpleNamespace(rfilename=name, size=size) for name, size in files.items()]
        return SimpleNamespace(siblings=siblings, card_data=SimpleNamespace(license="openrail"))

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    return found


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [message for message in caplog.messages if message.startswith("downloading ")]


@pytest.mark.parametrize(
    ("options", "size"), [({}, "3.8 GB"), ({"variant": "fp16"}, "1.8 GB"), ({"safety_checker": True}, "4.8 GB")]
)
def test_the_files_of_a_generator_that_diffusers_reads(
    asked: list[Any], options: dict[str, Any], size: str, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, logger="air_plugin")
    announce_generator("owner/sd", revision="abc", scheduler="dpm", **options)
    source = f"{huggingface_hub.constants.ENDPOINT}/owner/sd"
    assert lines(caplog) == [f"downloading owner/sd: {size}, from {source}, licence: openrail"]
    assert asked == [("owner/sd", "abc")]


def test_a_few_step_adapter_is_named_too(asked: list[Any], caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, logger="air_plugin")
    announce_generator("mini", lcm_lora="owner/x-lcm")
    (line,) = lines(caplog)
    assert line.startswith("downloading owner/x-lcm: 135.0 MB, from ")


@pytest.mark.parametrize("name", ["ViT-B-32:laion2b_s34b_b79k", "hf:owner/clip"])
def test_backbones_of_the_hub(name: str, asked: list[Any], caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, logger="air_plugin")
    events: list[str] = []
    with handled_by(lambda event: events.append(event.stage)):
        announce_backbone(name)
    (line,) = lines(caplog)
    ((repository, _),) = asked
    assert line == f"downloading {repository}: 600.0 MB, from https://huggingface.co/{repository}, licence: openrail"
    assert events == [f"downloading {repository} (600.0 MB)"]


def test_a_backbone_with_an_address_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    import open_clip

    caplog.set_level(logging.INFO, logger="air_plugin")
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = {"url": "https://openai.example/a/ViT-B-32.pt"}
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda *_: settings)
    monkeypatch.setattr(downloads, "size_of", lambda address: 353_976_522)
    announce_backbone("ViT-B/32")
    assert lines(caplog) == [f"downloading ViT-B-32.pt: 354.0 MB, from {settings['url']}, licence: see there"]
    (tmp_path / ".cache" / "clip").mkdir(parents=True)
    (tmp_path / ".cache" / "clip" / "ViT-B-32.pt").touch()
    announce_backbone("ViT-B/32")
    assert len(lines(caplog)) == 1


@pytest.mark.parametrize("part", ["unet", "transformer"])
def test_nothing_is_asked_where_nothing_is_downloaded(
    part: str, asked: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    (tmp_path / part).mkdir()
    for name in ("model_index.json", f"{part}/a.safetensors"):
        (tmp_path / name).touch()
    with monkeypatch.context() as patch:
        patch.setenv("AIR_OFFLINE", "1")
        announce_backbone("ViT-B-32:laion2b_s34b_b79k")
        announce_generator("owner/sd", lcm_lora="owner/x-lcm")
    for name in ("mini", str(tmp_path), "hf:" + str(tmp_path), "hf:./folder", "ViT-B-32:weights.safetensors", "what"):
        announce_backbone(name)
    for name in ("mini", str(tmp_path), "./folder", "mine.safetensors"):
        announce_generator(name, lcm_lora=str(tmp_path / "x.safetensors"))
    monkeypatch.setattr(downloads, "_cached", lambda repository, file, revision="": tmp_path / "model_index.json")
    announce_backbone("ViT-B-32:laion2b_s34b_b79k")
    announce_generator("owner/sd", lcm_lora="owner/x-lcm")
    assert asked == [] and lines(caplog) == []


def test_a_hub_that_does_not_answer_is_left_to_the_download(asked: list[Any], caplog: pytest.LogCaptureFixture):
    announce_generator("nobody/sd")
    assert asked == [("nobody/sd", None)] and lines(caplog) == []


def test_the_runs_of_a_script_are_announced_once(asked: list[Any], caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, logger="air_plugin")

    def cfg(trainer: str, prototypes: str = "synthetic") -> Any:
        air = SimpleNamespace(
            BACKBONE="",
            PROTOTYPES=prototypes,
            GENERATOR="owner/sd",
            REVISION="",
            VARIANT="",
            SAFETY_CHECKER=False,
            LCM_LORA="",
        )
        backbone = SimpleNamespace(BACKBONE=SimpleNamespace(NAME="hf:owner/clip"))
        return SimpleNamespace(TRAINER=SimpleNamespace(NAME=trainer), MODEL=backbone, AIR=air)

    announce_weights([cfg("CPL"), cfg("CPL"), cfg("AiR", "real")])
    assert [repository for repository, _ in asked] == ["owner/clip"]
    announce_weights([cfg("CPL"), cfg("AiR"), cfg("AiR")])
    assert [repository for repository, _ in asked[1:]] == ["owner/clip", "owner/sd"]


@pytest.fixture
def hub() -> Iterator[str]:
    """A server that answers as the hub does: GET /api/models/owner/sd?blobs=True."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            siblings = [{"rfilename": name, "size": size} for name, size in SD.items()]
            answer = {"id": "owner/sd", "siblings": siblings, "cardData": {"license": "mit"}}
            body = json.dumps(answer).encode()
            found = self.path.startswith("/api/models/owner/sd") and "blobs=" in self.path
            self.send_response(200 if found else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_the_hubs_own_client_is_understood(hub: str, tmp_path: Path):
    code = (
        "from air_plugin.utils.logs import show_logs; show_logs()\n"
        "from air_plugin.utils.downloads import announce_generator\n"
        "announce_generator('owner/sd'); announce_generator('owner/other')\n"
    )
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path), "NO_PROXY": "*", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"downloading owner/sd: 3.8 GB, from {hub}/owner/sd, licence: mit\n"
