"""Learning-rate schedules: single_step, multi_step and cosine, each with or without warm-up.

Upstream nests a schedule in a warm-up schedule, and computes each learning rate from the one before. Here the
rate is a function of the epoch alone, with the same values. So a checkpoint needs to hold no more than the
epoch; a resumed run drives its own optimizer; and one that resumes with a larger MAX_EPOCH follows the larger
schedule.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .._left_out import refuse_names

if TYPE_CHECKING:
    from yacs.config import CfgNode

__getattr__ = refuse_names(__name__, "ConstantWarmupScheduler", "LinearWarmupScheduler")

AVAI_SCHEDS = ["single_step", "multi_step", "cosine"]
AVAI_WARMUPS = ["constant", "linear"]

Curve = Callable[[int], float]  # epochs since the start -> factor on the base learning rate
Warmup = Callable[[int, float], float]  # epochs since the start, base learning rate -> learning rate


class EpochScheduler(LRScheduler):
    """Sets the learning rate to a warm-up's value at first, and to base rate * curve(epoch) from then on."""

    def __init__(
        self,
        optimizer: Optimizer,
        curve: Curve,
        *,
        warmup: Warmup | None = None,
        warmup_epoch: int = 0,
        recount: bool = True,
    ) -> None:
        self._curve = curve
        self._warmup = warmup
        self._warmup_epoch = warmup_epoch if warmup else 0
        self._recount = recount
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        """The learning rate of each parameter group at epoch `last_epoch`."""
        return [self._learning_rate(float(base)) for base in self.base_lrs]

    def _learning_rate(self, base: float) -> float:
        epoch, start = self.last_epoch, self._warmup_epoch
        if self._warmup and epoch < start:
            return self._warmup(epoch, base)
        if self._recount:
            return base * self._curve(epoch - start)
        # The curve is entered in its middle, but with the full base rate.
        return base if epoch == start else base * self._curve(epoch) / self._curve(start)

    def state_dict(self) -> dict[str, Any]:
        """The position; the shape comes from the configuration."""
        names = ("last_epoch", "_step_count", "_last_lr")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to the stored epoch, and set the optimizer's learning rates to the schedule's values there."""
        self.last_epoch = state_dict["last_epoch"]
        self._step_count = state_dict["_step_count"]
        self._last_lr = self.get_lr()
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate


def build_lr_scheduler(optimizer: Optimizer, optim_cfg: CfgNode) -> LRScheduler:
    """The schedule that `optim_cfg` (cfg.OPTIM) describes; its `step` is to be called once an epoch."""
    return EpochScheduler(
        optimizer,
        _build_curve(optim_cfg),
        warmup=_build_warmup(optim_cfg),
        warmup_epoch=optim_cfg.WARMUP_EPOCH,
        recount=optim_cfg.WARMUP_RECOUNT,
    )


def _build_curve(optim_cfg: CfgNode) -> Curve:
    kind, gamma, max_epoch = optim_cfg.LR_SCHEDULER, optim_cfg.GAMMA, max(optim_cfg.MAX_EPOCH, 1)
    if kind == "cosine":
        return lambda epoch: (1 + math.cos(math.pi * epoch / max_epoch)) / 2
    if kind == "single_step":
        size = _step_size(optim_cfg)
        return lambda epoch: gamma ** (epoch // size)
    if kind == "multi_step":
        milestones = _milestones(optim_cfg.STEPSIZE)
        return lambda epoch: gamma ** bisect_right(milestones, epoch)
    raise ValueError(f"OPTIM.LR_SCHEDULER must be one of {AVAI_SCHEDS}, not {kind!r}")


def _step_size(optim_cfg: CfgNode) -> int:
    size = optim_cfg.STEPSIZE
    if isinstance(size, (list, tuple)):
        size = size[-1]
    if not isinstance(size, int):
        raise TypeError(f"OPTIM.STEPSIZE must be an integer for single_step, not {size!r}")
    return size if size > 0 else max(optim_cfg.MAX_EPOCH, 1)


def _milestones(sizes: Sequence[int]) -> list[int]:
    if not isinstance(sizes, (list, tuple)):
        raise TypeError(f"OPTIM.STEPSIZE must be a list of epochs for multi_step, not {sizes!r}")
    return sorted(size for size in sizes if size >= 0)


def _build_warmup(optim_cfg: CfgNode) -> Warmup | None:
    epochs, kind = optim_cfg.WARMUP_EPOCH, optim_cfg.WARMUP_TYPE
    if epochs <= 0:
        return None
    if kind == "constant":
        return lambda epoch, base: optim_cfg.WARMUP_CONS_LR
    if kind == "linear":
        return lambda epoch, base: base * epoch / epochs if epoch else optim_cfg.WARMUP_MIN_LR
    raise ValueError(f"OPTIM.WARMUP_TYPE must be one of {AVAI_WARMUPS}, not {kind!r}")
