"""From names to a run: the YAML files that CONFIG means, the settings that they make, and the run's name."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "compat"))  # last: an installed Dassl wins, the stand-in serves where there is none

from air_plugin.config import FROM_BACKBONE, upgrade, warn_once  # noqa: E402
from air_plugin.utils.errors import UserError, unknown  # noqa: E402
from air_plugin.utils.files import to_json  # noqa: E402

# Keys that may differ between two runs of the same settings.
PLACES = ("OUTPUT_DIR", "RESUME", "DATASET.ROOT", "AIR.CACHE", *FROM_BACKBONE)
OWN_TEMPLATE = "(the data set's own)"

# Data sets and trainers


def register_all(package: str) -> None:
    """Import every module of datasets/ or trainers/, so that each registers its classes.

    Raises:
        UserError: a module cannot be imported; the message names it.
    """
    for path in sorted((ROOT / package).glob("*.py")):
        if path.stem == "__init__":
            continue
        try:
            import_module(f"{package}.{path.stem}")
        except Exception as error:
            lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
            where = f"{path}, line {lines[-1]}" if lines else str(path)
            fault = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(f"{where} cannot be imported ({fault})") from error


def dataset_class(name: str) -> Any:
    """The registered class of a data set.

    Raises:
        UserError: there is none.
    """
    from dassl.data.datasets import DATASET_REGISTRY

    register_all("datasets")
    if name not in DATASET_REGISTRY.registered_names():
        raise unknown("data set", name, DATASET_REGISTRY.registered_names())
    return DATASET_REGISTRY.get(name)


def facts_of(cfg: Any) -> Any:
    """The class that holds the facts about a config's data set; for a class that is not ours, the defaults."""
    from datasets.base import SplitDataset

    kind = dataset_class(cfg.DATASET.NAME) if cfg.DATASET.NAME else SplitDataset
    return kind if issubclass(kind, SplitDataset) else SplitDataset


# Config files


def config_file(folder: str, name: str, kind: str) -> Path:
    """configs/<folder>/<name>.yaml.

    Raises:
        UserError: there is no such file.
    """
    path = ROOT / "configs" / folder / f"{name}.yaml"
    if not path.is_file():
        raise unknown(kind, name, [file.stem for file in path.parent.glob("*.yaml")])
    return path


def uses_generator(trainer: str) -> bool:
    """Whether a trainer generates images; those that do have names that end with AiR."""
    return trainer.endswith("AiR")


def compose(trainer: str, config: str) -> list[Path]:
    """The files that a CONFIG means for a trainer, in the order in which they are merged.

    Raises:
        UserError: a part of it is unknown, or it names no backbone, or two.
    """
    presets = {path.stem: path for path in (ROOT / "configs" / "presets").glob("*.yaml")}
    own_kind = f"trainers/{trainer.removesuffix('+AiR')}"
    folders = {kind: ROOT / "configs" / kind for kind in (own_kind, "backbones", "generators")}
    files = {kind: {path.stem: path for path in folder.glob("*.yaml")} for kind, folder in folders.items()}
    own = files.pop(own_kind)
    default = own.pop("default")
    if config in own:
        return [own[config]]
    if (today := re.sub(rf"_({'|'.join(presets)})$", r"+\1", config)) != config:
        warn_once(f"CONFIG {config} is now {today}")
        config = today
    chosen = [presets[name] for name in config.split("+")[1:] if name in presets]
    if chosen:
        plain = "+".join(name for name in config.split("+") if name not in presets)
        return [*compose(trainer, plain), *(chosen if uses_generator(trainer) else [])]
    parts: dict[str, list[Path]] = {"backbones": [], "generators": []}
    for name in config.split("+"):
        kind = next((kind for kind in files if name in files[kind]), None)
        if kind is None:
            where = ", ".join(f"configs/{kind}" for kind in folders)
            known = {*own, *files["backbones"], *files["generators"], *presets}
            raise unknown(f"config in {where}:", name, known)
        parts[kind].append(files[kind][name])
    if len(parts["backbones"]) != 1 or len(parts["generators"]) > 1:
        raise UserError(
            f"CONFIG '{config}' must name one backbone and one generator at the most; for instance "
            "vit_b32 or vit_b32+sdxl"
        )
    return [default, *parts["backbones"], *(parts["generators"] if uses_generator(trainer) else [])]


# Settings


def defaults() -> Any:
    """Dassl's default config with our settings in it."""
    from dassl.config import get_cfg_default

    from air_plugin.config import add_air_config

    cfg = get_cfg_default()
    add_air_config(cfg)
    return cfg


