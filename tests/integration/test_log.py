"""People's scripts read accuracies from log.txt, as CoOp's parse_test_res.py does; result.json must say the same."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import arguments

import train
from trainers.self_training import SelfTraining


def parsed(directory: Path, keyword: str = "accuracy", end: str = "Finish training") -> dict[str, float]:
    """Of every seed's log.txt the last `* KEYWORD: ...%` from the line `end` on, by folder."""
    found = {}
    for folder in sorted(path for path in directory.iterdir() if not path.name.startswith(".")):
        good = False
        for line in (folder / "log.txt").read_text().splitlines():
            good = good or line.strip() == end
            match = re.search(rf"\* {keyword}: ([\.\deE+-]+)%", line)
            if match and good:
                found[folder.name] = float(match[1])
    return found


def primary(run: Path) -> float:
    result = json.loads((run / "result.json").read_text())
    return result["heads"][result["primary"]]["accuracy"]


@pytest.mark.parametrize(
    ("trainer", "options"),
    [
        ("ZeroshotCLIP", []),
        ("CoOp", ["DATASET.NUM_SHOTS", "1"]),
        ("CPL", ["TRAINER.PROMPT.ROUNDS", "2"]),
        ("AiR", ["AIR.PROTOTYPES", "real", "AIR.PRIMARY", "fused"]),
        ("AiR", ["AIR.PROTOTYPES", "real", "AIR.PRIMARY", "text"]),
    ],
)
def test_the_log_says_what_the_result_says(
    trainer: str, options: list[str], finished: Callable[..., Path], tmp_path: Path
) -> None:
    for seed in (1, 2) if trainer == "ZeroshotCLIP" else (1,):
        (tmp_path / f"seed{seed}").symlink_to(finished(trainer, *options, seed=seed))
    found = parsed(tmp_path)
    assert found.keys() == {path.name for path in tmp_path.iterdir()}
    for name, value in found.items():
        assert value == pytest.approx(primary(tmp_path / name), abs=0.05 + 1e-9)
    assert parsed(tmp_path, keyword="macro_f1").keys() == found.keys()
    assert parsed(tmp_path, end="=> result") == found


def test_after_a_kill_log_txt_is_the_finished_runs(
    data: Path, cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(Exception):
        pass

    def killed(self: SelfTraining) -> None:
        raise Killed

    line = arguments("CPL", data, tmp_path / "config" / "seed1", "AIR.CACHE", cache)
    with monkeypatch.context() as patch:
        patch.setattr(SelfTraining, "run_epoch", killed)
        with pytest.raises(Killed):
            train.main(line)
    assert parsed(tmp_path / "config") == {}
    assert train.main(line) == 0
    run = tmp_path / "config" / "seed1"
    assert parsed(tmp_path / "config")["seed1"] == pytest.approx(primary(run), abs=0.05 + 1e-9)
    assert len(list(run.glob("log.txt*"))) == 2
