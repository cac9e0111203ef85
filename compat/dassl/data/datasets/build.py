"""Data sets by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...utils import Registry, check_availability

if TYPE_CHECKING:
    from yacs.config import CfgNode

DATASET_REGISTRY = Registry("DATASET")


def build_dataset(cfg: CfgNode) -> Any:
    """The data set that cfg.DATASET.NAME names."""
    check_availability(cfg.DATASET.NAME, DATASET_REGISTRY.registered_names())
    if cfg.VERBOSE:
        print(f"Loading dataset: {cfg.DATASET.NAME}")
    return DATASET_REGISTRY.get(cfg.DATASET.NAME)(cfg)
