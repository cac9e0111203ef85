"""YAML files and KEY VALUE pairs merged into a config; every value becomes what its key has."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode

from air_plugin.former_settings import upgrade_options, upgrade_tree
from air_plugin.settings import all_settings
from air_plugin.utils.errors import UserError, unknown
from air_plugin.utils.sections import AUTO

OURS = {one.key: one for one in all_settings()}
KINDS: dict[type, str] = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list: [A, B]",
    tuple: "a list: (A, B)",
}
CONDITIONS = "_WHERE_"  # in a YAML file: settings of some runs


class _Reader(yaml.SafeLoader):
    """Numbers and dates stay text until their key is known: YAML 1.1 reads 010 as 8 and 1:30 as 90."""


_AS_TEXT = {f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "timestamp")}
_Reader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag not in _AS_TEXT]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_yaml(text: str) -> Any:
    """The values of a YAML text; numbers are text.

    >>> read_yaml("M: 010")
    {'M': '010'}
    """
    return yaml.load(text, _Reader)  # a SafeLoader


class AirCfgNode(CfgNode):
    """A config in which our keys take what `merge_options` takes, by yacs' own methods, too; others are yacs'.

    yacs alone refuses 0 and `auto` where a key has a number with a point.
    """

    # Sections are plain nodes, for yacs merges nodes of one class alone.
    @classmethod
    def load_cfg(cls, cfg_file_obj_or_str: Any) -> CfgNode:
        return CfgNode.load_cfg(cfg_file_obj_or_str)

    @classmethod
    def _decode_cfg_value(cls, value: Any) -> Any:
        return CfgNode._decode_cfg_value(value)

    def merge_from_list(self, cfg_list: Sequence[Any]) -> None:
        pairs = [cfg_list[start : start + 2] for start in range(0, len(cfg_list), 2)]
        ours = [pair for pair in pairs if len(pair) == 2 and _is_ours(self, pair[0])]
        super().merge_from_list([part for pair in pairs if pair not in ours for part in pair])
        for key, value in ours:
            _merge_option(self, key, value)

    def merge_from_other_cfg(self, cfg_other: CfgNode) -> None:
        other = cfg_other.clone()
        values = {key: value for key, value in flatten(other).items() if _is_ours(self, key)}
        for key in values:
            *sections, name = key.split(".")
            del _node(other, sections)[name]
        super().merge_from_other_cfg(other)
        for key, value in values.items():
            _merge_option(self, key, value)


def _node(cfg: Any, sections: Sequence[str]) -> Any:
    for section in sections:
        cfg = cfg[section]
    return cfg


def _tree(key: str, value: Any) -> Any:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _is_ours(cfg: Any, key: str) -> bool:
    """Whether a config has a key of ours with our type: a host may have the same name for something else."""
    if key not in OURS:
        return False
    value, default = flatten(cfg).get(key), OURS[key].default
    if OURS[key].auto and value == AUTO:
        return True
    if OURS[key].is_switch:
        return isinstance(value, bool)
    return isinstance(value, list) if isinstance(default, tuple) else type(value) is type(default)


def merge_file(
    cfg: Any,
    path: str | Path,
    *,
    sections: Sequence[str] | None = None,
    where: Mapping[str, Any] | None = None,
    _above: tuple[Path, ...] = (),
) -> None:
    """Merge a YAML file into a config.

    Its key `_BASE_` names a file, relative to it, or a list of such, merged first. Its key `_WHERE_` holds parts for
    runs with certain settings; each is merged after the rest of the file, where its condition holds:

        _WHERE_:
          DATASET.PARADIGM trzsl:
            TRAINER: {CPL: {GAMMA: 3.0}}
          DATASET.PARADIGM ul|ssl TRAINER.CPL.LOSS cc:
            TRAINER: {CPL: {BETA: 0.9}}

    A condition is KEY VALUE pairs that must all hold; VALUE1|VALUE2 is one of both.

    Args:
        cfg: a yacs CfgNode.
        path: the file.
        sections: the top-level keys to take; None is all.
        where: settings by full key that conditions are tested on; None: the config after the rest of the file; empty:
            no condition holds.

    Raises:
        UserError: the file is missing or no YAML, or a key is unknown or of another type.
    """
    tree = _read_file(Path(path))
    base, parts = tree.pop("_BASE_", None), tree.pop(CONDITIONS, None) or {}
    for name in base if isinstance(base, list) else [base] if base else []:
        above = (*_above, Path(path).resolve())
        below = (Path(path).parent / str(name)).resolve()
        if below in above:
            raise UserError(f"config file {path}: its _BASE_ {name} leads back to it")
        merge_file(cfg, below, sections=sections, where=where, _above=above)
    _merge_tree(cfg, tree, path, sections)
    if not isinstance(parts, dict):
        raise UserError(f"config file {path}: {CONDITIONS} is no mapping of conditions to settings")
    values = flatten(cfg) if where is None else where
    for condition, part in parts.items():
        if not isinstance(part, dict):
            raise UserError(f"config file {path}: {CONDITIONS} '{condition}' holds no mapping of keys to values")
        if values and _holds(str(condition), values, path):
            _merge_tree(cfg, part, path, sections)


@functools.lru_cache(maxsize=128)
def _parsed(text: str) -> Any:
    """As `read_yaml`; a text is parsed once, though conditions need two passes over the files, and rows share them."""
    return read_yaml(text)


def _read_file(path: Path) -> dict[Any, Any]:
    """The tree of a YAML file."""
    try:
        tree = deepcopy(_parsed(path.read_text(encoding="utf-8"))) or {}
    except FileNotFoundError:
        folder = path.parent
        known = [file.stem for file in folder.glob("*.yaml")]
        raise unknown(f"config file in {folder}", path.stem, known) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"config file {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"config file {path} is no mapping of keys to values")
    return tree


def _merge_tree(cfg: Any, tree: Mapping[Any, Any], path: str | Path, sections: Sequence[str] | None) -> None:
    kept = tree if sections is None else {key: value for key, value in tree.items() if key in sections}
    _merge(cfg, upgrade_tree(kept), prefix="", where=f" in {path}")


def _holds(condition: str, values: Mapping[str, Any], path: str | Path) -> bool:
    """Whether every KEY VALUE pair of a condition holds."""
    words = condition.split()
    if not words or len(words) % 2:
        raise UserError(f"config file {path}: {CONDITIONS} '{condition}' is no condition; write KEY VALUE pairs")
    for key in words[::2]:
        if key not in values:
            raise unknown(f"config key in {CONDITIONS} of {path}", key, values)
    return all(str(values[key]) in text.split("|") for key, text in zip(words[::2], words[1::2], strict=True))


def merge_options(cfg: Any, options: Sequence[str]) -> None:
    """Merge KEY VALUE pairs of a command line into a config; values are read as YAML, numbers as decimals.

    Raises:
        UserError: as `merge_file`, or a key without its value.
    """
    if len(options) % 2:
        raise UserError(f"options are pairs of KEY VALUE; '{options[-1]}' has no partner")
    options = upgrade_options(options)
    for key, text in zip(options[::2], options[1::2], strict=True):
        _merge_option(cfg, key, text)


def _merge_option(cfg: Any, key: str, given: Any) -> None:
    value = given
    if isinstance(given, str):
        with contextlib.suppress(yaml.YAMLError):
            value = read_yaml(given)
        if isinstance(flatten(cfg).get(key), str) and not isinstance(value, str) and not _may_be_auto(key):
            value = given  # "{}", "style: a {}", "no" and the like are text where text is wanted
    _merge(cfg, _tree(key, value), prefix="", where="")


def _may_be_auto(key: str) -> bool:
    return key in OURS and OURS[key].auto


def _merge(cfg: Any, tree: Mapping[str, Any], *, prefix: str, where: str) -> None:
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
            if _may_be_auto(key) and AUTO in (old, value):
                old = value if value == AUTO else False if OURS[key].is_switch else 0.0
            cfg[name] = _coerce(old, value, f"{key}{where}")


def _coerce(old: Any, value: Any, key: str) -> Any:
    """A value as the type that its key has."""
    if isinstance(old, (list, tuple)) and isinstance(value, str) and value[:1] == "(" and value[-1:] == ")":
        with contextlib.suppress(yaml.YAMLError):
            value = read_yaml(f"[{value[1:-1]}]")  # yacs' way of writing a tuple
    if isinstance(old, (int, float)) and not isinstance(old, bool) and not isinstance(value, bool):
        number = type(old)
        # A number with a point is no whole number, 2.0 included.
        if isinstance(value, (str, int)) or type(value) is number:
            with contextlib.suppress(ValueError, OverflowError):
                return number(value)
    elif isinstance(old, str) and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    elif isinstance(old, (list, tuple)) and isinstance(value, (list, tuple)):
        texts = bool(old) and all(isinstance(one, str) for one in old)
        return type(old)(value if texts else map(_guess, value))
    elif isinstance(old, str) and value is None:
        return ""
    elif old is None or type(old) is type(value):
        return _guess(value) if old is None else value
    value = _guess(value)
    raise UserError(f"{key} is {value!r}; it must be {KINDS.get(type(old), type(old).__name__)}")


def _guess(value: Any) -> Any:
    """A decimal number that stands as text becomes one; everything else stays."""
    if isinstance(value, str) and re.match(r"[-+]?\.?[0-9]", value):
        for number in (int, float):
            with contextlib.suppress(ValueError):
                return number(value)
    return value


def flatten(cfg: Any, prefix: str = "") -> dict[str, Any]:
    """Every value of a config by its full key."""
    values: dict[str, Any] = {}
    for name, value in cfg.items():
        values.update(flatten(value, f"{prefix}{name}.") if isinstance(value, CfgNode) else {f"{prefix}{name}": value})
    return values
