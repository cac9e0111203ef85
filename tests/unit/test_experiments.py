"""Experiments of several tables: which rows each of them has, and which table a data set cannot serve."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import scripts.compose
import scripts.run
from air_plugin.utils.errors import UserError
from scripts.experiments import Row, default_config, experiment_of, in_table

TWO = """
baseline: b
tables:
  ul: {}
  ssl: {DATASET.PARADIGM: ssl}
rows:
  - {title: a, trainer: CoOp, tables: [ssl], options: {DATASET.NUM_SHOTS: 2}}
  - {title: b, trainer: CPL}
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write configs/experiments/mine.yaml."""
    (tmp_path / "configs" / "experiments").mkdir(parents=True)
    monkeypatch.setattr(scripts.compose, "ROOT", tmp_path)
    return (tmp_path / "configs" / "experiments" / "mine.yaml").write_text


def test_every_table_has_its_rows_with_its_options(write: Any, capsys: pytest.CaptureFixture[str]) -> None:
    write(TWO)
    rows, baseline = experiment_of("mine", ["OPTIM.LR", "0.1", "AIR.M", "3"])
    given = ["OPTIM.LR", "0.1"]
    assert rows == [
        Row("CPL", given, "b", "", "ul"),
        Row("CoOp", [*given, "DATASET.PARADIGM", "ssl", "DATASET.NUM_SHOTS", "2"], "a", "", "ssl"),
        Row("CPL", [*given, "DATASET.PARADIGM", "ssl"], "b", "", "ssl"),
    ]
    assert baseline == "b" and [row.name for row in rows] == ["b (ul)", "a (ssl)", "b (ssl)"]
    assert capsys.readouterr().out == "left out of the table ul: 1 of 2 rows, as configs/experiments/mine.yaml says\n"


def test_an_experiment_without_tables_has_one_that_has_no_name(write: Any, capsys: pytest.CaptureFixture[str]) -> None:
    write("rows: [{title: a, trainer: CPL}, {title: b, trainer: UPL}]")
    rows, _ = experiment_of("mine", [])
    assert [(row.name, row.table, row.options) for row in rows] == [("a", "", []), ("b", "", [])]
    assert not capsys.readouterr().out


def test_a_title_may_have_the_name_of_its_table(write: Any) -> None:
    write(TWO.replace("title: b", "title: 'b, {table}'").replace("baseline: b", "baseline: 'b, {table}'"))
    rows, baseline = experiment_of("mine", [])
    assert [row.name for row in rows] == ["b, ul", "a (ssl)", "b, ssl"]
    assert in_table(baseline or "", "ssl") == rows[2].title == "b, ssl"


def test_an_experiment_may_use_another_config_than_the_data_sets_default() -> None:
    assert default_config("digits") == default_config("digits", "benchmark") == "mini"
    assert default_config("digits", "paper") == "mini_vit"  # visual prompts need a ViT
    assert default_config("eurosat", "paper") == "vit_b32"
    with pytest.raises(UserError, match=r"^unknown data set 'digts'; did you mean digits"):
        default_config("digts", "paper")


def test_an_unknown_table_is_an_error_for_people(write: Any) -> None:
    write(TWO.replace("tables: [ssl]", "tables: [sll]"))
    with pytest.raises(UserError, match=r"^unknown table 'sll'; did you mean ssl\?$"):
        experiment_of("mine", [])


class Config(SimpleNamespace):
    """As much of a config as a list of runs needs."""

    def clone(self) -> Config:
        return Config(**vars(self))


def list_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, refuses: str) -> Any:
    """Of two rows in each of two tables, on a data set that refuses a paradigm."""

    def resolve_row(row: Row, *_: Any, **__: Any) -> tuple[Config, str]:
        paradigm = row.options[1] if row.options else "ul"
        dataset = SimpleNamespace(PARADIGM=paradigm, NUM_MISSING_CLASSES=0, IMBALANCE_RATIO=1.0)
        trainer = SimpleNamespace(NAME=row.trainer, PROMPT=SimpleNamespace(MODALITY="text"))
        return Config(DATASET=dataset, TRAINER=trainer), f"mini+{paradigm}"

    def load(cfg: Config) -> None:
        if refuses == cfg.DATASET.PARADIGM:
            raise UserError("class 'one' has 1 image")

    monkeypatch.setenv("OUTPUT", str(tmp_path))
    monkeypatch.setenv("DATA", str(tmp_path))
    monkeypatch.setenv("SEEDS", "1 2")
    monkeypatch.setattr(scripts.run, "resolve_row", resolve_row)
    monkeypatch.setattr(scripts.run, "facts_of", lambda cfg: load)
    options = {"ul": [], "ssl": ["DATASET.PARADIGM", "ssl"]}
    rows = [Row(trainer, options[table], trainer, "", table) for table in options for trainer in ("CPL", "AiR")]
    return scripts.run.list_runs(rows, "digits", "mini")


def test_runs_are_listed_by_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runs, tables = list_runs(monkeypatch, tmp_path, refuses="")
    assert list(tables) == ["ul", "ssl"]
    assert tables["ssl"] == {("CPL", "mini+ssl"): "CPL", ("AiR", "mini+ssl"): "AiR"}
    assert len({run.cfg.OUTPUT_DIR for run in runs}) == len(runs) == 8


def test_a_table_that_a_data_set_cannot_serve_is_left_out_with_a_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, tables = list_runs(monkeypatch, tmp_path, refuses="ssl")
    assert list(tables) == ["ul"] and len(runs) == 4
    assert capsys.readouterr().out == "left out: table ssl: class 'one' has 1 image\n"
