"""Optimizers by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .._left_out import left_out

if TYPE_CHECKING:
    from yacs.config import CfgNode

AVAI_OPTIMS = ["adam", "amsgrad", "sgd", "rmsprop", "adamw"]


def build_optimizer(
    model: nn.Module | Iterable[Any], optim_cfg: CfgNode, param_groups: Iterable[Any] | None = None
) -> torch.optim.Optimizer:
    """The optimizer that `optim_cfg` (cfg.OPTIM) describes.

    Args:
        model: a module, whose parameters are optimised, or the parameters or parameter groups themselves.
        optim_cfg: NAME, LR, WEIGHT_DECAY and what else the optimizer takes.
        param_groups: parameters or parameter groups to take instead of the model's.
    """
    if optim_cfg.NAME not in AVAI_OPTIMS:
        wanted = f"OPTIM.NAME must be one of {AVAI_OPTIMS}, not {optim_cfg.NAME!r}"
        raise ValueError(f"{wanted}; " + left_out("any other optimizer"))
    if optim_cfg.STAGED_LR:
        raise NotImplementedError(left_out("OPTIM.STAGED_LR (a learning rate of its own for new layers)"))
    if param_groups is None:
        param_groups = model.parameters() if isinstance(model, nn.Module) else model

    make, options = _optimizer(optim_cfg)
    return make(param_groups, lr=optim_cfg.LR, weight_decay=optim_cfg.WEIGHT_DECAY, **options)


def _optimizer(optim_cfg: CfgNode) -> tuple[Any, dict[str, Any]]:
    """The optimizer's class and the options that only it takes."""
    momentum = {"momentum": optim_cfg.MOMENTUM}
    betas = {"betas": (optim_cfg.ADAM_BETA1, optim_cfg.ADAM_BETA2)}
    sgd = {"dampening": optim_cfg.SGD_DAMPNING, "nesterov": optim_cfg.SGD_NESTEROV}
    choices: dict[str, tuple[Any, dict[str, Any]]] = {
        "adam": (torch.optim.Adam, betas),
        "amsgrad": (torch.optim.Adam, {**betas, "amsgrad": True}),
        "adamw": (torch.optim.AdamW, betas),
        "rmsprop": (torch.optim.RMSprop, {**momentum, "alpha": optim_cfg.RMSPROP_ALPHA}),
        "sgd": (torch.optim.SGD, {**momentum, **sgd}),
    }
    return choices[optim_cfg.NAME]
