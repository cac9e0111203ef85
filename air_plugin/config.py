"""The config: our keys in a yacs node, YAML files and command lines merged into it, and the page of all settings."""

from __future__ import annotations

import fnmatch
from typing import Any

from yacs.config import CfgNode

from air_plugin.dassl_settings import DASSL_SETTINGS
from air_plugin.former_settings import renamed, upgrade, upgrade_options, warn_once
from air_plugin.merging import AirCfgNode, flatten, merge_file, merge_options, read_yaml
from air_plugin.settings import (
    FROM_BACKBONE,
    SECTIONS,
    AirSettings,
    DropInSettings,
    LoraSettings,
    Sampler,
    all_settings,
    template_of,
)
from air_plugin.utils.checks import require
from air_plugin.utils.errors import UserError, unknown
from air_plugin.utils.sections import AUTO, LARGEST, LARGEST_WHOLE, Section, Setting, settings_of

__all__ = [
    "AUTO",
    "FROM_BACKBONE",
    "AirSettings",
    "LoraSettings",
    "Sampler",
    "add_air_config",
    "describe",
    "flatten",
    "merge_file",
    "merge_options",
    "own_config",
    "page",
    "read_yaml",
    "refuse_drop_in_keys",
    "require_ranges",
    "template_of",
    "upgrade",
    "upgrade_options",
    "validate",
    "warn_once",
]


def add_air_config(cfg: Any) -> None:
    """Add our keys to a Dassl config (a yacs CfgNode), before files and options are merged.

    A key that is there already stays as it is: a host's own TRAINER.PROMPT or DATASET.TEMPLATE wins. The drop-in reads
    nothing but AIR.* of what is added. Afterwards `cfg.merge_from_file` and `cfg.merge_from_list` take our keys'
    values as `merge_file` and `merge_options` do: 0 and `auto` for a number, for instance.
    """
    for one in all_settings():
        *sections, name = one.key.split(".")
        node = cfg
        for section in sections:
            if isinstance(node, CfgNode) and section not in node:
                node[section] = CfgNode()
            node = node[section] if isinstance(node, CfgNode) else None
        if isinstance(node, CfgNode) and name not in node:
            node[name] = list(one.default) if isinstance(one.default, tuple) else one.default
    for old, new in renamed().items():  # for yacs' own merge_from_file and merge_from_list
        if not cfg.key_is_renamed(old) and old not in flatten(cfg):
            cfg.register_renamed_key(old, new)
    if type(cfg) is CfgNode:
        object.__setattr__(cfg, "__class__", AirCfgNode)  # yacs' own takes values alone


def own_config(seed: int) -> CfgNode:
    """A config with our keys, a backbone's name and the seed: no Dassl is needed."""
    cfg = CfgNode({"DATASET": {}, "TRAINER": {}, "MODEL": {"BACKBONE": {"NAME": "mini"}}, "SEED": seed})
    add_air_config(cfg)
    return cfg


def validate(cfg: Any, *sections: str) -> None:
    """Check every setting of some sections of a config, for instance "TRAINER.CPL".

    Raises:
        UserError: a value is out of range, or a section is not there; the message names its key.
    """
    for section in SECTIONS:
        if section.SECTION in sections:
            try:
                section.from_cfg(cfg)
            except (KeyError, TypeError) as error:
                raise UserError(
                    f"the config has no section {section.SECTION} of ours ({error}): call add_air_config(cfg) where "
                    "the trainers' keys are added, and leave out Dassl's clean_cfg, which removes sections"
                ) from error


def require_ranges(cfg: Any, *sections: str) -> None:
    """Check that every number of a config is in its range: ours and those of Dassl that a run depends on.

    Args:
        cfg: a yacs CfgNode.
        sections: top-level keys; none is all.

    Raises:
        UserError: a number is out of range; the message names its key.
    """
    values = flatten(cfg)
    for one in (*all_settings(), *DASSL_SETTINGS):
        if one.key not in values or not one.is_number or (sections and one.key.split(".")[0] not in sections):
            continue
        value = values[one.key]
        for number in value if isinstance(value, (list, tuple)) else [value]:
            one.check(None if one.auto and number == AUTO else number)


