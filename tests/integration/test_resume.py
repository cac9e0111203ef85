"""From where a run goes on: its own folder, or another one that --resume names; never checkpoints of another run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import arguments, figures, weights

import train
from trainers.prompt_trainer import PromptTrainer

pytestmark = pytest.mark.public_reports
Finished = Callable[..., Path]
ROUNDS = ["TRAINER.PROMPT.ROUNDS", "2", "OPTIM.MAX_EPOCH", "2"]


class Stopped(Exception):
    pass


def stop_at(monkeypatch: pytest.MonkeyPatch, epoch: int, line: list[str]) -> None:
    """Run until an epoch begins."""
    run_epoch = PromptTrainer.run_epoch

    def until(self: PromptTrainer) -> None:
        if self.epoch == epoch:
            raise Stopped
        run_epoch(self)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(PromptTrainer, "run_epoch", until)
        train.main(line)


@pytest.mark.parametrize("trainer", ["UPL", "CPL", "AiR", "CoOp"])
def test_a_run_goes_on_from_another_folder(
    trainer: str, finished: Finished, data: Path, cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """18: with the rounds that lie there, and from its own checkpoints once it has some; the result is the same."""
    options = ["DATASET.NUM_SHOTS", "4"] if trainer == "CoOp" else ROUNDS
    whole = finished(trainer, *options)
    stop_at(monkeypatch, 2, arguments(trainer, data, tmp_path / "first", "AIR.CACHE", cache, *options))
    second = arguments(trainer, data, tmp_path / "second", "AIR.CACHE", cache, *options)
    second = ["--resume", str(tmp_path / "first"), *second]
    if trainer != "CoOp":
        stop_at(monkeypatch, 3, second)
        shutil.rmtree(tmp_path / "first" / "rounds")  # not needed any more
    assert train.main(second) == 0
    assert torch.equal(weights(whole)["ctx"], weights(tmp_path / "second")["ctx"])
    assert figures(whole) == figures(tmp_path / "second")
    assert train.main(arguments(trainer, data, tmp_path / "second", "AIR.CACHE", cache, *options)) == 0


def test_a_folder_without_checkpoints_is_named(
    data: Path, cache: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """18: --resume of a wrong folder does not train from the start in silence."""
    line = ["--resume", str(tmp_path / "none"), *arguments("UPL", data, tmp_path / "run", "AIR.CACHE", cache)]
    assert train.main(line) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "none") in error and error.count("\n") == 1


def config_of(trainer: str, data: Path, output: Path, cache: str, *options: str, seed: int = 1) -> Any:
    cfg, _ = train.set_up(train.parse(arguments(trainer, data, output, "AIR.CACHE", cache, *options, seed=seed)))
    cfg.freeze()
    return cfg


def train_as_coop(trainer: str, data: Path, output: Path, cache: str, *options: str, seed: int = 1) -> None:
    """Train as CoOp's own train.py does, which does not look at what a folder holds."""
    train.build(config_of(trainer, data, output, cache, *options, seed=seed)).train()


def other_images(data: Path, target: Path) -> Path:
    """The same names, the first ten images in another order."""
    shutil.copytree(data / "digits", target / "digits")
    first = sorted((target / "digits" / "images").iterdir())[:10]
    contents = [path.read_bytes() for path in first]
    for path, content in zip(first, contents[1:] + contents[:1], strict=True):
        path.chmod(0o644)
        path.write_bytes(content)
    return target


@pytest.mark.parametrize("trainer", ["UPL", "CoOp"])
def test_checkpoints_of_another_run_are_refused(trainer: str, data: Path, cache: str, tmp_path: Path) -> None:
    """18: another seed, other images, another trainer, other classes in the same OUTPUT_DIR of a CoOp checkout."""
    from air_plugin.utils.errors import UserError

    shots = ["DATASET.NUM_SHOTS", "4"] if trainer == "CoOp" else []
    output = tmp_path / "run"
    train_as_coop(trainer, data, output, cache, *shots)
    with pytest.raises(UserError, match=r"seed 1 \(now 2\)"):
        train_as_coop(trainer, data, output, cache, *shots, seed=2)
    with pytest.raises(UserError, match="other images"):
        train_as_coop(trainer, other_images(data, tmp_path / "data"), output, cache, *shots)
    with pytest.raises(UserError, match="other classes"):
        train_as_coop(trainer, data, output, cache, *shots, "DATASET.SUBSAMPLE_CLASSES", "base")
    with pytest.raises(UserError, match="other trainer"):
        train_as_coop("CPL", data, output, cache)
    train_as_coop(trainer, data, output, cache, *shots)  # the same again is only tested again


def test_rounds_of_other_images_are_one_line_where_nothing_says_of_which(
    data: Path, cache: str, tmp_path: Path
) -> None:
    """18: checkpoints of the version before have no identity; fewer images ended in an IndexError."""
    from air_plugin.utils.errors import UserError

    train_as_coop("CPL", data, tmp_path / "run", cache)
    (tmp_path / "run" / "trained_on.json").unlink(missing_ok=True)
    shutil.copytree(data / "digits", tmp_path / "data" / "digits")
    split = tmp_path / "data" / "digits" / "split.json"
    split.chmod(0o644)
    items = json.loads(split.read_text())
    items["train"] = items["train"][:300]
    split.write_text(json.dumps(items))
    with pytest.raises(UserError, match="other images or classes"):
        train_as_coop("CPL", tmp_path / "data", tmp_path / "run", cache)
