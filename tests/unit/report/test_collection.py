"""What may stand in one table, and in which order."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from result_files import result, write

from air_plugin.report.collection import collect
from air_plugin.utils.errors import UserError


def titles(output: Path, **options: Any) -> list[str]:
    return [method.title for method in collect(output, **options).methods]


def test_rows_stand_in_the_usual_order_and_numbers_in_theirs(tmp_path: Path):
    shots = [f"mini+DATASET.NUM_SHOTS={number}" for number in (16, 4, 1)]
    for trainer, config in [
        ("AiR", "mini"),
        ("Other", "mini"),
        ("CPL", "mini"),
        ("ZeroshotAiR", "mini"),
        ("ZeroshotCLIP", "mini"),
        ("UPL", "mini"),
        *(("CoOp", config) for config in shots),
        ("CoOp", "mini"),
    ]:
        write(tmp_path, result(trainer, config=config))
    assert titles(tmp_path) == [
        "ZeroshotCLIP",
        "CoOp",
        *(f"CoOp, NUM_SHOTS = {number}" for number in (1, 4, 16)),
        "UPL",
        "CPL",
        "ZeroshotAiR",
        "AiR",
        "Other",
    ]


def test_methods_json_names_and_orders_rows(tmp_path: Path):
    for trainer in ("ZeroshotCLIP", "CPL", "AiR"):
        write(tmp_path, result(trainer))
    entries = [
        {"trainer": "AiR", "config": "mini", "title": "ours"},
        {"trainer": "UPL", "config": "mini", "title": "not run"},
        {"trainer": "CPL", "config": "mini", "title": ""},
    ]
    (tmp_path / "digits" / "methods.json").write_text(json.dumps(entries))
    for folder in (tmp_path, tmp_path / "digits"):
        assert titles(folder) == ["ours", "CPL", "ZeroshotCLIP"]
        assert collect(folder).faults == []


def test_the_first_data_set_with_a_title_gives_it(tmp_path: Path):
    for dataset in ("digits", "letters"):
        write(tmp_path, result(dataset=dataset))
        entry = {"trainer": "AiR", "config": "mini", "title": f"ours on {dataset}"}
        (tmp_path / dataset / "methods.json").write_text(json.dumps([entry]))
    assert titles(tmp_path) == ["ours on digits"]
    assert titles(tmp_path, datasets=["letters"]) == ["ours on letters"]


def test_a_damaged_methods_json_costs_only_the_names(tmp_path: Path):
    write(tmp_path, result())
    path = tmp_path / "digits" / "methods.json"
    two_lines = '[{"trainer": "AiR", "config": "mini", "title": "two\\nlines"}]'
    for text in ("", "[", "{}", "[1]", '[{"trainer": "AiR"}]', "[" * 100_000, "\x00", two_lines):
        path.write_text(text)
        collection = collect(tmp_path)
        assert [method.title for method in collection.methods] == ["AiR"]
        (fault,) = collection.faults
        assert str(path) in fault and "\n" not in fault


def test_rows_with_the_same_title_are_told_apart(tmp_path: Path):
    entries = [{"trainer": "AiR", "config": config, "title": "ours"} for config in ("mini", "other")]
    for entry in entries:
        write(tmp_path, result(config=entry["config"]))
    (tmp_path / "digits" / "methods.json").write_text(json.dumps(entries))
    assert titles(tmp_path) == ["ours: AiR (mini)", "ours: AiR (other)"]


def test_given_rows_restrict_order_and_name(tmp_path: Path):
    for trainer in ("ZeroshotCLIP", "CPL", "AiR"):
        write(tmp_path, result(trainer))
    write(tmp_path, result("CPL", config="large", backbone="ViT-L/14"))  # cannot stand beside them, and need not
    rows = {("AiR", "mini"): "ours", ("UPL", "mini"): "not run", ("CPL", "mini"): ""}
    collection = collect(tmp_path, rows=rows)
    assert [method.title for method in collection.methods] == ["ours", "CPL"]
    assert collection.faults == ["no result of not run"]


def test_filters_choose_and_unknown_names_have_near_matches(tmp_path: Path):
    for dataset in ("digits", "letters"):
        for trainer in ("CPL", "AiR"):
            write(tmp_path, result(trainer, dataset=dataset))
    assert collect(tmp_path).datasets == ["digits", "letters"]
    assert collect(tmp_path, datasets=["letters", "digits"]).datasets == ["letters", "digits"]
    assert collect(tmp_path, datasets=["letters"]).datasets == ["letters"]
    assert titles(tmp_path, methods=["AiR"]) == titles(tmp_path, methods=["AiR (mini)"]) == ["AiR"]
    for options, message in [
        ({"datasets": ["digit"]}, "unknown data set 'digit'; did you mean digits?"),
        ({"methods": ["AiR (min)"]}, "unknown method 'AiR (min)'; did you mean AiR?"),
        ({"backbone": "ViT-B/32"}, "unknown backbone 'ViT-B/32'; known: mini"),
        ({"split_family": "zho"}, "unknown split family 'zho'; did you mean zhou?"),
        ({"paradigm": "ssl"}, "unknown paradigm 'ssl'; known: ul"),
    ]:
        with pytest.raises(UserError, match=re.escape(message)):
            collect(tmp_path, **options)


@pytest.mark.parametrize(
    ("change", "option", "filters"),
    [
        ({"backbone": "ViT-B/32"}, "--backbone", {"backbone": "mini"}),
        ({"split_family": "elevater"}, "--split-family", {"split_family": "zhou"}),
        ({"paradigm": "ssl"}, "--paradigm", {"paradigm": "ul"}),
        ({"template": "a {}."}, "--method", {"methods": ["AiR"]}),
        ({"class_names": "grip"}, "--method", {"methods": ["AiR"]}),
    ],
)
def test_results_that_cannot_be_compared_are_an_error_that_names_them(
    tmp_path: Path, change: dict[str, Any], option: str, filters: dict[str, Any]
):
    paths = [write(tmp_path, result(seed=seed)) for seed in (1, 2)]
    other = write(tmp_path, result("CPL", **change))
    with pytest.raises(UserError) as raised:
        collect(tmp_path)
    message = str(raised.value)
    (value,) = change.values()
    assert option in message and f'"{value}"' in message and "\n" not in message
    assert f"2 results, one of them {paths[0]}" in message and f"1 results, one of them {other}" in message
    collection = collect(tmp_path, **filters)
    assert [method.title for method in collection.methods] == ["AiR"] and collection.faults == []


def made_from(**inputs: str) -> dict[str, Any]:
    usual = {"images": "a", "lists": "b", "class_names": "c", "backbone": "d", "generator": "e"}
    return {"provenance": {"inputs": usual | inputs}}


@pytest.mark.public_reports
@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("images", "the images of digits differ between "),
        ("lists", "the lists of images and labels of digits differ between "),
        ("class_names", "the class names of digits differ between "),
        ("backbone", "the weights of the backbone differ between "),
        ("generator", "the weights of the generator of AiR (mini) differ between "),
    ],
)
def test_seeds_of_different_data_or_models_are_not_averaged(tmp_path: Path, kind: str, says: str):
    """Item 1: their mean stood in the table as one data set's."""
    paths = [write(tmp_path, result(seed=seed, **made_from())) for seed in (1, 2)]
    write(tmp_path, result(seed=3))  # from before inputs were recorded
    write(tmp_path, result("CPL", **made_from()))
    assert list(collect(tmp_path).methods[1].runs["digits"]) == [1, 2, 3]
    other = write(tmp_path, result(seed=4, **made_from(**{kind: "x"})))
    with pytest.raises(UserError) as raised:
        collect(tmp_path)
    message = str(raised.value)
    assert message.startswith(says) and str(other.parent) in message and "\n" not in message
    assert f"{paths[0].parent} and " in message or f" and {paths[0].parent}" in message or "CPL" in message


