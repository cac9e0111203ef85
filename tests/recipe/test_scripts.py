"""The scripts, as a person types them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from runs import ROOT, SHORT


def bash(script: str, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # this python, activated or not
    return subprocess.run(
        ["bash", str(ROOT / script), *args],
        env={**os.environ, "PATH": path, **environment},
        capture_output=True,
        text=True,
    )


def test_main_script_runs_every_seed_prints_the_table_and_skips_what_is_complete(tmp_path: Path) -> None:
    places = {"DATA": str(tmp_path), "OUTPUT": str(tmp_path / "out"), "SEEDS": "1 2"}
    first = bash("scripts/air/main.sh", "digits", *SHORT, **places)
    assert first.returncode == 0, first.stderr
    for method in ("ZeroshotCLIP", "CPL", "AiR"):
        assert f"| digits     | {method} (mini+" in first.stdout
    results = sorted((tmp_path / "out" / "digits").glob("*/*/seed*/result.json"))
    assert len(results) == 6  # zero-shot, CPL and AiR, two seeds each
    assert (tmp_path / "out" / "digits" / "gallery.png").is_file()
    prototypes = {json.loads(p.read_text())["seed"]: p for p in results if "AiR" in p.parts}
    assert set(prototypes) == {1, 2}
    assert len(list((tmp_path / "out" / "cache" / "lora").glob("*/entry.json"))) == 2  # one a seed

    second = bash("scripts/air/main.sh", "digits", *SHORT, **places)
    assert second.returncode == 0
    assert second.stdout.count("complete, nothing to do") == 6
    table = first.stdout[first.stdout.index("digits: backbone") :]
    assert second.stdout.endswith(table)


def test_bad_names_and_places(tmp_path: Path) -> None:
    for args, environment, named in (
        (("digit",), {}, "digits"),
        (("digits", "minni"), {}, "mini"),
        (("digits",), {"DATA": str(tmp_path / "missing")}, "missing"),
        (("digits",), {"SEEDS": "one"}, "SEEDS"),
    ):
        done = bash("scripts/air/main.sh", *args, **{"OUTPUT": str(tmp_path), "DATA": str(tmp_path), **environment})
        assert done.returncode == 2
        assert done.stderr.startswith("error: ") and named in done.stderr and done.stderr.count("\n") == 1
