"""Files, seeds, logs, meters, checkpoint files."""

from __future__ import annotations

import io
import os
import random
import re
import sys

import numpy as np
import pytest
import torch
from dassl_small import standin_only
from torch import nn


def test_files_and_directories(tmp_path):
    from dassl.utils import check_isfile, listdir_nohidden, mkdir_if_missing, read_json, write_json

    folder = tmp_path / "a" / "b"
    mkdir_if_missing(str(folder))
    mkdir_if_missing(str(folder))
    write_json({"x": [1, 2]}, str(folder / "new" / "file.json"))
    assert read_json(str(folder / "new" / "file.json")) == {"x": [1, 2]}
    (folder / ".hidden").touch()
    (folder / "afile").touch()
    assert listdir_nohidden(str(folder), sort=True) == ["afile", "new"]
    assert check_isfile(str(folder / "afile"))
    with pytest.warns(UserWarning, match="nofile"):
        assert not check_isfile(str(folder / "nofile"))


def test_seeds_reach_every_generator():
    from dassl.utils import set_random_seed

    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    set_random_seed(7)
    first = draw()
    assert draw() != first
    set_random_seed(7)
    assert draw() == first


def test_small_helpers():
    from dassl.utils import check_availability, count_num_param, tolist_if_not

    names = ["a"]
    assert tolist_if_not("a") == ["a"] and tolist_if_not(names) is names
    model = nn.Linear(3, 2)
    assert count_num_param(model) == count_num_param(params=list(model.parameters())) == 8
    with pytest.raises(ValueError):
        count_num_param()
    check_availability("CoOp", ["CoOp", "CPL"])
    with pytest.raises(ValueError, match=r"Coop.*CoOp"):
        check_availability("Coop", ["CoOp", "CPL"])


@standin_only
def test_environment_information(monkeypatch):
    import torch.utils.collect_env

    monkeypatch.setattr(torch.utils.collect_env, "get_pretty_env_info", lambda: "PyTorch version: 0")
    from dassl.utils import collect_env_info

    assert re.fullmatch(r"PyTorch version: 0\n +Pillow \(\d.*\)", collect_env_info())


# Meters


def test_average_meter():
    from dassl.utils import AverageMeter

    meter = AverageMeter()
    meter.update(1.0)
    meter.update(torch.tensor(4.0), n=2)
    assert (meter.val, meter.sum, meter.count, meter.avg) == (4.0, 9.0, 3, 3.0)
    meter.reset()
    assert meter.count == 0 and meter.avg == 0
    moving = AverageMeter(ema=True)
    moving.update(10.0)
    moving.update(20.0)
    assert moving.avg == pytest.approx(0.9 * 1.0 + 0.1 * 20.0)


def test_metric_meter():
    from dassl.utils import MetricMeter

    meter = MetricMeter()
    meter.update({"loss": 1.0, "acc": torch.tensor(50.0)})
    meter.update({"loss": 2.0})
    meter.update(None)
    assert str(meter) == "loss 2.0000 (1.5000) acc 50.0000 (50.0000)"
    with pytest.raises(TypeError):
        meter.update([1.0])


# Logs


