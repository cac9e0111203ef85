"""Results read back from disk: what is whole, and what harmful files do."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from air_plugin.collection import collect
from air_plugin.errors import UserError
from air_plugin.results import load_predictions, read_results


def result(trainer: str = "AiR", seed: int = 1, accuracy: float = 80.0, **changes: Any) -> dict[str, Any]:
    heads = {"text": {"accuracy": accuracy}, "fused": {"accuracy": accuracy + 1}}
    return {
        "trainer": trainer, "dataset": "digits", "config": "mini", "backbone": "mini", "split_family": "zhou",
        "template": "a photo of the digit {}.", "seed": seed, "headline": "text", "heads": heads,
        "pseudo_labels": {"selected": 100, "coverage": 50.0, "accuracy": 90.0}, **changes,
    }  # fmt: skip


def write(output: Path, values: Any, name: str | None = None) -> Path:
    if name is None:
        name = f"{values['dataset']}/{values['trainer']}/{values['config']}/seed{values['seed']}"
    path = output / name / "result.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return path


def write_run(output: Path, right: list[bool], **changes: Any) -> Path:
    """A result with the predictions it was made from: class 0 is the truth of every image, class 1 the mistake."""
    accuracy = 100.0 * sum(right) / len(right)
    path = write(output, result(heads={"text": {"accuracy": accuracy}}, **changes))
    write_predictions(path, {
        "split": "test", "root": "/data", "images": [f"images/{i}.png" for i in range(len(right))],
        "labels": [0] * len(right), "classnames": ["zero", "one"],
        "heads": {"text": {"predicted": [0 if hit else 1 for hit in right], "confidence": [0.75] * len(right)}},
    })  # fmt: skip
    return path


def write_predictions(path: Path, values: Any) -> None:
    path.with_name("predictions.json").write_text(values if isinstance(values, str) else json.dumps(values))


def predictions_of(path: Path) -> dict[str, Any]:
    return json.loads(path.with_name("predictions.json").read_text())


# Reading

HARMFUL = {
    "cut short": json.dumps(result())[:50],
    "empty": "",
    "a number": "5",
    "null": "null",
    "a list": "[1, 2]",
    "text": '"text"',
    "nested": "[" * 100_000,
    "foreign": '{"accuracy": 5}',
    "without seed": json.dumps({key: value for key, value in result().items() if key != "seed"}),
    "without pseudo-labels": json.dumps({key: value for key, value in result().items() if key != "pseudo_labels"}),
    "without the headline head": json.dumps(result(headline="other")),
    "headline a list": json.dumps(result(headline=["text"])),
    "heads a list": json.dumps(result(heads=[1])),
    "no heads": json.dumps(result(heads={})),
    "head without accuracy": json.dumps(result(heads={"text": {}})),
    "accuracy no number": json.dumps(result(heads={"text": {"accuracy": "80"}})),
    "accuracy true": json.dumps(result(heads={"text": {"accuracy": True}})),
    "accuracy NaN": json.dumps(result(accuracy=float("nan"))),
    "accuracy infinite": json.dumps(result(accuracy=float("inf"))),
    "accuracy below 0": json.dumps(result(accuracy=-0.5)),
    "accuracy above 100": json.dumps(result(accuracy=100.5)),
    "accuracy too large for a float": json.dumps(result(accuracy=10**400)),
    "macro F1 no number": json.dumps(result(heads={"text": {"accuracy": 80, "macro_f1": "high"}})),
    "a class without number": json.dumps(result(heads={"text": {"accuracy": 80, "per_class": {"one": None}}})),
    "classes a list": json.dumps(result(heads={"text": {"accuracy": 80, "per_class": [80]}})),
    "pseudo-labels a number": json.dumps(result(pseudo_labels=5)),
    "pseudo-labels without accuracy": json.dumps(result(pseudo_labels={"selected": 5})),
    "selected no number": json.dumps(result(pseudo_labels={"accuracy": 80, "selected": "all"})),
    "rounds a mapping": json.dumps(result(rounds={"accuracy": 80})),
    "a round a number": json.dumps(result(rounds=[80])),
    "by_lambda without pairs": json.dumps(result(by_lambda=[1, 2])),
    "by_lambda NaN": json.dumps(result(by_lambda=[[float("nan"), 80]])),
    "auxiliary a mapping": json.dumps(result(auxiliary={"lambda": 2.0})),
    "auxiliary text": json.dumps(result(auxiliary="auto")),
    "a round of the auxiliary a number": json.dumps(result(auxiliary=[2.0])),
    "a round of the auxiliary without lambda": json.dumps(result(auxiliary=[{"accuracy": 80}])),
    **{
        f"auxiliary with {key} {value}": json.dumps(result(auxiliary=[{"lambda": 2.0}, {"lambda": 2.0, key: value}]))
        for key, value in (
            ("lambda", float("nan")), ("lambda", -0.5), ("lambda", "auto"), ("lambda", None), ("lambda", True),
            ("changed", -1.0), ("changed", 100.5), ("changed", "few"), ("accuracy", float("nan")), ("accuracy", -0.1),
            ("accuracy", 101), ("scale", float("inf")), ("scale", "0.1"), ("anchor", float("nan")), ("anchor", -1),
            ("iterations", "17"), ("converged", "yes"), ("converged", 1), ("mass", {"zero": 1}), ("mass", [1, "2"]),
            ("mass", [float("nan")]), ("mass", "all"),
        )
    },
    "beta NaN": json.dumps(result(beta=float("nan"))),
    "beta text": json.dumps(result(beta="auto")),
    "beta below 0": json.dumps(result(beta=-1.0)),
    "stages a mapping": json.dumps(result(stages={"lora": 5})),
    "a stage a number": json.dumps(result(stages=[5])),
    **{
        f"stage with {key} {value}": json.dumps(
            result(stages=[{"name": "lora", "seconds": 5.0, "cached": False, key: value}])
        )
        for key, value in (
            ("name", None), ("name", "two\nlines"), ("seconds", float("nan")), ("seconds", -1.0), ("seconds", "5"),
            ("seconds", 1e13), ("cached", None), ("cached", "no"),
        )
    },
    "provenance text": json.dumps(result(provenance="here")),
    "settings a list": json.dumps(result(provenance={"settings": [1]})),
    "wording a number": json.dumps(result(provenance={"settings": {"DATASET.WORDING": 5}})),
    "seed a list": json.dumps(result(seed=[1])),
    "seed true": json.dumps(result(seed=True)),
    "seed a fraction": json.dumps(result(seed=1.5)),
    "data set a number": json.dumps(result(dataset=5)),
    "trainer null": json.dumps(result(trainer=None)),
    "config a list": json.dumps(result(config=["mini"])),
    "template of two lines": json.dumps(result(template="a\nphoto {}")),
    "half a surrogate pair": json.dumps(result(backbone="\ud800")),
    "a terminal's escape": json.dumps(result(config="\x1b[2J")),
}


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
    em = {"anchor": 0.0, "iterations": 9, "converged": False, "mass": [98.0, 0]}
    write(tmp_path, result(seed=3, auxiliary=[round_, {**round_, **em, "accuracy": 100.0, "of a later version": "x"}],
                           stages=[{"name": "lora, round 2", "seconds": 0, "cached": True}]))  # fmt: skip
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
