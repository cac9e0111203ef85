"""Two processes that build the same auxiliary classifier in one store at the same time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from runs import ROOT, arguments


@pytest.mark.full
def test_two_drivers_generate_every_image_once_and_end_with_the_same_classifier(data: Path, tmp_path: Path):
    options = ["AIR.CACHE", str(tmp_path / "cache"), "AIR.M", "6", "AIR.BATCH", "4", "AIR.STEPS", "4"]
    drivers = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *arguments("AiR", data, tmp_path / name, *options)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name in "ab"
    ]
    for driver in drivers:
        output, _ = driver.communicate(timeout=300)
        assert driver.returncode == 0, output
    (manifest,) = (tmp_path / "cache" / "images").rglob("manifest.jsonl")
    keys = [json.loads(line)["key"] for line in manifest.read_text().splitlines()]
    assert len(keys) == len(set(keys)) == 6 * 10 == len(list(manifest.parent.glob("*.png")))
    bundles = [sorted((tmp_path / name / "bundle").rglob("*.safetensors")) for name in "ab"]
    assert len(bundles[0]) == len(bundles[1]) > 0
    for first, second in zip(*bundles, strict=True):
        assert first.read_bytes() == second.read_bytes()
    heads = [json.loads((tmp_path / name / "result.json").read_text())["heads"] for name in "ab"]
    assert heads[0] == heads[1]
