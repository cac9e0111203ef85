"""Trainers by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..utils import Registry, check_availability

if TYPE_CHECKING:
    from yacs.config import CfgNode

TRAINER_REGISTRY = Registry("TRAINER")


def build_trainer(cfg: CfgNode) -> Any:
    """The trainer that cfg.TRAINER.NAME names."""
    check_availability(cfg.TRAINER.NAME, TRAINER_REGISTRY.registered_names())
    if cfg.VERBOSE:
        print(f"Loading trainer: {cfg.TRAINER.NAME}")
    return TRAINER_REGISTRY.get(cfg.TRAINER.NAME)(cfg)
