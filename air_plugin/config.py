"""The config: our keys in a yacs node, YAML files and command lines merged into it, and the page of all settings."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from air_plugin.former_settings import renamed, upgrade, upgrade_options, upgrade_tree, warn_once
from air_plugin.settings import FROM_BACKBONE, SECTIONS, AirSettings, LoraSettings, Sampler, all_settings
from air_plugin.utils.errors import UserError, unknown
from air_plugin.utils.sections import AUTO, Section, Setting, settings_of

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
    "page",
    "upgrade",
    "upgrade_options",
    "validate",
    "warn_once",
]

MAY_BE_AUTO = tuple(setting.key for setting in all_settings() if setting.auto)


def add_air_config(cfg: Any) -> None:
    """Add our keys to a Dassl config (a yacs CfgNode), before files and options are merged."""
    from yacs.config import CfgNode

    for setting in all_settings():
        *sections, name = setting.key.split(".")
        node = cfg
        for section in sections:
            if section not in node:
                node[section] = CfgNode()
            node = node[section]
        node[name] = list(setting.default) if isinstance(setting.default, tuple) else setting.default
    for old, new in renamed().items():  # for yacs' own merge_from_file and merge_from_list
        if not cfg.key_is_renamed(old):
            cfg.register_renamed_key(old, new)


def validate(cfg: Any, *sections: str) -> None:
    """Check every setting of some sections of a config, for instance "TRAINER.CPL".

    Raises:
        UserError: a value is out of range; the message names its key.
    """
    for section in SECTIONS:
        if section.SECTION in sections:
            section.from_cfg(cfg)


def merge_file(
    cfg: Any, path: str | Path, *, sections: Sequence[str] | None = None, _above: tuple[Path, ...] = ()
) -> None:
    """Merge a YAML file into a config. Its key `_BASE_` names a file, relative to it, or a list of such, merged first.

    Args:
        cfg: a yacs CfgNode.
        path: the file.
        sections: the top-level keys to take; None is all.

    Raises:
        UserError: the file is missing or no YAML, or a key is unknown or of another type.
    """
    import yaml

    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        folder = Path(path).parent
        known = [file.stem for file in folder.glob("*.yaml")]
        raise unknown(f"config file in {folder}", Path(path).stem, known) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"config file {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"config file {path} is no mapping of keys to values")
    base = tree.pop("_BASE_", None)
    for name in base if isinstance(base, list) else [base] if base else []:
        above = (*_above, Path(path).resolve())
        below = (Path(path).parent / str(name)).resolve()
        if below in above:
            raise UserError(f"config file {path}: its _BASE_ {name} leads back to it")
        merge_file(cfg, below, sections=sections, _above=above)
    if sections is not None:
        tree = {key: value for key, value in tree.items() if key in sections}
    _merge(cfg, upgrade_tree(tree), prefix="", where=f" in {path}")


def merge_options(cfg: Any, options: Sequence[str]) -> None:
    """Merge KEY VALUE pairs of a command line into a config; values are read as YAML.

    Raises:
        UserError: as `merge_file`, or a key without its value.
    """
    import yaml

    if len(options) % 2:
        raise UserError(f"options are pairs of KEY VALUE; '{options[-1]}' has no partner")
    options = upgrade_options(options)
    texts = {key for key, value in flatten(cfg).items() if isinstance(value, str)}
    for key, text in zip(options[::2], options[1::2], strict=True):
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        if key in texts and not isinstance(value, str):
            value = text  # "{}", "style: a {}", "no" and the like are text where text is wanted
        for part in reversed(key.split(".")):
            value = {part: value}
        _merge(cfg, value, prefix="", where="")


def _merge(cfg: Any, tree: Mapping[str, Any], *, prefix: str, where: str) -> None:
    from yacs.config import CfgNode

    for name, value in tree.items():
        key = f"{prefix}{name}"
        if name not in cfg:
            raise unknown(f"config key{where}", key, flatten(cfg, prefix))
        old = cfg[name]
        if isinstance(old, CfgNode):
            if not isinstance(value, Mapping):
                raise UserError(f"{key}{where} is a section, not a value; its keys: {', '.join(old)}")
            _merge(old, value, prefix=f"{key}.", where=where)
        else:
            if key in MAY_BE_AUTO and AUTO in (old, value):
                old = value if value == AUTO else 0.0
            cfg[name] = _coerce(old, value, f"{key}{where}")


def _coerce(old: Any, value: Any, key: str) -> Any:
    """A value as the type that its key has."""
    import yaml

    if isinstance(old, (list, tuple)) and isinstance(value, str) and value[:1] == "(" and value[-1:] == ")":
        with contextlib.suppress(yaml.YAMLError):
            value = yaml.safe_load(f"[{value[1:-1]}]")  # yacs' way of writing a tuple
    if isinstance(old, float) and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-4 as text
        except ValueError:
            pass
    elif isinstance(old, str) and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    elif isinstance(old, (list, tuple)) and isinstance(value, (list, tuple)):
        return type(old)(value)
    elif old is None or type(old) is type(value) or (isinstance(old, str) and value is None):
        return "" if value is None and isinstance(old, str) else value
    raise UserError(f"{key} is {value!r}, a {type(value).__name__}; it must be a {type(old).__name__}")


def flatten(cfg: Any, prefix: str = "") -> dict[str, Any]:
    """Every value of a config by its full key."""
    from yacs.config import CfgNode

    values: dict[str, Any] = {}
    for name, value in cfg.items():
        values.update(flatten(value, f"{prefix}{name}.") if isinstance(value, CfgNode) else {f"{prefix}{name}": value})
    return values


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
`_BASE_` in a file names files that are merged before it. `{AUTO}` stands for a number that is chosen without labels.
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
    kinds = {bool: "True or False", int: "whole number", str: "text", float: "number", tuple: "list of text"}
    kind = "text with one {}" if setting.template else kinds[type(setting.default)]
    return " | ".join(setting.choices) if setting.choices else ", ".join(filter(None, (kind, setting.range)))


if __name__ == "__main__":
    print(page(), end="")
