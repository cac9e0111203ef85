"""Where a result came from, how long its stages took, and errors for people."""

from __future__ import annotations

import errno
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest

from air_plugin.utils.errors import is_disk_full, unknown
from air_plugin.utils.provenance import PACKAGES, Stages, collect


def test_stages_are_kept_in_order_with_their_times(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, logger="air_plugin")
    stages = Stages()
    with stages.stage("first"):
        pass
    with stages.stage("second") as stage:
        stage.cached = True
    assert [(stage.name, stage.cached) for stage in stages.done] == [("first", False), ("second", True)]
    assert all(stage.seconds >= 0 for stage in stages.done)
    assert re.fullmatch(r"stage first: \d+\.\d s", caplog.messages[0])
    assert re.fullmatch(r"stage second: \d+\.\d s \(from the store\)", caplog.messages[1])


def test_a_stage_that_failed_is_not_among_those_done():
    stages = Stages()
    with pytest.raises(RuntimeError), stages.stage("broken"):
        raise RuntimeError
    assert stages.done == []


def test_commit_and_state_of_a_checkout(tmp_path: Path):
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], capture_output=True, text=True)
        return done.stdout.strip()

    git("init")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "--no-verify", "-m", "first")
    clean = collect(tmp_path)
    assert clean["commit"] == git("rev-parse", "HEAD") and len(clean["commit"]) == 40 and clean["dirty"] is False
    (tmp_path / "file").write_text("two")
    assert collect(tmp_path)["dirty"] is True


def test_outside_of_a_checkout_nothing_is_made_up(tmp_path: Path):
    found = collect(tmp_path / "nowhere")
    assert found["commit"] is None and found["dirty"] is None


def test_versions_and_the_origin_of_dassl(tmp_path: Path):
    import dassl
    import torch

    found = collect(tmp_path)
    assert set(found["packages"]) == {"air-plugin", *PACKAGES}
    assert found["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["dassl"] == {"version": dassl.__version__, "path": dassl.__file__}
    assert found["command"] == sys.argv


def test_near_matches_come_whatever_the_case():
    assert str(unknown("data set", "DIGIT", ["Digits", "Flowers"])) == "unknown data set 'DIGIT'; did you mean Digits?"
    assert str(unknown("data set", "xyz", ["b", "a"])) == "unknown data set 'xyz'; known: a, b"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_seen_through_other_errors(number: int):
    assert is_disk_full(OSError(number, "full"))
    with pytest.raises(RuntimeError) as caused:
        try:
            raise OSError(number, "full")
        except OSError as error:
            raise RuntimeError("writing failed") from error
    assert is_disk_full(caused.value)
    with pytest.raises(RuntimeError) as during:
        try:
            raise OSError(number, "full")
        except OSError:
            raise RuntimeError("while cleaning up")  # noqa: B904
    assert is_disk_full(during.value)


def test_other_faults_are_no_full_disk():
    assert not is_disk_full(OSError(errno.ENOENT, "missing")) and not is_disk_full(ValueError("No space"))
    assert is_disk_full(RuntimeError("safetensors: No space left on device (os error 28)"))
