"""Transformer generators through the command line: SIGKILL, then the same command again; and bad input."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest
from runs import ROOT
from small_generators import save_pipeline, side_of
from small_models import write_pictures

from air_plugin.cli import main

LIBRARIES = ["air_plugin.cli.stages", "air_plugin.auxiliary.build", "diffusers", "transformers", "peft", "open_clip"]
TARGETS = {"sana": "['to_q','to_v']"}


def begin(line: list[str]) -> None:
    """What a process does: `air`, without its output."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1), os.dup2(nowhere.fileno(), 2)
    raise SystemExit(main(line))


def command(architecture: str, root: Path, store: str) -> list[str]:
    """`air generate`: LoRA of 12 steps, a checkpoint after every second one, and 8 images in four batches."""
    options = {
        "MODEL.BACKBONE.NAME": "mini",
        "AIR.GENERATOR": str(root / "generator"),
        "AIR.SCHEDULER": "own",
        "AIR.SIZE": str(side_of(architecture)),
        "AIR.M": "2",
        "AIR.K": "1",
        "AIR.BATCH": "2",
        "AIR.STEPS": "10",
        "AIR.THREADS": "1",
        "AIR.LORA.RANK": "2",
        "AIR.LORA.STEPS": "12",
        "AIR.LORA.CHECKPOINT": "2",
        "AIR.LORA.BATCH": "2",
        "AIR.LORA.LR": "0.01",
        "AIR.LORA.TARGETS": TARGETS.get(architecture, "['attn.to_q','attn.add_v_proj']"),
    }
    words = [word for option in options.items() for word in option]
    names = ["--classes", str(root / "names.txt"), "--store", str(root / store), "--device", "cpu"]
    return ["generate", str(root / "pictures"), *names, *words]


def contents(store: Path) -> dict[str, bytes]:
    """The adapter, its loss curve and the images, by their names in the store."""
    kinds = ("lora/*/*.safetensors", "images/*/*.png")
    return {str(p.relative_to(store)): p.read_bytes() for kind in kinds for p in sorted(store.glob(kind))}


@pytest.mark.full
@pytest.mark.parametrize("architecture", ["sd35", "flux_schnell", "sana"])
def test_killed_during_lora_and_images_and_started_again(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save_pipeline(architecture, tmp_path / "generator")
    write_pictures(tmp_path / "pictures", 6)
    (tmp_path / "names.txt").write_text("dog\nsea\ncat\nfox\n")
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(LIBRARIES)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def start(store: str) -> multiprocessing.Process:
        process = server.Process(target=begin, args=[command(architecture, tmp_path, store)])
        process.start()
        return process

    cut = tmp_path / "cut"
    for pattern in ("lora/*/checkpoint.safetensors", "images/*/manifest.jsonl"):
        process = start("cut")
        while process.is_alive() and not any(cut.glob(pattern)):
            time.sleep(0.002)
        process.kill()
        process.join()
        assert process.exitcode == -9, pattern
        if pattern.startswith("lora"):
            assert not any(cut.glob("lora/*/pytorch_lora_weights.safetensors"))
    assert len(list(cut.glob("images/*/*.png"))) < 8
    for store in ("cut", "whole"):
        last = start(store)
        last.join()
        assert last.exitcode == 0
    found = contents(cut)
    assert found == contents(tmp_path / "whole")
    assert sum(name.endswith(".png") for name in found) == 8 and len(set(found.values())) == len(found)
    (manifest,) = cut.glob("images/*/manifest.jsonl")
    keys = [json.loads(line)["key"] for line in manifest.read_text().splitlines()]
    assert len(keys) == len(set(keys)) == 8


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ("WanPipeline", [], "StableDiffusion3Pipeline, FluxPipeline, SanaPipeline"),
        ("", ["AIR.SCHEDULER", "dpm"], "which needs own"),
        ("", ["AIR.SIZE", "40"], "multiple of 32"),
        ("", ["AIR.LORA.TARGETS", "['to_x']"], "AIR.LORA.TARGETS"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    change: str, options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    index = save_pipeline("sana", tmp_path / "generator") / "model_index.json"
    if change:
        index.write_text(index.read_text().replace("SanaPipeline", change))
    write_pictures(tmp_path / "pictures", 6)
    (tmp_path / "names.txt").write_text("dog\nsea\ncat\nfox\n")
    capsys.readouterr()
    assert main([*command("sana", tmp_path, "store"), *options]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1] and "Traceback" not in "".join(lines), lines
