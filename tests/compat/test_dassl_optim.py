"""Optimizers and learning-rate schedules."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from dassl_small import standin_only, tiny_cfg
from torch import nn


def optim_cfg(**options):
    """cfg.OPTIM: SGD with a base rate of 1, cosine, 6 epochs, no warm-up."""
    cfg = tiny_cfg("", "").OPTIM
    cfg.LR, cfg.MAX_EPOCH = 1.0, 6
    for key, value in options.items():
        cfg[key] = value
    return cfg


def build(cfg):
    from dassl.optim import build_lr_scheduler, build_optimizer

    optimizer = build_optimizer(nn.Linear(1, 1), cfg)
    return optimizer, build_lr_scheduler(optimizer, cfg)


def run(optimizer, scheduler, epochs):
    """The learning rate of each epoch."""
    rates = []
    for _ in range(epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


WARM = {"LR_SCHEDULER": "cosine", "WARMUP_EPOCH": 2}
SCHEDULES = {
    "cosine": ({"LR_SCHEDULER": "cosine"}, [1, 0.93301, 0.75, 0.5, 0.25, 0.06699]),
    "single_step": ({"LR_SCHEDULER": "single_step", "STEPSIZE": (2,)}, [1, 1, 0.1, 0.1, 0.01, 0.01]),
    "single_step, default": ({"LR_SCHEDULER": "single_step"}, [1] * 6),
    "multi_step": ({"LR_SCHEDULER": "multi_step", "STEPSIZE": (1, 4)}, [1, 0.1, 0.1, 0.1, 0.01, 0.01]),
    "multi_step, default": ({"LR_SCHEDULER": "multi_step"}, [1] * 6),
    "constant": ({**WARM, "WARMUP_TYPE": "constant"}, [1e-5, 1e-5, 1, 0.93301, 0.75, 0.5]),
    "linear": ({**WARM, "WARMUP_TYPE": "linear"}, [1e-5, 0.5, 1, 0.93301, 0.75, 0.5]),
    "constant, not recounted": (
        {**WARM, "WARMUP_TYPE": "constant", "WARMUP_RECOUNT": False},
        [1e-5, 1e-5, 1, 0.66667, 0.33333, 0.08932],
    ),
    "single_step after linear": (
        {**WARM, "WARMUP_TYPE": "linear", "LR_SCHEDULER": "single_step", "STEPSIZE": (3,)},
        [1e-5, 0.5, 1, 1, 1, 0.1],
    ),
    "multi_step after linear, not recounted": (
        {**WARM, "LR_SCHEDULER": "multi_step", "STEPSIZE": [1, 4], "WARMUP_RECOUNT": False},
        [1e-5, 0.5, 1, 1, 0.1, 0.1],
    ),
}


@standin_only  # upstream's warm-up fails on current torch
@pytest.mark.parametrize("name", SCHEDULES)
def test_learning_rates(name):
    options, expected = SCHEDULES[name]
    rates = run(*build(optim_cfg(**options)), 6)
    assert [round(rate, 5) for rate in rates] == expected


def test_learning_rates_are_those_of_torchs_schedulers():
    """Without warm-up, to the last digits."""
    for epochs in (1, 7, 200):
        ours = run(*build(optim_cfg(MAX_EPOCH=epochs, LR=0.002)), epochs)
        optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.002)
        theirs = run(optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs), epochs)
        assert ours == pytest.approx(theirs, rel=1e-9)


@standin_only
def test_every_parameter_group_follows_its_own_base_rate():
    from dassl.optim import build_lr_scheduler, build_optimizer

    cfg = optim_cfg(**WARM, WARMUP_TYPE="linear")
    first, second = nn.Linear(1, 1), nn.Linear(1, 1)
    groups = [{"params": first.parameters(), "lr": 0.5}, {"params": second.parameters()}]
    optimizer = build_optimizer(groups, cfg)
    scheduler = build_lr_scheduler(optimizer, cfg)
    rates = []
    for _ in range(4):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    expected = [[1e-5, 1e-5], [0.25, 0.5], [0.5, 1.0], [0.46651, 0.93301]]
    assert [[round(rate, 5) for rate in pair] for pair in rates] == expected


@standin_only
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("done", [1, 2, 3])
def test_a_restored_schedule_drives_the_live_optimizer(tmp_path, name, done):
    options, _ = SCHEDULES[name]
    undisturbed = run(*build(optim_cfg(**options)), 6)

    optimizer, scheduler = build(optim_cfg(**options))
    run(optimizer, scheduler, done)
    torch.save({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, tmp_path / "state")

    optimizer, scheduler = build(optim_cfg(**options))
    state = torch.load(tmp_path / "state", weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    assert scheduler.get_last_lr() == [optimizer.param_groups[0]["lr"]]
    assert run(optimizer, scheduler, 6 - done) == undisturbed[done:]


@standin_only
@pytest.mark.parametrize("options", [{"LR_SCHEDULER": "cosine"}, WARM])
def test_a_longer_run_that_resumes_follows_its_own_schedule(options):
    """Upstream's cosine would rise again after the old MAX_EPOCH."""
    optimizer, scheduler = build(optim_cfg(**options))
    run(optimizer, scheduler, 6)
    state = scheduler.state_dict()

    optimizer, scheduler = build(optim_cfg(**options, MAX_EPOCH=12))
    scheduler.load_state_dict(state)
    rates = run(optimizer, scheduler, 6)
    assert rates == run(*build(optim_cfg(**options, MAX_EPOCH=12)), 12)[6:]
    assert all(later < earlier for earlier, later in pairwise(rates))


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("sgd", torch.optim.SGD, {"momentum": 0.9, "dampening": 0, "nesterov": False}),
        ("adam", torch.optim.Adam, {"betas": (0.9, 0.999), "amsgrad": False}),
        ("amsgrad", torch.optim.Adam, {"betas": (0.9, 0.999), "amsgrad": True}),
        ("adamw", torch.optim.AdamW, {"betas": (0.9, 0.999)}),
        ("rmsprop", torch.optim.RMSprop, {"momentum": 0.9, "alpha": 0.99}),
    ],
)
def test_optimizers(name, kind, expected):
    from dassl.optim import build_optimizer

    model = nn.Linear(2, 3)
    optimizer = build_optimizer(model, optim_cfg(NAME=name, LR=0.25))
    assert type(optimizer) is kind
    group = optimizer.param_groups[0]
    assert {key: group[key] for key in expected} == expected
    assert group["lr"] == 0.25 and group["weight_decay"] == 5e-4
    assert list(map(id, group["params"])) == list(map(id, model.parameters()))


