"""Results read back from disk: what is whole, and what harmful files do."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from result_files import HARMFUL, OLD, predictions_of, result, write, write_predictions, write_run

from air_plugin.report.collection import collect
from air_plugin.report.predictions import Predictions, load_predictions
from air_plugin.report.record import AuxiliaryRound, RunResult
from air_plugin.report.results import read_results
from air_plugin.utils.errors import UserError

# Reading


def test_damaged_and_foreign_files_are_named_and_the_rest_is_kept(tmp_path: Path):
    whole = [write(tmp_path, result(seed=seed)) for seed in (1, 2)]
    bad = [write(tmp_path, text, f"digits/AiR/bad{i:03d}/seed1") for i, (_, text) in enumerate(HARMFUL)]
    results, faults = read_results(tmp_path)
    assert [r.path for r in results] == whole and len(faults) == len(bad) > 80
    for path, fault, (message, _) in zip(bad, faults, HARMFUL, strict=True):
        assert fault.startswith(f"{path} ") and message in fault and fault.isprintable()
    collection = collect(tmp_path)
    assert collection.faults == faults and list(collection.methods[0].runs["digits"]) == [1, 2]


def test_what_only_newer_results_have_is_accepted(tmp_path: Path):
    metrics = {"selected": 8, "coverage": 50, "accuracy": None, "candidates": 1.5, "candidate_recall": None}
    write(tmp_path, result(rounds=[metrics, metrics], by_lambda=[[0, 80.5], [2.0, 81]], stages=[], provenance={}))
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
    assert [r.seed for r in results] == [1, 2, 3, 4, 5] and faults == []


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
    assert [r.path for r in results] == [path]
    assert len(faults) == 2 and all(str(link) in fault for link, fault in zip(bad, faults, strict=True))
    (tmp_path / "self").symlink_to("self")
    with pytest.raises(UserError, match=r"no results in .*self"):
        collect(tmp_path / "self")
    (tmp_path / "link").symlink_to("out")
    (found,) = collect(tmp_path / "link").methods
    assert found.title == "AiR"


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
    found = load_predictions(run)
    assert found is not None and found.root == "/data" and found.images[1] == "images/1.png"
    assert found.labels is not None and found.labels.tolist() == [0, 0, 0, 0]
    assert found.heads["text"].predicted.tolist() == [0, 1, 0, 0]
    assert found.heads["text"].confidence.tolist() == [0.75] * 4 and found.classnames == ("zero", "one")


def test_an_older_run_has_no_predictions(tmp_path: Path):
    assert load_predictions(RunResult.load(write(tmp_path, result()))) is None


DAMAGE: list[tuple[str, Any]] = [
    ("cannot be read: Expecting value", '{"labels": [0, '),
    ("nested too deeply", "[" * 100_000),
    ("it is [1]; it must be a mapping", [1]),
    ("only one of them has test labels", {"labels": None}),
    ("its labels are not 4 class numbers", {"labels": [0, 0, 0]}),
    ("its labels are not 4 class numbers from 0 to 1", {"labels": [0, 0, 0, 2]}),
    ("its labels are not 4 class numbers", {"labels": [0, 0, 0, -1]}),
    ("its labels is [0, 0, 0, 0.5]; it must be a list of whole numbers", {"labels": [0, 0, 0, 0.5]}),
    ("its labels is ['0', '0', '0', '0']", {"labels": ["0", "0", "0", "0"]}),
    ("its labels is [[0], [0, 0], [0], [0]]; it must be a list of numbers", {"labels": [[0], [0, 0], [0], [0]]}),
    ("its labels is [0, 0, 0, 1000", {"labels": [0, 0, 0, 10**30]}),
    ("it has no images", {"images": []}),
    ("its images[3] is 4; it must be text", {"images": ["a", "b", "c", 4]}),
    ("its root is 5", {"root": 5}),
    ("it has no classnames", {"classnames": []}),
    ("its heads is [1]", {"heads": [1]}),
    ("it has no text head", {"heads": {}}),
    ("its heads.text is [1]", {"heads": {"text": [1]}}),
    ("it has no heads.text.confidence", {"heads": {"text": {"predicted": [0, 1, 0, 0]}}}),
    *(
        (message, {"heads": {"text": {"predicted": [0, 1, 0, 0], "confidence": values}}})
        for message, values in (
            ("its heads.text.confidence is [nan, nan, nan, nan]", [float("nan")] * 4),
            ("it must be a list of numbers from 0 to 1", [75.0] * 4),
            ("its heads.text.confidence are not 4 numbers", [0.75] * 3),
        )
    ),
    (
        "its text head is correct on 25.0 % of the images, the result has 75.0 %",
        {"heads": {"text": {"predicted": [1, 1, 1, 0], "confidence": [0.75] * 4}}},
    ),
    ("its format is 2; it must be 1", {"format": 2}),
]


def test_damaged_predictions_are_one_line(tmp_path: Path):
    path = write_run(tmp_path, [True, False, True, True])
    (run,), _ = read_results(tmp_path)
    whole = predictions_of(path)
    for message, change in DAMAGE:
        write_predictions(path, {**whole, **change} if isinstance(change, dict) else change)
        with pytest.raises(UserError, match=re.escape(message)) as raised:
            load_predictions(run)
        assert str(raised.value).startswith(f"{path.with_name('predictions.json')} ")
        assert "\n" not in str(raised.value)


def test_predictions_that_lack_a_key_say_which(tmp_path: Path):
    path = write_run(tmp_path, [True, False])
    for key in ("root", "images", "labels", "classnames", "heads"):
        write_predictions(path, {name: value for name, value in predictions_of(path).items() if name != key})
        with pytest.raises(UserError, match=f"it has no {key}"):
            load_predictions(read_results(tmp_path)[0][0])
        write_run(tmp_path, [True, False])


# Writing


def test_what_is_saved_is_loaded_again(tmp_path: Path):
    """Every field, with values that differ from the defaults."""
    metrics = {"selected": 8, "coverage": 50.0, "accuracy": 75.0, "candidates": 1.5, "candidate_recall": 87.5}
    entry = {
        "lambda": 2.5,
        "changed": 13.0,
        "accuracy": 88.0,
        "scale": 0.09,
        "prior_strength": 10.0,
        "iterations": 17,
        "converged": True,
        "soft_counts": [10.5, 9.5],
    }
    content = result(
        class_names="grip",
        paradigm="trzsl",
        heads={
            "text": {
                "accuracy": 80.0,
                "macro_f1": 79.0,
                "per_class": {"two\nlines": 80.0},
                "seen": 90.0,
                "unseen": 45.0,
                "harmonic": 60.0,
            }
        },
        pseudo_labels=metrics,
        rounds=[metrics, metrics],
        by_lambda=[[0.0, 80.0], [2.5, 81.0]],
        auxiliary=[entry],
        beta=0.5,
        stages=[{"name": "lora", "seconds": 5.0, "cached": True}],
        other_metrics={"mine": [1, {"two": None}]},
        provenance={
            "commit": "abc",
            "dirty": True,
            "command": ["train.py"],
            "python": "3.11",
            "platform": "Linux",
            "packages": {"torch": "2.0", "peft": None},
            "dassl": {"version": "0.6.3", "path": "dassl"},
            "settings": {"AIR.M": 60},
            "inputs": {"images": "0a1b"},
        },
    )
    first, path = RunResult.from_plain(content), tmp_path / "new" / "result.json"
    first.save(path)
    assert json.loads(path.read_text()) == content
    again = RunResult.load(path)
    assert again == first and again.path == path and again.folder == path.parent
    assert again.auxiliary[0].lambda_ == 2.5 and again.settings == {"AIR.M": 60} and again.score() == 60.0


def test_without_seen_classes_no_file_has_their_keys(tmp_path: Path):
    run, path = RunResult.from_plain(result()), tmp_path / "result.json"
    run.save(path)
    assert run.paradigm == "ul" and run.score() == run.heads["text"].accuracy == 80.0 and run.score("fused") == 81.0
    assert run.score("other") is None
    assert set(json.loads(path.read_text())["heads"]["text"]) == {"accuracy", "macro_f1", "per_class"}
    Predictions.load(write_run(tmp_path, [True, False]).with_name("predictions.json")).save(path)
    assert "seen" not in json.loads(path.read_text())


def test_predictions_that_are_saved_are_loaded_again(tmp_path: Path):
    content = predictions_of(write_run(tmp_path, [True, False]))
    for labels in ([0, 0], None):
        Predictions.from_plain({**content, "labels": labels}).save(tmp_path / "predictions.json")
        assert json.loads((tmp_path / "predictions.json").read_text()) == {**content, "labels": labels}
    assert Predictions.load(tmp_path / "predictions.json").labels is None


def test_trainers_may_give_tuples():
    run = RunResult.from_plain(result(by_lambda=[(0.0, 80), (2.5, 81.0)]))
    assert run.by_lambda == ((0.0, 80.0), (2.5, 81.0))


def test_a_wrong_value_is_refused_before_it_is_written():
    with pytest.raises(UserError, match=r"the result of the run is not valid: its beta is nan; it must be a number"):
        RunResult.from_plain(result(beta=float("nan")))
    with pytest.raises(UserError, match="the predictions of the run are not valid: it has no images"):
        Predictions.from_plain({"root": "", "images": [], "labels": None, "classnames": ["a"], "heads": {}})


def test_numbers_of_the_settings():
    wrong = {"a": "auto", "b": True, "c": -1, "d": float("nan"), "e": [2], "f": None}
    run = RunResult.from_plain(result(provenance={"settings": {"AIR.M": 3, "AIR.LAMBDA": 0.5, **wrong}}))
    assert run.number_setting("AIR.M") == 3.0 and run.number_setting("AIR.LAMBDA") == 0.5
    assert all(run.number_setting(key) is None for key in [*wrong, "not there"])


# The form of version 0.1


def test_files_of_version_0_1_are_read(tmp_path: Path):
    """A run of that version, shortened: fewer classes, images and settings."""
    folder = tmp_path / "digits" / "AiR" / "mini+plus" / "seed1"
    shutil.copytree(Path(__file__).parent / "version_0_1", folder)
    (run,), faults = read_results(tmp_path)
    assert faults == [] and run.path == folder / "result.json"
    assert (run.format, run.primary, run.class_names, run.score()) == (1, "fused", "coop", 75.0)
    assert run.auxiliary == (
        AuxiliaryRound(
            lambda_=2.5011,
            changed=13.7,
            accuracy=89.4,
            scale=0.07966350740822084,
            prior_strength=10.86,
            iterations=28,
            converged=True,
            soft_counts=(98.0, 91.2),
        ),
    )
    assert run.by_lambda == ((0.0, 50.0), (2.501055314411676, 75.0))
    assert run.settings["AIR.PRIMARY"] == "fused" and "AIR.HEADLINE" not in run.settings
    assert run.settings["DATASET.CLASS_NAMES"] == "coop" and "DATASET.WORDING" not in run.settings
    predictions = load_predictions(run)
    assert predictions is not None and predictions.heads.keys() == {"text", "fused"}
    assert predictions.labels is not None and predictions.labels.tolist() == [0, 1, 0, 1]
    run.save(folder / "result.json")
    assert RunResult.load(folder / "result.json") == run


def test_class_names_of_version_0_1(tmp_path: Path):
    for settings, source in (
        ({"DATASET.WORDING": "grip"}, "grip"),
        ({"DATASET.WORDING": "coop"}, "coop"),
        ({}, "coop"),
    ):
        path = write(tmp_path, {**OLD, "provenance": {"settings": settings}})
        assert RunResult.load(path).class_names == source
    assert RunResult.load(write(tmp_path, OLD)).class_names == "coop"
