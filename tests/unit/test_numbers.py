"""Numbers in settings: their ranges, how they are read, and that no file holds one that is no JSON (reports 12, 14)."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
from made_up_results import write_run
from runs import arguments
from sources import ENTRIES, LIBRARY, ROOT
from yacs.config import CfgNode

import scripts.experiments
import scripts.run
import train
from air_plugin import RunResult, cli
from air_plugin.config import add_air_config, flatten, merge_file, merge_options, require_ranges
from air_plugin.dassl_settings import DASSL_SETTINGS
from air_plugin.settings import AirSettings, all_settings
from air_plugin.utils.errors import UserError
from air_plugin.utils.files import to_json
from scripts.compose import defaults, resolve

pytestmark = pytest.mark.public_reports
DIGITS = ROOT / "configs" / "datasets" / "digits.yaml"
MINI = ROOT / "configs" / "trainers" / "AiR" / "mini.yaml"
NUMBERS = [one for one in (*all_settings(), *DASSL_SETTINGS) if one.is_number]


def put(cfg: CfgNode, key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        cfg = cfg[section]
    cfg[name] = (value,) if isinstance(cfg[name], (list, tuple)) else value


# Ranges


@pytest.mark.parametrize("one", NUMBERS, ids=lambda one: one.key)
def test_no_number_may_be_nan_infinite_or_huge(one: Any):
    """14. Every number, Dassl's included."""
    for value in (float("nan"), float("inf"), float("-inf"), 1e30, -(10**30)):
        cfg = defaults()
        put(cfg, one.key, value)
        with pytest.raises(UserError, match=rf"^{one.key} is "):
            require_ranges(cfg)


def test_the_defaults_are_in_their_ranges_and_every_number_of_dassl_that_yaml_sets_has_one():
    """14."""
    cfg = defaults()
    require_ranges(cfg)
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        if path.parent.name not in ("experiments", "datasets"):
            merge_file(cfg, path)
            require_ranges(cfg)
    ranged = {one.key for one in NUMBERS}
    changed = [key for key, value in flatten(cfg).items() if value != flatten(defaults())[key]]
    assert len(changed) > 15
    numbers = [key for key in changed if type(flatten(cfg)[key]) in (int, float)]
    assert set(numbers) <= ranged


