"""Files, checkpoints, logs, meters, seeds, registries. What needs torch is imported when somebody asks for it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .logger import Logger, setup_logger
from .registry import Registry
from .tools import (
    check_availability,
    check_isfile,
    collect_env_info,
    listdir_nohidden,
    mkdir_if_missing,
    read_image,
    read_json,
    set_random_seed,
    tolist_if_not,
    write_json,
)

if TYPE_CHECKING:
    from .meters import AverageMeter, MetricMeter
    from .torchtools import (
        count_num_param,
        load_checkpoint,
        load_pretrained_weights,
        resume_from_checkpoint,
        save_checkpoint,
    )

__all__ = [
    "AverageMeter",
    "Logger",
    "MetricMeter",
    "Registry",
    "check_availability",
    "check_isfile",
    "collect_env_info",
    "count_num_param",
    "listdir_nohidden",
    "load_checkpoint",
    "load_pretrained_weights",
    "mkdir_if_missing",
    "read_image",
    "read_json",
    "resume_from_checkpoint",
    "save_checkpoint",
    "set_random_seed",
    "setup_logger",
    "tolist_if_not",
    "write_json",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        module = "meters" if name in ("AverageMeter", "MetricMeter") else "torchtools"
        return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
