"""notebooks/quickstart.ipynb, executed as a person would: every cell, in a fresh kernel."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "quickstart.ipynb"


@pytest.mark.full
def test_the_notebook_runs_and_the_fused_head_is_better(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not [cell for cell in notebook.cells if cell.get("outputs")]  # the repository keeps it without results
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs)
    accuracy = {head: float(value) for head, value in re.findall(r"^(text|fused) +([\d.]+) %$", text, re.MULTILINE)}
    assert accuracy["fused"] > accuracy["text"] + 5
    assert len([output for output in outputs if "image/png" in output.get("data", {})]) == 2
    assert outputs[-1]["data"]["text/plain"] == "True"
    assert list((tmp_path / "caches" / "air_plugin" / "images").iterdir())