@pytest.mark.parametrize(
    ("key", "text", "range_"),
    [
        ("AIR.BETA", "Infinity", "at most 1000000"),
        ("AIR.AUX_SCALE", "4e38", "at most 1000000"),
        ("AIR.GUIDANCE", "nan", "at least 0"),
        ("AIR.STEPS", "1001", "in [1, 1000]"),
        ("AIR.GENERATION_SEED", "4294967297", "in [0, 4294967295]"),
        ("AIR.THREADS", "-2", "at least 0"),
        ("TRAINER.PROMPT.CLIP_GRAD", "inf", "at most 1000000"),
        ("TRAINER.CPL.LEVERAGE", "1e39", "at most 1000000"),
        ("OPTIM.LR", "-0.5", "at least 0"),
        ("OPTIM.MOMENTUM", "1.5", "in [0, 1]"),
        ("OPTIM.WEIGHT_DECAY", "-1e-4", "at least 0"),
        ("OPTIM.ADAM_BETA2", "1", "at least 0 and below 1"),
        ("OPTIM.WARMUP_CONS_LR", "nan", "at least 0"),
        ("DATALOADER.TRAIN_X.BATCH_SIZE", "-3", "at least 1"),
        ("DATALOADER.TEST.BATCH_SIZE", "0", "at least 1"),
        ("DATALOADER.NUM_WORKERS", "-4", "in [0, 1024]"),
        ("TRAIN.PRINT_FREQ", "0", "at least 1"),
        ("INPUT.SIZE", "(32, 0)", "at least 1"),
        ("SEED", "-2", "in [-1, 4294967295]"),
    ],
)
def test_train_refuses_a_number_out_of_range_before_it_makes_a_folder(
    key: str, text: str, range_: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """14."""
    assert train.main(arguments("AiR", tmp_path, tmp_path / "run", key, text)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"error: {key} is ")
    assert f"it must be {range_}" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("seed", ["4294967300", "-7"])
def test_a_seed_out_of_range_is_refused(seed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """14. By train.py and by `air`."""
    assert train.main(arguments("CPL", tmp_path, tmp_path / "run", seed=int(seed))) == 2
    assert f"error: SEED is {seed}; it must be in [-1, 4294967295]" in capsys.readouterr().err
    (tmp_path / "classes.txt").write_text("one\ntwo\n")
    stage = ["lora", str(tmp_path), "--classes", str(tmp_path / "classes.txt"), "--seed", seed]
    assert cli.main(stage) == 2
    assert f"error: SEED is {seed}" in capsys.readouterr().err


def test_seed_zero_is_a_seed():
    """14. It was taken for no seed."""
    assert resolve([MINI], dataset_file=DIGITS, flags={"SEED": 0})[0].SEED == 0


def test_settings_made_in_python_are_checked_as_well():
    """14."""
    for field, value in (("weight", float("inf")), ("beta", 1e39), ("steps", 2.5), ("batch", True), ("size", "64")):
        with pytest.raises(UserError, match=r"^AIR\.\w+ is "):
            AirSettings(prompt="a {}", **{field: value})


# JSON


def test_json_is_strict():
    """14."""
    assert to_json({"b": [1, 0.5], "a": None}, sort_keys=True) == '{"a": null, "b": [1, 0.5]}'
    with pytest.raises(ValueError, match=r"^heads\.text\.0\.ece nan is no JSON"):
        to_json({"n": 1, "heads": {"text": ({"ece": float("nan")}, 2)}})
    with pytest.raises(ValueError, match=r"^the value -inf is no JSON"):
        to_json(float("-inf"))


def test_all_json_is_written_by_one_function():
    """14. `json.dumps` writes NaN, which is no JSON."""
    entries = [*ENTRIES, *(path for room in ("trainers", "datasets", "scripts") for path in (ROOT / room).glob("*.py"))]
    found = [
        str(path.relative_to(ROOT))
        for path in [*LIBRARY, *entries]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in ("dump", "dumps") and ast.unparse(node.value) == "json"
    ]
    assert found == ["air_plugin/utils/files.py"]


def test_a_result_that_is_not_finite_leaves_no_file(tmp_path: Path):
    """14."""
    folder = write_run(tmp_path, ["a", "b"], [0, 1], {"text": [0, 1]}, settings={"OPTIM.LR": 0.1})
    result = RunResult.load(folder / "result.json")
    result.settings["OPTIM.LR"] = float("inf")
    with pytest.raises(ValueError, match=r"OPTIM\.LR inf is no JSON"):
        result.save(tmp_path / "new" / "result.json")
    assert not (tmp_path / "new").exists()


# How numbers are read


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("AIR.M", "0120", 120),
        ("AIR.M", "+08", 8),
        ("AIR.M", "1_200", 1200),
        ("AIR.LORA.STEPS", "007", 7),
        ("AIR.LAMBDA", "010", 10.0),
        ("AIR.LAMBDA", "1_0.5", 10.5),
        ("INPUT.SIZE", "(064, 064)", (64, 64)),
        ("AIR.REVISION", "0755", "0755"),
        ("AIR.REVISION", "1e10", "1e10"),
        ("AIR.REVISION", "1:20", "1:20"),
        ("AIR.VARIANT", "2024-01-31", "2024-01-31"),
    ],
)
def test_numbers_are_decimal_on_the_command_line_and_in_files(key: str, text: str, value: Any, tmp_path: Path):
    """12. YAML 1.1 read 0120 as 80, and text that looks like a number lost its zeros."""
    one, other = defaults(), defaults()
    merge_options(one, [key, text])
    *sections, name = key.split(".")
    lines = [
        *(f"{'  ' * depth}{section}:" for depth, section in enumerate(sections)),
        f"{'  ' * len(sections)}{name}: {text}",
    ]
    (tmp_path / "numbers.yaml").write_text("\n".join(lines))
    merge_file(other, tmp_path / "numbers.yaml")
    assert flatten(one)[key] == flatten(other)[key] == value
    assert type(flatten(one)[key]) is type(flatten(other)[key]) is type(value)


@pytest.mark.parametrize("text", ["0x1F", "0b101", "0o17", "2:45", "1e3", "12.0", "²", "ten"])
def test_what_is_no_decimal_whole_number_is_refused(text: str):
    """12. YAML 1.1 read 2:45 as 165."""
    with pytest.raises(UserError, match=r"^AIR\.K is .*; it must be a whole number"):
        merge_options(defaults(), ["AIR.K", text])