def test_optimizers_take_parameters_and_groups_instead_of_a_model():
    from dassl.optim import build_optimizer

    weight = nn.Parameter(torch.zeros(1))
    cfg = optim_cfg()
    assert build_optimizer([weight], cfg).param_groups[0]["params"] == [weight]
    assert build_optimizer([{"params": [weight], "lr": 0.5}], cfg).param_groups[0]["lr"] == 0.5
    assert build_optimizer(nn.Linear(1, 1), cfg, param_groups=[weight]).param_groups[0]["params"] == [weight]


@standin_only
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"NAME": "radam"}, ValueError, "radam.*Dassl.pytorch"),
        ({"STAGED_LR": True}, NotImplementedError, "STAGED_LR.*Dassl.pytorch"),
        ({"LR_SCHEDULER": "exponential"}, ValueError, "exponential"),
        ({"WARMUP_EPOCH": 1, "WARMUP_TYPE": "quadratic"}, ValueError, "quadratic"),
        ({"LR_SCHEDULER": "single_step", "STEPSIZE": (0.5,)}, TypeError, "STEPSIZE"),
        ({"LR_SCHEDULER": "multi_step", "STEPSIZE": 3}, TypeError, "STEPSIZE"),
    ],
)
def test_unsupported_choices_are_named(options, error, message):
    with pytest.raises(error, match=message):
        build(optim_cfg(**options))


def test_a_run_of_no_epochs_can_be_built():
    for schedule in ("cosine", "single_step"):
        optimizer, _ = build(optim_cfg(MAX_EPOCH=0, LR_SCHEDULER=schedule))
        assert math.isfinite(optimizer.param_groups[0]["lr"])