def own_console(monkeypatch):
    """A standard output of our own, until the test ends (not a fixture: pytest swaps it after those)."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    return stream


def test_log_file_gets_what_the_console_gets(tmp_path, monkeypatch):
    from dassl.utils import setup_logger

    console = own_console(monkeypatch)
    setup_logger(str(tmp_path / "out"))
    print("hello")
    sys.stdout.flush()
    assert (tmp_path / "out" / "log.txt").read_text() == "hello\n" == console.getvalue()


def test_log_to_a_named_file_or_to_none(tmp_path, monkeypatch):
    from dassl.utils import setup_logger

    console = own_console(monkeypatch)
    setup_logger(None)
    assert sys.stdout is console
    setup_logger(str(tmp_path / "my.log"))
    print("hello", flush=True)
    assert (tmp_path / "my.log").read_text() == "hello\n"


@standin_only
def test_logs_can_be_set_up_again_and_again(tmp_path, monkeypatch):
    from dassl.utils import setup_logger

    console = own_console(monkeypatch)
    for number in range(3):
        setup_logger(str(tmp_path))
        print("run", number)
    later = sorted(path.name for path in tmp_path.iterdir())
    assert later[0] == "log.txt"
    assert all(re.fullmatch(r"log\.txt-\d{4}-\d\d-\d\d-\d\d-\d\d-\d\d", name) for name in later[1:])
    assert (tmp_path / "log.txt").read_text() == "run 0\n", "an older log is neither replaced nor continued"
    assert "".join((tmp_path / name).read_text() for name in later) == "run 0\nrun 1\nrun 2\n"
    assert console.getvalue() == "run 0\nrun 1\nrun 2\n", "each line reaches the console once"
    sys.stdout.close()
    print("after")
    assert console.getvalue().endswith("after\n"), "the console stays open"


@standin_only
def test_loggers_do_not_write_into_each_other(tmp_path, monkeypatch):
    from dassl.utils import Logger

    console = own_console(monkeypatch)
    loggers = []
    for name in ("a", "b"):
        loggers.append(Logger(str(tmp_path / name)))
        sys.stdout = loggers[-1]
        print(name)
    for logger in loggers:
        logger.close()
    assert console.getvalue() == "a\nb\n"
    assert [(tmp_path / name).read_text() for name in ("a", "b")] == ["a\n", "b\n"]


@standin_only
def test_a_killed_run_leaves_its_last_line_in_the_log(tmp_path, monkeypatch):
    from dassl.utils import setup_logger

    own_console(monkeypatch)
    setup_logger(str(tmp_path))
    print("written without a flush")
    assert (tmp_path / "log.txt").read_text() == "written without a flush\n"
    sys.stdout.close()


@standin_only
def test_the_logger_answers_like_a_console(tmp_path, monkeypatch):
    from dassl.utils import setup_logger

    own_console(monkeypatch)
    setup_logger(str(tmp_path))
    assert sys.stdout.isatty() is False and sys.stdout.writable()
    with pytest.raises(AttributeError):
        _ = sys.stdout.no_such_thing


# Checkpoint files


def save(folder, epoch, **options):
    from dassl.utils import save_checkpoint

    model = nn.Linear(2, 2)
    save_checkpoint({"state_dict": model.state_dict(), "epoch": epoch}, str(folder), **options)
    return model


def test_checkpoint_file_names(tmp_path, capsys):
    save(tmp_path, 1)
    assert (tmp_path / "checkpoint").read_text() == "model.pth.tar-1\n"
    assert f"Checkpoint saved to {tmp_path / 'model.pth.tar-1'}" in capsys.readouterr().out
    save(tmp_path, 2, model_name="model-best.pth.tar")
    assert (tmp_path / "checkpoint").read_text() == "model-best.pth.tar\n"
    save(tmp_path, 3, is_best=True)
    saved = ["checkpoint", "model-best.pth.tar", "model.pth.tar-1", "model.pth.tar-3"]
    assert sorted(os.listdir(tmp_path)) == saved
    best = torch.load(tmp_path / "model-best.pth.tar", weights_only=True)
    assert best["epoch"] == 3


def test_module_prefix_is_cut_off(tmp_path, monkeypatch):
    from dassl.utils import load_checkpoint, load_pretrained_weights, save_checkpoint

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # DataParallel would move the model to a GPU
    wrapped = nn.DataParallel(nn.Linear(2, 2))
    save_checkpoint({"state_dict": wrapped.state_dict(), "epoch": 1}, str(tmp_path))
    path = str(tmp_path / "model.pth.tar-1")
    assert sorted(load_checkpoint(path)["state_dict"]) == ["bias", "weight"]

    torch.save(wrapped.state_dict(), tmp_path / "raw")
    model = nn.Linear(2, 2)
    load_pretrained_weights(model, str(tmp_path / "raw"))
    assert torch.equal(model.weight, wrapped.module.weight)


def test_pretrained_weights_that_do_not_fit_are_left_out(tmp_path, capsys):
    from dassl.utils import load_pretrained_weights

    saved = save(tmp_path, 1)
    model = nn.Linear(2, 2)
    model.bias = nn.Parameter(torch.zeros(5))
    load_pretrained_weights(model, str(tmp_path / "model.pth.tar-1"))
    assert torch.equal(model.weight, saved.weight) and model.bias.shape == (5,)
    assert "['bias']" in capsys.readouterr().out
    with pytest.warns(UserWarning, match=r"model.pth.tar-1"):
        load_pretrained_weights(nn.Conv1d(7, 7, 7), str(tmp_path / "model.pth.tar-1"))


def test_a_missing_checkpoint_is_named(tmp_path):
    from dassl.utils import load_checkpoint

    with pytest.raises(FileNotFoundError, match=r"nothing.pth"):
        load_checkpoint(str(tmp_path / "nothing.pth"))
    with pytest.raises(ValueError):
        load_checkpoint(None)


class Stranger:
    """Not a plain value."""


@standin_only
@pytest.mark.parametrize("damage", ["cut", "empty", "text", "object"])
def test_a_bad_checkpoint_gives_one_line_that_names_the_file(tmp_path, damage):
    from dassl.utils import load_checkpoint

    save(tmp_path, 1)
    path = tmp_path / "model.pth.tar-1"
    if damage == "object":
        torch.save({"state_dict": Stranger()}, path)
    else:
        content = path.read_bytes()
        path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "text": b"hello" * 99}[damage])
    with pytest.raises(RuntimeError, match=r"model.pth.tar-1") as caught:
        load_checkpoint(str(path))
    assert "\n" not in str(caught.value)


@standin_only
@pytest.mark.parametrize("moment", ["model", "pointer"])
def test_a_run_killed_while_saving_leaves_the_earlier_checkpoint(tmp_path, monkeypatch, moment):
    from dassl.utils import load_checkpoint, resume_from_checkpoint

    first = save(tmp_path, 1, model_name="model-best.pth.tar")
    whole_save, replace = torch.save, os.replace

    def killed_save(state, path):
        whole_save(state, path)
        with open(path, "r+b") as file:
            file.truncate(100)
        raise KeyboardInterrupt

    def killed_replace(source, target):
        if os.path.basename(target) == "checkpoint":
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        if moment == "model":
            patch.setattr(torch, "save", killed_save)
        else:
            patch.setattr(os, "replace", killed_replace)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2, model_name="model-best.pth.tar" if moment == "model" else "")

    assert (tmp_path / "checkpoint").read_text() == "model-best.pth.tar\n"
    assert load_checkpoint(str(tmp_path / "model-best.pth.tar"))["epoch"] == 1
    model = nn.Linear(2, 2)
    assert resume_from_checkpoint(str(tmp_path), model) == 1
    assert torch.equal(model.weight, first.weight)


@standin_only
def test_an_empty_checkpoint_note_is_named(tmp_path):
    from dassl.utils import resume_from_checkpoint

    (tmp_path / "checkpoint").touch()
    with pytest.raises(RuntimeError, match=r"checkpoint.*empty"):
        resume_from_checkpoint(str(tmp_path), nn.Linear(1, 1))