def test_an_experiments_rows_are_read_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """12."""
    (tmp_path / "mine.yaml").write_text(
        "rows:\n  - {title: a, trainer: AiR, options: {AIR.M: 070, AIR.LAMBDA: 1.50}}\n"
    )
    monkeypatch.setattr(scripts.experiments, "config_file", lambda folder, name, kind: tmp_path / f"{name}.yaml")
    (row,), _ = scripts.run.experiment_of("mine", [])
    assert row.options == ["AIR.M", "070", "AIR.LAMBDA", "1.50"]


# SEEDS and JOBS


@pytest.mark.parametrize(
    ("given", "seeds"), [("04 4 5", [4, 5]), ("0", [0]), ("7 3 007 3", [7, 3]), (" 12\n9 ", [12, 9])]
)
def test_seeds_are_numbers_each_once(given: str, seeds: list[int], monkeypatch: pytest.MonkeyPatch):
    """12. Folders of seed4 and seed04 were two runs of one seed, and the table lost both."""
    monkeypatch.setenv("SEEDS", given)
    assert scripts.run.seeds() == seeds


@pytest.mark.parametrize("given", ["4294967297", "1 ³", "٤", "-1", "1.0", "1,2", "", "99999999999999999999999999"])
def test_what_is_no_seed_is_refused(given: str, monkeypatch: pytest.MonkeyPatch):
    """14."""
    monkeypatch.setenv("SEEDS", given)
    with pytest.raises(UserError, match=r"^SEEDS is '.*whole numbers from 0 to 4294967295"):
        scripts.run.seeds()


@pytest.mark.parametrize("given", ["0", "²", "-2", "1.5", "two"])
def test_what_is_no_number_of_jobs_is_refused(given: str, monkeypatch: pytest.MonkeyPatch):
    """14."""
    monkeypatch.setenv("JOBS", given)
    with pytest.raises(UserError, match=r"^JOBS is '.*at least 1"):
        scripts.run.jobs([])


# Names of folders


def label(*options: str, taken: Path | None = None) -> str:
    return resolve([MINI], dataset_file=DIGITS, options=list(options), taken=taken)[1]


@pytest.mark.parametrize(
    ("key", "texts"),
    [
        ("DATASET.TEMPLATE", ["{}", "{} !", "{} ?", "[{}]", "{}+", "{}/"]),
        ("AIR.PROMPT", ["a {}", "a: {}", "a  {}", "a+{}", "a/{}"]),
        ("TRAINER.PROMPT.CTX_INIT", ["a b", "a_b", "a/b", "a+b", "a  b", "a" * 120 + " b", "a" * 120 + "_b"]),
    ],
)
def test_settings_that_differ_have_folders_that_differ(key: str, texts: list[str]):
    """12."""
    names = [label(key, text) for text in texts]
    assert len({name.lower() for name in names}) == len(texts)
    assert all("/" not in name and " " not in name and len(name) <= 120 for name in names)


def test_one_number_has_one_folder_and_todays_names_stay():
    """12."""
    assert label("AIR.M", "061") == label("AIR.M", "61") == label("AIR.M", "6_1") == "mini+AIR.M=61"
    assert label("AIR.LAMBDA", "0.5", "AIR.K", "3") == "mini+AIR.LAMBDA=0.5+AIR.K=3"


def test_a_folder_whose_name_two_settings_had_is_taken_by_its_own_settings_alone(tmp_path: Path):
    """12."""
    mark = tmp_path / "mini+AIR.PROMPT=my_" / "seed1" / "settings.json"
    mark.parent.mkdir(parents=True)
    mark.write_text(json.dumps({"AIR.PROMPT": "my {}"}))
    assert label("AIR.PROMPT", "my {}", taken=tmp_path) == "mini+AIR.PROMPT=my_"
    other = label("AIR.PROMPT", "my: {}", taken=tmp_path)
    assert other != "mini+AIR.PROMPT=my_" and other.startswith("mini+AIR.PROMPT=my_-")


def test_add_air_config_alone_checks_nothing():
    """14. A host whose Dassl lacks some keys is checked for those that it has."""
    cfg = CfgNode({"DATASET": {}, "TRAINER": {}, "SEED": 3, "DATALOADER": {"NUM_WORKERS": -1}})
    add_air_config(cfg)
    require_ranges(cfg, "AIR", "SEED")
    with pytest.raises(UserError, match=r"^DATALOADER\.NUM_WORKERS is -1"):
        require_ranges(cfg)
