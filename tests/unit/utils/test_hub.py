"""What people read where the hub gives no file: no network, no such model, no access, no folder."""

from __future__ import annotations

import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from air_plugin.clip.loading import load_backbone
from air_plugin.diffusion.pipeline import load_generator
from air_plugin.utils.errors import UserError

pytestmark = pytest.mark.public_reports

ROOT = Path(__file__).resolve().parents[3]
ANSWERS = {"gated": (403, "GatedRepo"), "login": (401, "GatedRepo"), "none": (404, "RepoNotFound"), "hidden": (401, "")}
ANSWERS |= {"old": (404, "RevisionNotFound"), "other": (404, "EntryNotFound"), "closed": (403, "")}
DEAF = "nobody"  # whose requests end without an answer
ASK = """if True:
    import json, sys
    import huggingface_hub.utils._http as http
    http.time.sleep = lambda seconds: None  # between attempts
    from air_plugin.clip.loading import load_backbone
    from air_plugin.diffusion.pipeline import load_generator
    from air_plugin.utils.errors import UserError
    import open_clip.pretrained, open_clip.factory
    small = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16}
    words = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    open_clip.factory._MODEL_CONFIGS["NEW"] = {"embed_dim": 24, "vision_cfg": small, "text_cfg": words}
    tags = {owner: {"hf_hub": f"{owner}/model/"} for owner in sys.argv[1:]}
    open_clip.pretrained._PRETRAINED["NEW"] = tags

    def line(work, *arguments, **options):
        try:
            work(*arguments, **options)
        except UserError as error:
            return str(error)

    found = {}
    for owner in sys.argv[1:]:
        found[owner] = [
            line(load_generator, f"{owner}/model"),
            line(load_generator, "mini", lcm_lora=f"{owner}/model"),
            line(load_backbone, f"NEW:{owner}"),
            line(load_backbone, f"hf:{owner}/model"),
        ]
    print(json.dumps(found))
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does, by the owner's name."""

    def do_GET(self) -> None:
        owner = next((part for part in self.path.split("/") if part in ANSWERS or part == DEAF), "none")
        if owner == DEAF:
            self.close_connection = True
            return
        status, code = ANSWERS[owner]
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def surroundings(folder: Path, endpoint: str) -> dict[str, str]:
    """The environment of a process that takes `endpoint` for the hub and has nobody's token."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "AIR_"))}
    environment |= {"HOME": str(folder), "HF_HOME": str(folder / "hub"), "HF_ENDPOINT": endpoint}
    return environment | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "PYTHONPATH": str(ROOT)}


def ask(folder: Path, endpoint: str, owners: list[str]) -> dict[str, list[str]]:
    environment = surroundings(folder, endpoint)
    done = subprocess.run(
        [sys.executable, "-c", ASK, *owners], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_hubs_answer_is_told_as_it_is(tmp_path: Path, hub: str):
    """Item 22: gated, not found, no such revision, no network; of a generator, an adapter and a backbone."""
    found = ask(tmp_path, hub, [*ANSWERS, DEAF])
    expected = {
        "gated": "accept its terms at https://huggingface.co/gated/model",
        "login": "accept its terms at https://huggingface.co/login/model",
        "none": "there is no such model on the hub",
        "hidden": "there is no such model on the hub, or it is private",
        "old": "it has no such revision",
        "closed": "access to it must be granted",
    }
    for owner, message in expected.items():
        for line in found[owner]:
            assert message in line and owner in line and "network" not in line and "\n" not in line, line
    assert "does not appear to have a file named model_index.json" in found["other"][0]
    for line in found[DEAF]:
        assert re.search("the network (is off or )?does not answer", line) and "model_index.json" not in line, line


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        (["MODEL.BACKBONE.NAME", "hf:login/model"], "backbone 'hf:login/model' cannot be fetched"),
        (["MODEL.BACKBONE.NAME", "mini", "AIR.GENERATOR", "login/model"], "generator 'login/model' cannot be loaded"),
    ],
)
def test_a_gated_model_without_a_token_is_one_line(options: list[str], refused: str, tmp_path: Path, hub: str):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "one.png")
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    command = [sys.executable, "-m", "air_plugin.cli", "prototypes", "images", "--classes", "names.txt"]
    done = subprocess.run(
        [*command, *options], capture_output=True, text=True, env=surroundings(tmp_path, hub), cwd=tmp_path, timeout=120
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.endswith(
        f"error: {refused}: access to it must be granted: accept its terms at "
        "https://huggingface.co/login/model, then log in with 'hf auth login'\n"
    )


@pytest.mark.parametrize("name", ["/nowhere/sd15", "./sd15", "../sd15", "~/nowhere/sd15", "a/b/c", "models\\sd15"])
@pytest.mark.parametrize("offline", ["", "1"])
def test_a_folder_that_does_not_exist_is_not_to_be_downloaded(
    name: str, offline: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Item 22."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AIR_OFFLINE", offline)
    with pytest.raises(UserError, match=r"names the folder .*sd15|names the folder a/b/c") as raised:
        load_generator(name)
    assert "does not exist" in str(raised.value) and "download" not in str(raised.value)


def test_a_file_is_no_folder(tmp_path: Path):
    """Item 22."""
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="is a file; give a folder"):
        load_generator(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("suffix", ["pt", "pth", "bin", "safetensors"])
def test_a_weight_file_that_does_not_exist_is_missing(suffix: str):
    """Item 22, of backbones: it is no pretrained tag."""
    with pytest.raises(UserError, match=rf"backbone file /nowhere/clip\.{suffix} is missing"):
        load_backbone(f"ViT-B-32:/nowhere/clip.{suffix}")
