"""Results read back from disk: what is whole, and what harmful files do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from result_files import HARMFUL, predictions_of, result, write, write_predictions, write_run

from air_plugin.report.collection import collect
from air_plugin.report.results import load_predictions, read_results
from air_plugin.utils.errors import UserError

# Reading


@pytest.mark.parametrize("kind", HARMFUL)
def test_damaged_and_foreign_files_are_named_and_the_rest_is_kept(tmp_path: Path, kind: str):
    write(tmp_path, result(seed=1))
    write(tmp_path, result(seed=2))
    path = write(tmp_path, HARMFUL[kind], "digits/AiR/mini/seed3")
    results, faults = read_results(tmp_path)
    assert [r["seed"] for r in results] == [1, 2]
    assert len(faults) == 1 and str(path) in faults[0] and "\n" not in faults[0]
    collection = collect(tmp_path)
    assert collection.faults == faults and list(collection.methods[0].runs["digits"]) == [1, 2]


def test_what_only_newer_results_have_is_accepted(tmp_path: Path):
    figures = {"selected": 8, "coverage": 50, "accuracy": None, "candidates": 1.5, "candidate_recall": None}
    write(tmp_path, result(rounds=[figures, figures], by_lambda=[[0, 80.5], [2.0, 81]], stages=[], provenance={}))
    write(tmp_path, result(seed=2, rounds=None, by_lambda=None, provenance={"settings": {"AIR.M": 3}}))
    round_ = {"changed": 0, "accuracy": None, "lambda": 0.0, "scale": None}  # the paper's form, not a label known
    em = {"prior_strength": 0.0, "iterations": 9, "converged": False, "soft_counts": [98.0, 0]}
    write(
        tmp_path,
        result(
            seed=3,
            auxiliary=[round_, {**round_, **em, "accuracy": 100.0, "of a later version": "x"}],
            stages=[{"name": "lora, round 2", "seconds": 0, "cached": True}],
        ),
    )
    write(tmp_path, result(seed=4, auxiliary=None, stages=None, beta=None))
    write(tmp_path, result(seed=5, beta=0))
    results, faults = read_results(tmp_path)
    assert [r["seed"] for r in results] == [1, 2, 3, 4, 5] and faults == []


def test_a_file_that_is_no_text_is_named(tmp_path: Path):
    write(tmp_path, result())
    path = write(tmp_path, "", "elsewhere")
    path.write_bytes(b"\xff\xfe\x80")
    results, faults = read_results(tmp_path)
    assert len(results) == 1 and len(faults) == 1 and str(path) in faults[0]


def test_loops_and_dead_links_end(tmp_path: Path):
    path = write(tmp_path / "out", result())
    (path.parent / "again").symlink_to(tmp_path / "out")
    bad = [tmp_path / "out" / name / "result.json" for name in ("dead", "loop")]
    for link, target in zip(bad, ("nowhere", "result.json"), strict=True):
        link.parent.mkdir()
        link.symlink_to(target)
    results, faults = read_results(tmp_path / "out")
    assert [r["path"] for r in results] == [path]
    assert len(faults) == 2 and all(str(link) in fault for link, fault in zip(bad, faults, strict=True))
    (tmp_path / "self").symlink_to("self")
    with pytest.raises(UserError, match=r"no results in .*self"):
        collect(tmp_path / "self")
    (tmp_path / "link").symlink_to("out")
    (found,) = collect(tmp_path / "link").methods
    assert found.title == "AiR (mini)"


def test_an_unfinished_run_is_named(tmp_path: Path):
    (write(tmp_path, result()).parent / "settings.json").write_text("{}")
    for name in ("digits/AiR/mini/seed2", "cache/lora/abc"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "settings.json").write_text("{}")
    (fault,) = collect(tmp_path).faults
    assert fault.startswith(f"{tmp_path / 'digits/AiR/mini/seed2'} holds an unfinished run")


def test_nothing_to_report_is_an_error_that_says_why(tmp_path: Path):
    with pytest.raises(UserError, match=f"^no results in {re.escape(str(tmp_path))}$"):
        collect(tmp_path)
    with pytest.raises(UserError, match=r"no results in .*nowhere; there is no such folder"):
        collect(tmp_path / "nowhere")
    path = write(tmp_path, "5", "digits")
    with pytest.raises(UserError, match=f"no results in {re.escape(str(tmp_path))}; .*{re.escape(str(path))}"):
        collect(tmp_path)


# Predictions


def test_predictions_come_back_as_arrays(tmp_path: Path):
    write_run(tmp_path, [True, False, True, True])
    (run,), _ = read_results(tmp_path)
    said = load_predictions(run)
    assert said is not None and said.root == Path("/data") and said.images[1] == "images/1.png"
    assert said.labels.tolist() == [0, 0, 0, 0] and said.predicted["text"].tolist() == [0, 1, 0, 0]
    assert said.confidence["text"].tolist() == [0.75] * 4 and said.classnames == ["zero", "one"]


def test_an_older_run_has_no_predictions(tmp_path: Path):
    assert load_predictions({**result(), "path": write(tmp_path, result())}) is None


DAMAGE: dict[str, Any] = {
    "cut short": '{"labels": [0, ',
    "nested": "[" * 100_000,
    "a list": [1],
    "no labels": {"labels": None},
    "a label too few": {"labels": [0, 0, 0]},
    "a label out of range": {"labels": [0, 0, 0, 2]},
    "a label below 0": {"labels": [0, 0, 0, -1]},
    "labels of fractions": {"labels": [0, 0, 0, 0.5]},
    "labels of text": {"labels": ["0", "0", "0", "0"]},
    "labels of lists": {"labels": [[0], [0, 0], [0], [0]]},
    "a label too large for an integer": {"labels": [0, 0, 0, 10**30]},
    "no images": {"images": []},
    "an image a number": {"images": ["a", "b", "c", 4]},
    "root a number": {"root": 5},
    "no class names": {"classnames": []},
    "heads a list": {"heads": [1]},
    "no heads": {"heads": {}},
    "a head a list": {"heads": {"text": [1]}},
    "a head without confidence": {"heads": {"text": {"predicted": [0, 1, 0, 0]}}},
    "confidence NaN": {"heads": {"text": {"predicted": [0, 1, 0, 0], "confidence": [float("nan")] * 4}}},
    "confidence above 1": {"heads": {"text": {"predicted": [0, 1, 0, 0], "confidence": [75.0] * 4}}},
    "of another run": {"heads": {"text": {"predicted": [1, 1, 1, 0], "confidence": [0.75] * 4}}},
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_predictions_are_one_line(tmp_path: Path, kind: str):
    path = write_run(tmp_path, [True, False, True, True])
    change = DAMAGE[kind]
    write_predictions(path, {**predictions_of(path), **change} if isinstance(change, dict) else change)
    (run,), _ = read_results(tmp_path)
    with pytest.raises(UserError) as raised:
        load_predictions(run)
    assert str(path.with_name("predictions.json")) in str(raised.value) and "\n" not in str(raised.value)


def test_predictions_that_lack_a_key_say_which(tmp_path: Path):
    path = write_run(tmp_path, [True, False])
    for key in ("root", "images", "labels", "classnames", "heads"):
        write_predictions(path, {name: value for name, value in predictions_of(path).items() if name != key})
        with pytest.raises(UserError, match=f"it has no {key}"):
            load_predictions(read_results(tmp_path)[0][0])
        write_run(tmp_path, [True, False])
