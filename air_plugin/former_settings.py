"""Former names of settings, for one release: in files, on command lines and in results of earlier versions."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from air_plugin.settings import FROM_BACKBONE, all_settings

LOG = logging.getLogger(__name__)
# AIR.SOURCE was where prototypes come from and EM's prior at once.
SOURCE = "AIR.SOURCE"
SOURCES = {
    "synthetic": {"AIR.PROTOTYPES": "synthetic", "AIR.PRIOR": "prototypes"},
    "real": {"AIR.PROTOTYPES": "real", "AIR.PRIOR": "prototypes"},
    "none": {"AIR.PROTOTYPES": "real", "AIR.PRIOR": "none"},
}
# TransCLIP was a switch, and not yet the paper's: a complete run of before is no run of today's TransCLIP.
TRANSCLIP, TRANSDUCTION = "TRAINER.TRANSCLIP.ENABLED", "TRAINER.TRANSDUCTION.METHOD"
FORMER_TRANSCLIP = "transclip of version 0.1"
# Names in rounds/*.safetensors of a run's folder: interrupted runs of version 0.1 resume.
ROUND_TENSORS = {"likeliest": "top1"}


@functools.cache
def renamed() -> dict[str, str]:
    """Former key -> today's key, or keys."""
    return {
        SOURCE: "AIR.PROTOTYPES and AIR.PRIOR",
        TRANSCLIP: TRANSDUCTION,
        **{old: setting.key for setting in all_settings() for old in setting.old},
    }


@functools.cache
def _renamed_values() -> dict[str, Mapping[str, str]]:
    return {setting.key: setting.old_values for setting in all_settings() if setting.old_values}


@functools.cache
def warn_once(message: str) -> None:
    """Warn of a former name, once in a process."""
    LOG.warning("%s; the former name works for one release", message)


def _today(key: str, value: Any, *, warn: bool) -> dict[str, Any]:
    """A setting by today's key and value; two settings where there was one. Without `warn`: of a run of before."""
    if key in renamed():
        if warn:
            warn_once(f"{key} is now {renamed()[key]}")
        if key == SOURCE:
            return dict(SOURCES.get(str(value), {"AIR.PROTOTYPES": value, "AIR.PRIOR": "prototypes"}))
        if key == TRANSCLIP:
            is_on = str(value) in ("True", "true", "1")
            return {TRANSDUCTION: ("transclip" if warn else FORMER_TRANSCLIP) if is_on else "none"}
        key = renamed()[key]
    new = _renamed_values().get(key, {}).get(value, value) if isinstance(value, str) else value
    if warn and new != value:
        warn_once(f"{key} {value} is now {key} {new}")
    return {key: new}


def upgrade(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by full key as a finished run of an earlier version saved them, in today's names and values.

    >>> upgrade({"AIR.HEADLINE": "fused", "AIR.M": 60})
    {'AIR.PRIMARY': 'fused', 'AIR.M': 60}
    """
    kept = (key for key in settings if key not in FROM_BACKBONE)
    return {key: value for old in kept for key, value in _today(old, settings[old], warn=False).items()}


def upgrade_options(options: Sequence[str]) -> list[str]:
    """KEY VALUE pairs of a command line in today's names; a warning names each former one."""
    pairs = [_today(key, text, warn=True) for key, text in zip(options[::2], options[1::2], strict=False)]
    whole = [part for pair in pairs for item in pair.items() for part in item]
    return [*whole, *options[len(options) // 2 * 2 :]]  # a key without its value is for others to refuse


def upgrade_tree(tree: Mapping[Any, Any], prefix: str = "") -> dict[Any, Any]:
    """The nested settings of a YAML file in today's names; a warning names each former one. Today's name wins."""
    today: dict[Any, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key == TRANSCLIP.rpartition(".")[0] and isinstance(value, Mapping) and "ENABLED" in value:
            method = _today(TRANSCLIP, value["ENABLED"], warn=True)[TRANSDUCTION]
            today.setdefault("TRANSDUCTION", {})["METHOD"] = method  # of the section beside this one
        elif isinstance(value, Mapping):
            today[name] = {**today.get(name, {}), **upgrade_tree(value, f"{key}.")}
        elif key in renamed() or key in _renamed_values():
            for new, replaced in _today(key, value, warn=True).items():
                short = new.rsplit(".", 1)[1]
                if short == name or short not in tree:
                    today[short] = replaced
        else:
            today[name] = value
    return today
