"""Every YAML that is shipped: it names its command, merges, and its settings are valid."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from air_plugin.config import AirSettings, add_air_config, flatten, merge_file

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
DATASETS = sorted((CONFIGS / "datasets").glob("*.yaml"))
TRAINERS = sorted((CONFIGS / "trainers").glob("*/*.yaml"))
PLANS = sorted((CONFIGS / "plans").glob("*.yaml"))


def label(path: Path) -> str:
    return path.relative_to(CONFIGS).as_posix()


def default() -> Any:
    from dassl.config import get_cfg_default

    cfg = get_cfg_default()
    add_air_config(cfg)
    return cfg


def merged(*paths: Path) -> Any:
    cfg = default()
    for path in paths:
        merge_file(cfg, path)
    return cfg


def comment(path: Path) -> list[str]:
    """The lines of comment that a file begins with."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    return lines


def plan(name: str) -> dict[str, Any]:
    return yaml.safe_load((CONFIGS / "plans" / f"{name}.yaml").read_text())


def trainers_of(script: str) -> list[str]:
    """The trainers that a script runs; of a method's own script, the one that CONFIG belongs to."""
    ((kind, names),) = re.findall(r"--(trainers|plan) (\S+)", (ROOT / script).read_text())
    return names.split(",")[-1:] if kind == "trainers" else [row["trainer"] for row in plan(names)["rows"]]


def test_there_are_configs():
    assert DATASETS and TRAINERS and PLANS
    assert {path.suffix for path in CONFIGS.rglob("*") if path.is_file()} == {".yaml"}
    assert sorted([*DATASETS, *TRAINERS, *PLANS]) == sorted(CONFIGS.rglob("*.yaml"))  # none lies elsewhere


@pytest.mark.parametrize("path", [*DATASETS, *TRAINERS], ids=label)
def test_the_first_lines_name_the_command(path: Path):
    (command,) = [line for line in comment(path) if line.startswith("bash ")]
    _, script, dataset, *config = command.split()
    assert (CONFIGS / "datasets" / f"{dataset}.yaml").is_file()
    if path in DATASETS:
        assert dataset == path.stem and (ROOT / script).is_file()
    else:
        assert config[0] == path.stem
        assert path.parent.name in trainers_of(script)


@pytest.mark.parametrize("path", TRAINERS, ids=label)
def test_a_trainers_config_states_what_to_expect(path: Path):
    (expected,) = [line for line in comment(path) if line.startswith("expected:")]
    assert expected == "expected: unmeasured" or re.search(r"\d", expected)


@pytest.mark.parametrize("dataset", DATASETS, ids=label)
@pytest.mark.parametrize("trainer", TRAINERS, ids=label)
def test_configs_merge_and_their_settings_are_valid(dataset: Path, trainer: Path):
    cfg = merged(dataset, trainer)
    settings = AirSettings.from_cfg(cfg)
    assert settings.prompt == (cfg.AIR.PROMPT or cfg.DATASET.TEMPLATE)
    assert cfg.TRAINER.NAME == ""  # the command names the trainer, so that one file may serve several
    assert flatten(cfg) != flatten(default())


@pytest.mark.parametrize("path", PLANS, ids=label)
def test_a_plan_names_its_command_and_its_rows_are_valid(path: Path):
    from air_plugin.config import merge_options

    (script,) = [line.split("bash ")[1].split()[0] for line in comment(path) if "bash " in line]
    assert f"--plan {path.stem} " in (ROOT / script).read_text()
    rows, titles = plan(path.stem)["rows"], [row["title"] for row in plan(path.stem)["rows"]]
    assert len(set(titles)) == len(titles)
    assert plan(path.stem).get("baseline", titles[0]) in titles
    for row in rows:
        assert set(row) <= {"title", "trainer", "options"}
        cfg = merged(DATASETS[0], CONFIGS / "trainers" / row["trainer"] / "mini.yaml")
        merge_options(cfg, [str(part) for pair in row.get("options", {}).items() for part in pair])
        AirSettings.from_cfg(cfg)


@pytest.mark.parametrize("path", DATASETS, ids=label)
def test_a_data_set_names_itself_and_a_config_of_every_trainer(path: Path):
    from dassl.data.datasets import DATASET_REGISTRY

    import train

    for name in train.DATASETS:
        __import__(f"datasets.{name}")
    cfg = merged(path)
    assert cfg.DATASET.NAME in DATASET_REGISTRY.registered_names()
    for folder in {trainer.parent for trainer in TRAINERS}:
        assert (folder / f"{cfg.DATASET.DEFAULT_CONFIG}.yaml").is_file(), folder.name


@pytest.mark.parametrize("folder", sorted({path.parent.name for path in TRAINERS}))
def test_the_folder_is_a_registered_trainer(folder: str):
    from dassl.engine import TRAINER_REGISTRY

    import train

    for name in train.TRAINERS:
        __import__(f"trainers.{name}")
    assert folder in TRAINER_REGISTRY.registered_names()


@pytest.mark.parametrize("path", TRAINERS, ids=label)
def test_a_variant_holds_only_its_differences(path: Path):
    base = yaml.safe_load(path.read_text()).get("_BASE_")
    if base is None or "/" in base:
        return  # it stands at the beginning, or takes over what another method has; then plain values may be repeated
    before, after = flatten(merged(path.parent / base)), flatten(merged(path))
    changed = {key for key in after if after[key] != before[key]}

    def leaves(tree: dict, prefix: str = "") -> set[str]:
        return {
            key
            for name, value in tree.items()
            for key in (leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}"})
        }

    written = leaves(yaml.safe_load(path.read_text())) - {"_BASE_"}
    assert written == changed
