"""Which run a folder holds: its settings, and the contents of its images, lists and models."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from air_plugin.config import flatten, upgrade
from air_plugin.utils.digests import FILE, content_digest, file_digests
from air_plugin.utils.errors import UserError
from air_plugin.utils.files import digest, to_json, write_atomically
from scripts.compose import defaults, facts_of, uses_generator

SETTINGS, INPUTS = "settings.json", "inputs.json"
DATA = ("images", "lists", "class_names")
MODELS = {
    "backbone": "the weights of the backbone",
    "auxiliary_backbone": "the weights of AIR.BACKBONE",
    "initial": "the weights of MODEL.INIT_WEIGHTS",
    "generator": "the weights of the generator",
}
# Of runs that were made before a setting existed. CPL's selection changed together with this default, so that no run of
# CPL from before counts as complete.
FORMER_DEFAULTS = {"TRAINER.CPL.LEVERAGE": 1.0}
WHOLE = {"images": "the images changed", "lists": "the lists of images and labels changed"}


@dataclass(frozen=True)
class Data:
    """A data set as a run finds it; paths are relative to the data root.

    lists: train, val, test -> path -> label. files: path -> digest of the content.
    """

    class_names: list[str]
    lists: dict[str, dict[str, int]]
    files: dict[str, str]

    def digests(self) -> dict[str, str]:
        """Digests of all images, of all labels, and of the class names."""
        lists = (
            f"{part}\0{path}\0{label}" for part, items in self.lists.items() for path, label in sorted(items.items())
        )
        images = (f"{path}\0{made}" for path, made in sorted(self.files.items()))
        return {"images": _digest(images), "lists": _digest(lists), "class_names": _digest(self.class_names)}


@dataclass(frozen=True)
class Inputs:
    """What decides a run besides its settings.

    digests: kind -> digest; a kind is missing where a name says it all (weights on the hub, data sets of others).
    data: what the digests of DATA are of. folder: of the details of other data, by their digests.
    """

    digests: dict[str, str] = field(default_factory=dict)
    data: Data | None = None
    folder: Path = Path("inputs")

    def save_data(self) -> None:
        """Keep the details, once for all runs of the same data, so that a later run can tell what has changed."""
        path = self.folder / f"{_data_key(self.digests)}.json"
        if self.data is not None and not path.exists():
            try:
                write_atomically(path, to_json(vars(self.data)).encode())
            except OSError:  # they serve messages only
                return


_read: dict[tuple[str, ...], tuple[Data | None, dict[str, str]]] = {}


def forget_data() -> None:
    """Look at the data anew from now on: whenever a command begins, and after a run that took time."""
    _read.clear()


def inputs_of(cfg: Any) -> Inputs:
    """What a run of a config would have; files that have not changed since an earlier run are not read again.

    A data set is read once until `forget_data`: a command that finds many complete runs is quick.

    Raises:
        UserError: the data set is missing or damaged, or a file cannot be read.
    """
    store = Path(cfg.AIR.CACHE or Path(cfg.OUTPUT_DIR) / "cache")
    key = (str(store), *(str(cfg.DATASET[name]) for name in ("NAME", "ROOT", "SPLIT_FAMILY", "CLASS_NAMES")))
    if key not in _read:
        data = _data_of(cfg, store / FILE)
        _read[key] = data, {} if data is None else data.digests()
    data, digests = _read[key][0], dict(_read[key][1])
    uses_air = uses_generator(cfg.TRAINER.NAME)
    models = {
        "backbone": [cfg.MODEL.BACKBONE.NAME],
        "auxiliary_backbone": [cfg.AIR.BACKBONE] if uses_air else [],
        "initial": [cfg.MODEL.INIT_WEIGHTS],
        "generator": [cfg.AIR.GENERATOR, cfg.AIR.LCM_LORA] if uses_air else [],
    }
    for kind, names in models.items():
        files = [file for name in names for file in weight_files(name)]
        made = [content_digest(files, cache=store / FILE)] if files else []
        made += [hub_commit(name, cfg.AIR.REVISION if name == cfg.AIR.GENERATOR else "") for name in names]
        if any(made):
            digests[kind] = _digest(made)
    return Inputs(digests, data, store / "inputs")


def _data_of(cfg: Any, cache: Path) -> Data | None:
    """All lists of a config's data set, without what its settings sample; None for a class that is not ours."""
    from datasets.base import SplitDataset

    kind = facts_of(cfg)
    if kind is SplitDataset or not cfg.DATASET.ROOT:
        return None
    whole = cfg.clone()
    whole.defrost()
    whole.DATASET.NUM_SHOTS, whole.DATASET.SUBSAMPLE_CLASSES = -1, "all"
    whole.DATASET.PARADIGM = "ul"  # which lists every training image; what is labelled follows from these and settings
    whole.DATASET.NUM_MISSING_CLASSES, whole.DATASET.IMBALANCE_RATIO = 0, 1.0
    data = kind(whole)
    root = os.path.join(os.path.abspath(os.path.expanduser(cfg.DATASET.ROOT)), "")
    lists = {
        part: {item.impath.removeprefix(root): item.label for item in items or ()}
        for part, items in (("train", data.train_x), ("val", data.val), ("test", data.test))
    }
    paths = list(dict.fromkeys(path for items in lists.values() for path in items))
    made = file_digests((os.path.join(root, path) for path in paths), cache=cache)
    return Data(list(data.classnames), lists, {path: one[:16] for path, one in zip(paths, made, strict=True)})