def resolve(
    config_files: Sequence[str | Path],
    *,
    dataset_file: str | Path = "",
    options: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
    taken: Path | None = None,
) -> tuple[Any, str]:
    """The config of a run (a yacs CfgNode) and its label.

    Defaults, then the data set's file, the trainer's files, the flags and the options, as Dassl's clients do. Parts of
    files that stand under `_WHERE_` are chosen by all other settings, the flags and the options included: what is
    published for DATASET.PARADIGM trzsl is used wherever that is set. Where nothing sets DATASET.TEMPLATE, it is the
    data set's own.

    Args:
        config_files: of the trainer, in this order.
        dataset_file: of the data set; "" where there is none.
        options: KEY, VALUE, KEY, VALUE ...
        flags: values by full key; None and "" are not set.
        taken: a folder of results. Where it has none of this label, but one of the label in former names, that one is
            taken, so that runs of the version before are found.

    Raises:
        UserError: a file, key or number is wrong, or the data set is unknown.
    """
    from air_plugin.config import flatten, merge_options, require_ranges, upgrade_options

    options, files = upgrade_options(options), [path for path in (dataset_file, *config_files) if path]
    cfg = _merged(files, flags or {}, where={})
    merge_options(cfg, options)
    cfg = _merged(files, flags or {}, where=flatten(cfg))
    before = flatten(cfg)
    merge_options(cfg, options)
    require_ranges(cfg)
    own = facts_of(cfg).template_at(cfg.DATASET.ROOT)
    for values, key in ((before, "DATASET.TEMPLATE"), (cfg.DATASET, "TEMPLATE")):
        if values[key] == OWN_TEMPLATE:
            values[key] = own
    new = {key: value for key, value in flatten(cfg).items() if value != before[key]}
    changed = {key: text for key, text in zip(options[::2], options[1::2], strict=True) if key in new}
    changed |= {key: str(new[key]) for key in changed if type(new[key]) is int}  # 010 and 10 are one number
    name = label(config_files, changed)
    if taken is not None and not (taken / name).exists():
        former = former_label(config_files, in_former_names(changed))
        for old in (former_label(config_files, changed), former, former.replace("mini+plus", "mini_plus")):
            if old != name and (taken / old).is_dir() and _may_hold(taken / old, {key: new[key] for key in changed}):
                warn_once(f"results in {taken.parent} are in folders with former names of settings, which are used")
                return cfg, old
    return cfg, name


def _merged(files: Sequence[str | Path], flags: Mapping[str, Any], *, where: Mapping[str, Any]) -> Any:
    """The config of files and flags; `where`: the settings that choose conditional parts, none of them if empty."""
    from air_plugin.config import merge_file

    cfg = defaults()
    cfg.DATASET.TEMPLATE = OWN_TEMPLATE
    for path in files:
        merge_file(cfg, path, where=where)
    for key, value in flags.items():
        if value is not None and value != "":
            *sections, name = key.split(".")
            node = cfg
            for section in sections:
                node = node[section]
            node[name] = value
    return cfg


def in_former_names(changed: Mapping[str, str]) -> dict[str, str]:
    """Settings by key, as the version before called them."""
    from air_plugin.former_settings import SOURCE, renamed

    former = {new: old for old, new in renamed().items()} | {"AIR.PRIOR": SOURCE, "AIR.PROTOTYPES": SOURCE}
    names = {former.get(key, key): "surer_half" if text == "above_median" else text for key, text in changed.items()}
    return {**names, SOURCE: "none"} if changed.get("AIR.PRIOR") == "none" else names


def label(config_files: Sequence[str | Path], changed: Mapping[str, str]) -> str:
    """A config's name: its files', and what the command line changes in them (but not the places).

    A trainer's default.yaml is not named where another file is: vit_b32, vit_b32+sdxl. Two values have two names: one
    that is no file name is followed by its digest.
    """
    return _named(config_files, {key: _in_file_name(text) for key, text in changed.items()})


def former_label(config_files: Sequence[str | Path], changed: Mapping[str, str]) -> str:
    """The name of the version before, in which two values could have one name."""
    return _named(config_files, changed, clean=r"[^\w.=,+-]+")


def _named(config_files: Sequence[str | Path], changed: Mapping[str, str], *, clean: str = "") -> str:
    parts = [Path(file).stem for file in config_files]
    parts = [part for part in parts if part != "default"] or parts
    name = "+".join([*parts, *(f"{key}={text}" for key, text in changed.items() if key not in PLACES)])
    name = re.sub(clean, "_", name) if clean else name
    return name if len(name) <= 100 else f"{name[:90]}-{_short_digest(name)}"


def _in_file_name(text: str) -> str:
    clean = re.sub(r"[^\w.=,-]+", "_", text)
    return clean if clean == text else f"{clean}-{_short_digest(text)}"


def _short_digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:8]


def _may_hold(folder: Path, values: Mapping[str, Any]) -> bool:
    """Whether no run in a folder has another value of one of these settings."""
    wanted = json.loads(to_json(values))
    for mark in folder.glob("*/settings.json"):
        try:
            found = upgrade(json.loads(mark.read_text("utf-8")))
        except (OSError, ValueError):
            continue
        if any(found.get(key, value) != value for key, value in wanted.items()):
            return False
    return True


def settings_of(cfg: Any) -> dict[str, Any]:
    """The settings of a run by full key, without places."""
    from air_plugin.config import flatten

    return {key: value for key, value in flatten(cfg).items() if key not in PLACES}
