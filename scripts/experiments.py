"""The rows of a table: those of a method's script, and those of a file of configs/experiments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from air_plugin.config import read_yaml
from air_plugin.utils.errors import unknown
from scripts.compose import config_file, uses_generator


@dataclass(frozen=True)
class Row:
    """A row of a table: a trainer with its options, run for every seed. Without a title it has the trainer's name.

    The preset follows CONFIG, and the options come after it. `table` is the name of its table; an experiment that names
    no tables has one, "".
    """

    trainer: str
    options: list[str]
    title: str = ""
    preset: str = ""
    table: str = ""

    def config(self, config: str) -> str:
        """CONFIG with the row's preset, unless it names that one already: their runs are then the same."""
        named = self.preset in ("", *config.split("+")[1:]) or config.endswith(f"_{self.preset}")
        return config if named else f"{config}+{self.preset}"

    @property
    def name(self) -> str:
        name = self.title or self.trainer
        return f"{name} ({self.table})" if self.table not in name else name


def without_air(options: list[str]) -> list[str]:
    """The options without those that only AiR reads, so that a control is not run again for each of their values."""
    pairs = zip(options[::2], options[1::2], strict=False)
    return [part for key, value in pairs if not key.startswith("AIR.") for part in (key, value)]


def rows_of(trainers: str, options: list[str]) -> list[Row]:
    """The rows of a method's main.sh: the controls, then the method itself."""
    *controls, main = trainers.split(",")
    return [*(Row(trainer, without_air(options)) for trainer in controls), Row(main, options)]


def default_config(dataset: str, experiment: str | None = None) -> str:
    """CONFIG of a command that names none: the data set's default, or what the experiment uses instead of it.

    Raises:
        UserError: there is no such data set or experiment.
    """
    config = str(_read("datasets", dataset, "data set")["DATASET"]["DEFAULT_CONFIG"])
    instead = _read("experiments", experiment, "experiment").get("configs", {}) if experiment else {}
    return str(instead.get(config, config))


def _read(folder: str, name: str, kind: str) -> Mapping[str, Any]:
    return read_yaml(config_file(folder, name, kind).read_text("utf-8"))


def experiment_of(name: str, options: list[str]) -> tuple[list[Row], str | None]:
    """The rows of an experiment and the title of its baseline; rows' own options come after the command line's.

    Under `tables`, an experiment may name several tables, each with options; every table has every row, or those that
    name it in their own `tables`. A row that a table does not have is left out with a line. Titles are `in_table`.

    Raises:
        UserError: there is no such experiment, or a row names an unknown preset or table.
    """
    experiment = _read("experiments", name, "experiment")
    tables = experiment.get("tables", {"": {}})
    rows: list[Row] = []
    for table, shared in tables.items():
        before = len(rows)
        for row in experiment["rows"]:
            chosen = row.get("tables", list(tables))
            if wrong := [one for one in chosen if one not in tables]:
                raise unknown("table", wrong[0], tables)
            if table in chosen:
                rows.append(_row(row, table, shared, options))
        if absent := len(experiment["rows"]) - (len(rows) - before):
            few = f"{absent} of {len(experiment['rows'])} rows"
            print(f"left out of the table {table}: {few}, as configs/experiments/{name}.yaml says")
    return rows, experiment.get("baseline")


def in_table(title: str, table: str) -> str:
    """A title of the file, in which {table} stands for the table's name: titles name one row in all of a data set."""
    return title.replace("{table}", table)


def _row(row: Mapping[str, Any], table: str, shared: Mapping[str, Any], options: list[str]) -> Row:
    """A row of a table, from its entry in the file and the table's own options."""
    given = options if uses_generator(row["trainer"]) else without_air(options)
    own = [str(part) for pair in {**shared, **row.get("options", {})}.items() for part in pair]
    preset = config_file("presets", row["preset"], "preset").stem if "preset" in row else ""
    return Row(row["trainer"], [*given, *own], in_table(row["title"], table), preset, table)
