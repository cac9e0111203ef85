"""Titles of rows show what differs between the rows of a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from result_files import result, write

from air_plugin.report.collection import collect
from air_plugin.report.titles import short_titles


def titles(output: Path, **options: Any) -> list[str]:
    return [method.title for method in collect(output, **options).methods]


def made(output: Path, trainer: str, config: str, **settings: Any) -> None:
    write(output, result(trainer, config=config, provenance={"settings": settings}))


def test_the_trainer_is_enough_where_it_has_one_row(tmp_path: Path):
    made(tmp_path, "CPL", "mini+OPTIM.MAX_EPOCH=3", **{"OPTIM.MAX_EPOCH": 3})
    made(tmp_path, "AiR", "mini+plus+OPTIM.MAX_EPOCH=3+AIR.M=6", **{"OPTIM.MAX_EPOCH": 3, "AIR.M": 6})
    assert titles(tmp_path) == ["CPL", "AiR"]


def test_an_option_is_named_where_the_rows_of_a_trainer_differ_in_it(tmp_path: Path):
    for number in (60, 240):
        made(tmp_path, "AiR", f"mini+AIR.K=8+AIR.M={number}", **{"AIR.M": number, "AIR.K": 8})
    made(tmp_path, "AiR", "mini+AIR.K=8", **{"AIR.M": 120, "AIR.K": 8})
    assert titles(tmp_path) == ["AiR", "AiR, M = 60", "AiR, M = 240"]


def test_files_of_the_config_are_named_where_they_differ(tmp_path: Path):
    made(tmp_path, "AiR", "mini")
    made(tmp_path, "AiR", "mini+plus")
    made(tmp_path, "AiR", "mini+plus+AIR.LAMBDA=1", **{"AIR.LAMBDA": 1.0})
    assert titles(tmp_path) == ["AiR (mini)", "AiR (mini+plus)", "AiR (mini+plus), LAMBDA = 1"]


def test_a_name_is_as_short_as_no_other_key_is(tmp_path: Path):
    every = {"AIR.STEPS": 20, "AIR.LORA.STEPS": 500, "AIR.BETA": 1.0, "TRAINER.CPL.BETA": 0.5}
    made(tmp_path, "AiR", "mini", **every)
    made(tmp_path, "AiR", "mini+AIR.LORA.STEPS=9+AIR.BETA=2", **{**every, "AIR.LORA.STEPS": 9, "AIR.BETA": 2.0})
    assert titles(tmp_path)[1] == "AiR, LORA.STEPS = 9, AIR.BETA = 2"


def test_a_path_is_its_last_part_and_a_text_is_cut(tmp_path: Path):
    made(tmp_path, "AiR", "mini+AIR.GENERATOR=_a_b-12345678", **{"AIR.GENERATOR": "/models/sd/mine"})
    made(tmp_path, "AiR", "mini+DATASET.TEMPLATE=x-12345678", **{"DATASET.TEMPLATE": "a" * 50})
    assert titles(tmp_path) == ["AiR, GENERATOR = mine", f"AiR, TEMPLATE = {'a' * 40}..."]


def test_a_config_whose_name_was_cut_is_told_apart_by_the_settings(tmp_path: Path):
    long = "mini+" + "+".join(f"AIR.LORA.OPTION{letter}=1" for letter in "ABCDE")
    base = {f"AIR.LORA.OPTION{letter}": 1 for letter in "ABCDE"}
    for number, digest in ((20, "0123abcd"), (30, "4567abcd")):
        made(tmp_path, "AiR", f"{long[:90]}-{digest}", **{**base, "AIR.M": number})
    assert titles(tmp_path) == ["AiR, M = 20", "AiR, M = 30"]


def test_rows_that_no_option_tells_apart_have_their_configs(tmp_path: Path):
    """Names that were cut, without settings."""
    configs = [f"{'mini+AIR.M=1'.ljust(90, '0')}-{digest}" for digest in ("0123abcd", "4567abcd")]
    for config in configs:
        made(tmp_path, "AiR", config)
    assert titles(tmp_path) == [f"AiR ({config})" for config in configs]


def test_names_of_experiments_come_first(tmp_path: Path):
    made(tmp_path, "AiR", "mini")
    made(tmp_path, "AiR", "mini+AIR.M=6", **{"AIR.M": 6})
    (tmp_path / "digits" / "methods.json").write_text('[{"trainer": "AiR", "config": "mini", "title": "ours"}]')
    assert titles(tmp_path) == ["ours", "AiR"]
    assert titles(tmp_path, named=False) == ["AiR", "AiR, M = 6"]


@pytest.mark.parametrize("name", ["AiR, M = 6", "AiR (mini+AIR.M=6)"])
def test_a_row_is_chosen_by_its_title_or_by_trainer_and_config(tmp_path: Path, name: str):
    made(tmp_path, "AiR", "mini")
    made(tmp_path, "AiR", "mini+AIR.M=6", **{"AIR.M": 6})
    (method,) = collect(tmp_path, methods=[name]).methods
    assert method.config == "mini+AIR.M=6"


def test_no_result_has_no_title():
    assert short_titles([]) == {}