def refuse_drop_in_keys(cfg: Any) -> None:
    """Raise a UserError where a setting is given that only a drop-in reads: it would be ignored."""
    for one in settings_of(DropInSettings):
        value = one.read(cfg)
        instead = {"AIR.TEMPLATE": "DATASET.TEMPLATE", "AIR.BACKBONE_PRECISION": "TRAINER.PROMPT.PREC"}
        require(
            value == one.default,
            one.key,
            value,
            f"left out: only AuxiliaryMixin over another's trainer reads it; set "
            f"{instead.get(one.key, 'MODEL.BACKBONE.NAME')}",
        )


def describe(pattern: str = "") -> str:
    """Key, default, valid values and meaning of settings.

    Args:
        pattern: a key or its end ("AIR.K", "K"); else any part of a key or meaning, where * is any text.

    Raises:
        UserError: there is none; the message has near matches.

    Example:
        >>> print(describe("K"))
        AIR.K 30  (whole number, at least 1)
            images kept a class, the most typical ones: the prototypes
    """
    settings, name = all_settings(), pattern.lower()
    found = [one for one in settings if f".{one.key.lower()}".endswith(f".{name}")] or [
        one
        for one in settings
        if any(fnmatch.fnmatchcase(text.lower(), f"*{name}*") for text in (one.key, one.help, *one.old))
    ]
    if not found:
        raise unknown("setting", pattern, [one.key for one in settings])
    return "\n".join(f"{one.key} {_written(one.default)}  ({_valid(one)})\n    {one.help}" for one in found)


def page() -> str:
    """docs/configuration.md."""
    intro = f"""# Configuration

<!-- Made by `python -m air_plugin.config > docs/configuration.md`; edit air_plugin/settings.py instead. -->

Every setting of AiR with its default. A setting is given in a YAML file (`AIR: {{K: 16}}`) or behind a command
(`bash scripts/air/main.sh digits mini AIR.K 16`, `python train.py ... AIR.K 16`, `air prototypes ... AIR.K 16`), and
`air settings K` shows it in the terminal. Dassl's own settings (`OPTIM`, `DATALOADER`, `INPUT`, ...) are as in Dassl.

Files are merged in this order: data set, trainer, backbone, generator, preset; then options of the command line.
`_BASE_` in a file names files that are merged before it. `_WHERE_` holds parts for some runs: under
`DATASET.PARADIGM trzsl` stands what is merged where that is set, in a file or on the command line (see
configs/datasets/eurosat.yaml). `{AUTO}` stands for a number that is chosen without labels, or for a switch on which the
run decides.
Numbers are decimal: `010` is ten, `0x10` and `1:30` are errors. Where the table has no upper
limit, it is {LARGEST:,} for numbers and {LARGEST_WHOLE:,} for whole numbers. Dassl's numbers have ranges,
too (air_plugin/dassl_settings.py).
"""
    former = [f"| `{old}` | {_code(new)} |" for old, new in renamed().items()]
    former += [
        f"| `{one.key} {old}` | `{one.key} {new}` |" for one in all_settings() for old, new in one.old_values.items()
    ]
    tail = "## Former names\n\nUsable for one release, with a warning.\n\n| former | today |\n|---|---|\n"
    return "\n".join([intro, *map(_table, SECTIONS), tail + "\n".join(former)]) + "\n"


def _table(section: type[Section]) -> str:
    rows = [
        f"| `{one.key}` | `{_written(one.default)}` | {_escaped(_valid(one))} | {_escaped(one.help)} |"
        for one in settings_of(section)
    ]
    about = (section.__doc__ or "").splitlines()[0]
    return "\n".join(
        [f"## {section.SECTION}: {about}", "", "| key | default | values | meaning |", "|---|---|---|---|", *rows, ""]
    )


def _escaped(text: str) -> str:
    return text.replace("|", r"\|")


def _code(keys: str) -> str:
    return " and ".join(f"`{key}`" for key in keys.split(" and "))


def _written(default: Any) -> str:
    """A default as it is written in YAML."""
    if isinstance(default, tuple):
        return f"[{', '.join(default)}]"
    return str(default) if default != "" else '""'


def _valid(setting: Setting) -> str:
    """The valid values in words: choices, range or type."""
    if setting.is_switch:
        return f"True, False or {AUTO}"
    kinds = {bool: "True or False", int: "whole number", str: "text", float: "number", tuple: "list of text"}
    kind = "text with one {}" if setting.template else kinds[type(setting.default)]
    return " | ".join(setting.choices) if setting.choices else ", ".join(filter(None, (kind, setting.range)))


if __name__ == "__main__":
    print(page(), end="")
