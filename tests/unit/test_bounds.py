"""The lowest versions of packages: what pyproject.toml allows is what a job of CI installs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.public_reports
def test_the_lowest_versions_are_those_that_ci_installs():
    """Item 21: lower bounds that were never installed together did not work together."""
    text = (ROOT / "pyproject.toml").read_text()
    (needed,) = re.findall(r"^dependencies = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    (report,) = re.findall(r"^report = \[(.*?)\]", text, re.MULTILINE)
    bounds = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', needed + report))
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / ".github" / "lowest.txt").read_text(), re.MULTILINE))
    assert {"torch", "diffusers", "transformers", "peft", "open_clip_torch", "scipy"} <= bounds.keys()
    for name, bound in bounds.items():
        version = pins[name].split(".")
        assert version[: bound.count(".") + 1] == bound.split(".") and set(version[bound.count(".") + 1 :]) <= {"0"}