@pytest.mark.public_reports
def test_other_data_sets_and_rows_may_have_other_data_and_generators(tmp_path: Path):
    """Item 1, what is no fault."""
    write(tmp_path, result(**made_from()))
    write(tmp_path, result("ZeroshotAiR", **made_from(generator="x")))
    write(tmp_path, result(dataset="letters", **made_from(images="y", lists="z")))
    assert collect(tmp_path).datasets == ["digits", "letters"]


def test_templates_may_differ_between_data_sets(tmp_path: Path):
    write(tmp_path, result())
    write(tmp_path, result(dataset="letters", template="the letter {}."))
    assert collect(tmp_path).templates == {"digits": "a photo of the digit {}.", "letters": "the letter {}."}


def test_class_names_other_than_the_usual_ones_are_told(tmp_path: Path):
    write(tmp_path, result())
    for trainer in ("UPL", "AiR"):  # another data set may have another source
        write(tmp_path, result(trainer, dataset="letters", class_names="grip"))
    assert collect(tmp_path).class_names == {"letters": "grip"}


def test_two_results_that_claim_the_same_run_are_both_left_out(tmp_path: Path):
    first, copy = write(tmp_path, result(seed=1)), write(tmp_path, result(seed=1), "digits/AiR/copy/seed1")
    write(tmp_path, result(seed=2))
    collection = collect(tmp_path)
    assert list(collection.methods[0].runs["digits"]) == [2]
    assert len(collection.faults) == 1 and str(first) in collection.faults[0] and str(copy) in collection.faults[0]
    (tmp_path / "digits/AiR/mini/seed2/result.json").unlink()
    with pytest.raises(UserError, match=r"no results in .*claim to be seed 1"):
        collect(tmp_path)


def test_missing_seeds_are_named(tmp_path: Path):
    for trainer, seeds in (("ZeroshotCLIP", (1,)), ("CPL", (1, 2, 3)), ("AiR", (1, 2))):
        for seed in seeds:
            write(tmp_path, result(trainer, seed))
    write(tmp_path, result("AiR", 7, dataset="letters"))
    assert collect(tmp_path).faults == [
        "digits: ZeroshotCLIP lacks seeds 2, 3, which other methods have",
        "digits: AiR lacks seed 3, which other methods have",
    ]
