"""From result.json files to a table: what is in it, and what harmful files do to it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest

from air_plugin.report import read_results, report, table


def result(trainer: str = "AiR", seed: int = 1, accuracy: float = 80.0, **changes: Any) -> dict[str, Any]:
    heads = {"text": {"accuracy": accuracy}, "fused": {"accuracy": accuracy + 1}}
    return {
        "trainer": trainer, "dataset": "Digits", "config": "mini", "backbone": "mini", "split_family": "zhou",
        "template": "a photo of the digit {}.", "seed": seed, "headline": "text", "heads": heads,
        "pseudo_labels": {"selected": 100, "coverage": 50.0, "accuracy": 90.0}, **changes,
    }  # fmt: skip


def write(output: Path, values: Any, name: str | None = None) -> Path:
    if name is None:
        name = f"digits/{values['trainer']}/{values['config']}/seed{values['seed']}"
    path = output / name / "result.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return path


def cells(text: str, method: str) -> list[str]:
    """The cells of a method's row."""
    (row,) = [line for line in text.splitlines() if f"| {method} " in line]
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_mean_and_deviation_over_seeds():
    values = {1: 79.25, 2: 81.5, 3: 83.0}
    text = table([result(seed=seed, accuracy=value) for seed, value in values.items()])
    spread = f"{mean(values.values()):.1f} +- {stdev(values.values()):.1f}"
    fused = f"{mean(values.values()) + 1:.1f} +- {stdev(values.values()):.1f}"
    assert spread == "81.2 +- 1.9"
    assert cells(text, "AiR (mini)") == [
        "Digits", "AiR (mini)", "text", spread, spread, fused, "90.0 +- 0.0", "1 2 3",
    ]  # fmt: skip


def test_one_seed_has_no_deviation_and_a_missing_head_an_empty_cell():
    zero = result("ZeroshotCLIP", heads={"text": {"accuracy": 68.25}}, pseudo_labels={"accuracy": None})
    assert cells(table([zero]), "ZeroshotCLIP (mini)")[3:] == ["68.2", "68.2", "", "", "1"]


def test_accuracy_is_the_headline_heads():
    assert cells(table([result(headline="fused")]), "AiR (mini)")[2:5] == ["fused", "81.0", "80.0"]


def test_rows_are_grouped_by_data_set_trainer_and_config():
    runs = [
        result(seed=1), result(seed=2), result(config="no_lora"), result("CPL"), result("ZeroshotCLIP"),
        result(dataset="Another"),
    ]  # fmt: skip
    rows = [line for line in table(runs).splitlines() if line.startswith("| ")][1:]
    methods = [re.split(r" *\| *", row)[1:3] for row in rows]
    assert methods == [
        ["Another", "AiR (mini)"],
        ["Digits", "ZeroshotCLIP (mini)"],
        ["Digits", "CPL (mini)"],
        ["Digits", "AiR (mini)"],
        ["Digits", "AiR (no_lora)"],
    ]


def test_every_setting_that_makes_tables_incomparable_is_named():
    text = table([result(), result("CPL"), result("CPL", split_family="elevater", backbone="ViT-B/32")])
    notes = [line for line in text.splitlines() if line.startswith("Digits: backbone")]
    assert notes == [
        'Digits: backbone ViT-B/32, split family elevater, template "a photo of the digit {}."',
        'Digits: backbone mini, split family zhou, template "a photo of the digit {}."',
    ]


HARMFUL = {
    "cut short": json.dumps(result())[:50],
    "empty": "",
    "a number": "5",
    "null": "null",
    "a list": "[1, 2]",
    "text": '"text"',
    "foreign": '{"accuracy": 5}',
    "without seed": json.dumps({key: value for key, value in result().items() if key != "seed"}),
    "without pseudo-labels": json.dumps({key: value for key, value in result().items() if key != "pseudo_labels"}),
    "without the headline head": json.dumps(result(headline="other")),
    "heads a list": json.dumps(result(heads=[1])),
    "head without accuracy": json.dumps(result(heads={"text": {}})),
    "accuracy no number": json.dumps(result(heads={"text": {"accuracy": "high"}})),
    "pseudo-labels a number": json.dumps(result(pseudo_labels=5)),
    "seed a list": json.dumps(result(seed=[1])),
}


@pytest.mark.parametrize("kind", HARMFUL)
def test_damaged_and_foreign_files_are_named_and_the_rest_is_reported(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture
):
    write(tmp_path, result(seed=1))
    write(tmp_path, result(seed=2))
    path = write(tmp_path, HARMFUL[kind], "digits/AiR/mini/seed3")
    results, faults = read_results(tmp_path)
    assert [r["seed"] for r in results] == [1, 2]
    assert len(faults) == 1 and str(path) in faults[0] and "\n" not in faults[0]
    assert report(tmp_path) == 0
    out, err = capsys.readouterr()
    assert f"warning: {path}" in out and err == ""
    assert cells(out, "AiR (mini)")[-1] == "1 2"


def test_a_file_that_is_no_text_is_named(tmp_path: Path):
    write(tmp_path, result())
    path = write(tmp_path, "", "elsewhere")
    path.write_bytes(b"\xff\xfe\x80")
    results, faults = read_results(tmp_path)
    assert len(results) == 1 and len(faults) == 1 and str(path) in faults[0]


def test_a_folder_without_results_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture):
    write(tmp_path, "5", "digits")
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert report(folder) == 2
        assert capsys.readouterr().err == f"error: no results in {folder}\n"


def test_only_one_data_set(tmp_path: Path, capsys: pytest.CaptureFixture):
    write(tmp_path, result())
    write(tmp_path, result(dataset="Other"), "other/AiR/mini/seed1")
    assert report(tmp_path, only="digits") == 0
    out = capsys.readouterr().out
    assert "Digits" in out and "Other" not in out


def test_galleries_are_placed_beside_the_results(tmp_path: Path, capsys: pytest.CaptureFixture):
    for seed in (1, 2):
        (write(tmp_path, result(seed=seed)).parent / "gallery.png").write_bytes(b"picture of seed %d" % seed)
    (write(tmp_path, result(), "too/shallow").parent / "gallery.png").write_bytes(b"not this one")
    assert report(tmp_path) == 0
    assert (tmp_path / "digits" / "gallery.png").read_bytes() == b"picture of seed 1"
    assert f"gallery: {tmp_path / 'digits' / 'gallery.png'}\n" in capsys.readouterr().out
    assert not (tmp_path / "too" / "gallery.png").exists()