def weight_files(name: str) -> list[Path]:
    """The local files of a backbone or generator, sorted; none where it comes from the hub or a package by its name."""
    from air_plugin import mini

    path = Path(name.removeprefix("hf:"))
    if name in mini.BACKBONES:
        return mini.weight_files(name)
    if name and path.is_dir():
        found = (Path(place, file) for place, _, files in os.walk(path, followlinks=True) for file in files)
        return sorted(file for file in found if not file.name.startswith(".") and file.is_file())
    return [file for file in (path, Path(name.partition(":")[2])) if file.is_file()]


def hub_commit(name: str, revision: str = "") -> str:
    """The commit that a hub name (OWNER/MODEL) stands for on this machine; empty where it was never fetched."""
    from huggingface_hub import constants

    name = name.removeprefix("hf:")
    if Path(name).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return ""
    reference = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "refs" / (revision or "main")
    return reference.read_text("utf-8").strip() if reference.is_file() else ""


def _digest(lines: Iterable[str]) -> str:
    return digest("\n".join(lines).encode("utf-8", "surrogateescape"))[:16]


def _data_key(digests: Mapping[str, str]) -> str:
    return _digest(digests.get(kind, "") for kind in DATA)


# What has changed


def changes(found: Mapping[str, str], now: Inputs) -> list[str]:
    """In words, what is no longer as a run recorded it; kinds that it did not record are left out."""
    kinds = [kind for kind, made in now.digests.items() if found.get(kind, made) != made]
    faults = [f"{text} changed" for kind, text in MODELS.items() if kind in kinds]
    if not set(kinds) & set(DATA):
        return faults
    try:
        before = Data(**json.loads((now.folder / f"{_data_key(found)}.json").read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        before = None
    if before is None or now.data is None:
        return [*(text for kind, text in WHOLE.items() if kind in kinds), *faults] or ["the class names changed"]
    return [
        *_changed_files(before, now.data),
        *_changed_lists(before, now.data),
        *_changed_names(before, now.data),
        *faults,
    ]


def _changed_files(before: Data, now: Data) -> list[str]:
    both = before.files.keys() & now.files.keys()
    changed = sorted(path for path in both if before.files[path] != now.files[path])
    faults = [f"the images changed: {len(changed):,} of {len(now.files):,}, first {changed[0]}"] if changed else []
    for paths, word in ((now.files.keys() - both, "new"), (before.files.keys() - both, "gone")):
        if paths:
            faults.append(f"{len(paths):,} image{_is(len(paths))} {word}, first {min(paths)}")
    return faults


def _changed_lists(before: Data, now: Data) -> list[str]:
    labels, moved = set(), set()
    for part, items in now.lists.items():
        former = before.lists.get(part, {})
        labels |= {path for path in items.keys() & former.keys() if items[path] != former[path]}
        moved |= (items.keys() ^ former.keys()) & before.files.keys() & now.files.keys()
    faults = []
    if labels:
        faults.append(f"labels of {len(labels):,} image{'s' * (len(labels) > 1)} changed, first {min(labels)}")
    if moved:
        some = f"{len(moved):,} image{_is(len(moved))}"
        faults.append(f"{some} in another list (train, val, test), first {min(moved)}")
    return faults


def _changed_names(before: Data, now: Data) -> list[str]:
    if len(before.class_names) != len(now.class_names):
        return [f"there were {len(before.class_names)} classes and are {len(now.class_names)}"]
    pairs = [(old, new) for old, new in zip(before.class_names, now.class_names, strict=True) if old != new]
    return (
        [f"{len(pairs)} class name{'s' * (len(pairs) > 1)} changed, first '{pairs[0][0]}' -> '{pairs[0][1]}'"]
        if pairs
        else []
    )


def _is(number: int) -> str:
    return "s are" if number > 1 else " is"


# The run of a folder


def recorded(folder: Path) -> dict[str, str]:
    """The digests of the inputs that a run recorded; none where it did not, as before there were any."""
    try:
        return dict(json.loads((folder / INPUTS).read_text("utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return {}


def claim(folder: Path, settings: Mapping[str, Any], inputs: Inputs) -> bool:
    """Take a run's folder; returns whether the run is complete.

    A run from before inputs were recorded is taken as one of these inputs.

    Raises:
        UserError: the folder holds a run of other settings, or that or another seed beside it has other inputs.
    """
    mark = folder / SETTINGS
    wanted = json.loads(to_json(settings))
    try:
        found = upgrade(json.loads(mark.read_text("utf-8")))
    except (FileNotFoundError, ValueError):
        found = None
    if found is not None:
        _require_same_settings(folder, found, wanted)
    _require_same_inputs(folder, inputs, begun=found is not None)
    inputs.save_data()
    if found is None or recorded(folder).keys() != inputs.digests.keys():
        digests = {**inputs.digests, **recorded(folder)} if found is not None else inputs.digests
        write_atomically(folder / INPUTS, to_json(digests, indent=1).encode(), durable=True)
    if found is None:
        write_atomically(mark, to_json(wanted, indent=1, sort_keys=True).encode(), durable=True)
    try:
        return bool(json.loads((folder / "result.json").read_text("utf-8")))
    except (FileNotFoundError, ValueError):
        return False


def _require_same_settings(folder: Path, found: dict[str, Any], wanted: Mapping[str, Any]) -> None:
    found.pop("DATASET.CONTENTS", None)  # of versions that recorded names and sizes of some data sets here
    if new := wanted.keys() - found.keys():  # settings that did not exist yet when the run was made
        usual = {**json.loads(to_json(flatten(defaults()))), **FORMER_DEFAULTS}
        found |= {key: value for key, value in usual.items() if key in new}
    differing = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
    if not _selects_candidates(wanted):
        differing = [key for key in differing if not key.startswith("TRAINER.CPL.")]  # which it does not read
    if differing:
        change = ", ".join(f"{key} {found.get(key)!r} -> {wanted.get(key)!r}" for key in differing[:3])
        raise UserError(
            f"{folder} holds a run of other settings ({change}); remove it or choose another --output-dir "
            "(scripts: OUTPUT)"
        )


def _selects_candidates(settings: Mapping[str, Any]) -> bool:
    """Whether a run's pseudo-labels are CPL's."""
    trainer = settings["TRAINER.NAME"].partition("+")[0]
    return trainer == "CPL" or (trainer == "AiR" and settings["TRAINER.AIR.LABELER"] == "CPL")


def _require_same_inputs(folder: Path, inputs: Inputs, *, begun: bool) -> None:
    """Compare with what the folder's run recorded, and those of the other seeds: seeds are averaged."""
    others = sorted(path.parent for path in folder.parent.glob(f"seed*/{SETTINGS}") if path.parent != folder)
    beside = others if folder.name.startswith("seed") else []
    for place in [*([folder] if begun else []), *beside]:
        faults = changes(recorded(place), inputs)
        if faults:
            raise UserError(
                f"{place} holds a run of other data or models ({'; '.join(faults[:3])}); remove it or choose another "
                "--output-dir (scripts: OUTPUT)"
            )


def give_up(folder: Path) -> None:
    """Forget that a run was begun, so that no table names it as unfinished."""
    for name in (SETTINGS, INPUTS):
        (folder / name).unlink(missing_ok=True)
