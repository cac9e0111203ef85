"""Results read back from disk: what belongs together, what harmful files do, and the statistics."""

from __future__ import annotations

import json
import os
import random
import re
import tracemalloc
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from air_plugin.errors import UserError
from air_plugin.results import (
    Method,
    accuracies,
    collect,
    interval,
    load_predictions,
    paired_difference,
    read_results,
    summary,
)


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


def titles(output: Path, **options: Any) -> list[str]:
    return [method.title for method in collect(output, **options).methods]


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
    "provenance text": json.dumps(result(provenance="here")),
    "settings a list": json.dumps(result(provenance={"settings": [1]})),
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
    results, faults = read_results(tmp_path)
    assert [r["seed"] for r in results] == [1, 2] and faults == []


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
    assert titles(tmp_path / "link") == ["AiR (mini)"]


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


# What belongs into one table


def test_rows_stand_in_the_usual_order_and_numbers_in_theirs(tmp_path: Path):
    shots = [f"mini+DATASET.NUM_SHOTS={number}" for number in (16, 4, 1)]
    for trainer, config in [
        ("AiR", "mini"), ("Other", "mini"), ("CPL", "mini"), ("ZeroshotAiR", "mini"), ("ZeroshotCLIP", "mini"),
        ("UPL", "mini"), *(("CoOp", config) for config in shots), ("CoOp", "mini"),
    ]:  # fmt: skip
        write(tmp_path, result(trainer, config=config))
    assert titles(tmp_path) == [
        "ZeroshotCLIP (mini)", "CoOp (mini)", *(f"CoOp ({config})" for config in reversed(shots)), "UPL (mini)",
        "CPL (mini)", "ZeroshotAiR (mini)", "AiR (mini)", "Other (mini)",
    ]  # fmt: skip


def test_methods_json_names_and_orders_rows(tmp_path: Path):
    for trainer in ("ZeroshotCLIP", "CPL", "AiR"):
        write(tmp_path, result(trainer))
    entries = [
        {"trainer": "AiR", "config": "mini", "title": "ours"}, {"trainer": "UPL", "config": "mini", "title": "not run"},
        {"trainer": "CPL", "config": "mini", "title": ""},
    ]  # fmt: skip
    (tmp_path / "digits" / "methods.json").write_text(json.dumps(entries))
    for folder in (tmp_path, tmp_path / "digits"):
        assert titles(folder) == ["ours", "CPL (mini)", "ZeroshotCLIP (mini)"]
        assert collect(folder).faults == []


def test_the_first_data_set_with_a_title_gives_it(tmp_path: Path):
    for dataset in ("digits", "letters"):
        write(tmp_path, result(dataset=dataset))
        entry = {"trainer": "AiR", "config": "mini", "title": f"ours on {dataset}"}
        (tmp_path / dataset / "methods.json").write_text(json.dumps([entry]))
    assert titles(tmp_path) == ["ours on digits"]
    assert titles(tmp_path, datasets=["letters"]) == ["ours on letters"]


@pytest.mark.parametrize("text", ["", "[", "{}", "[1]", '[{"trainer": "AiR"}]', "[" * 100_000, "\x00",
                                  '[{"trainer": "AiR", "config": "mini", "title": "two\\nlines"}]'])  # fmt: skip
def test_a_damaged_methods_json_costs_only_the_names(tmp_path: Path, text: str):
    write(tmp_path, result())
    path = tmp_path / "digits" / "methods.json"
    path.write_text(text)
    collection = collect(tmp_path)
    assert [method.title for method in collection.methods] == ["AiR (mini)"]
    assert len(collection.faults) == 1 and str(path) in collection.faults[0] and "\n" not in collection.faults[0]


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
    assert [method.title for method in collection.methods] == ["ours", "CPL (mini)"]
    assert collection.faults == ["no result of not run"]


def test_filters_choose_and_unknown_names_have_near_matches(tmp_path: Path):
    for dataset in ("digits", "letters"):
        for trainer in ("CPL", "AiR"):
            write(tmp_path, result(trainer, dataset=dataset))
    assert collect(tmp_path).datasets == ["digits", "letters"]
    assert collect(tmp_path, datasets=["letters", "digits"]).datasets == ["letters", "digits"]
    assert collect(tmp_path, datasets=["letters"]).datasets == ["letters"]
    assert titles(tmp_path, methods=["AiR (mini)"]) == ["AiR (mini)"]
    for options, said in [
        ({"datasets": ["digit"]}, "unknown data set 'digit'; did you mean digits?"),
        ({"methods": ["AiR (min)"]}, "unknown method 'AiR (min)'; did you mean AiR (mini) or CPL (mini)?"),
        ({"backbone": "ViT-B/32"}, "unknown backbone 'ViT-B/32'; known: mini"),
        ({"split_family": "zho"}, "unknown split family 'zho'; did you mean zhou?"),
    ]:
        with pytest.raises(UserError, match=re.escape(said)):
            collect(tmp_path, **options)


@pytest.mark.parametrize(
    ("change", "option", "filters"),
    [
        ({"backbone": "ViT-B/32"}, "--backbone", {"backbone": "mini"}),
        ({"split_family": "elevater"}, "--split-family", {"split_family": "zhou"}),
        ({"template": "a {}."}, "--method", {"methods": ["AiR (mini)"]}),
    ],
)
def test_results_that_cannot_be_compared_are_an_error_that_names_them(
    tmp_path: Path, change: dict[str, str], option: str, filters: dict[str, Any]
):
    paths = [write(tmp_path, result(seed=seed)) for seed in (1, 2)]
    other = write(tmp_path, result("CPL", **change))
    with pytest.raises(UserError) as raised:
        collect(tmp_path)
    message = str(raised.value)
    assert option in message and next(iter(change.values())) in message and "\n" not in message
    assert f"2 results, one of them {paths[0]}" in message and f"1 results, one of them {other}" in message
    collection = collect(tmp_path, **filters)
    assert [method.title for method in collection.methods] == ["AiR (mini)"] and collection.faults == []


def test_templates_may_differ_between_data_sets(tmp_path: Path):
    write(tmp_path, result())
    write(tmp_path, result(dataset="letters", template="the letter {}."))
    assert collect(tmp_path).templates == {"digits": "a photo of the digit {}.", "letters": "the letter {}."}


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
        "digits: ZeroshotCLIP (mini) lacks seeds 2, 3, which other methods have",
        "digits: AiR (mini) lacks seed 3, which other methods have",
    ]


# Statistics


def test_mean_and_deviation_against_plain_loops():
    values = [79.25, 81.5, 83.0, 80.0]
    total = squares = 0.0
    for value in values:
        total += value
    for value in values:
        squares += (value - total / 4) ** 2
    assert summary(values) == (pytest.approx(total / 4), pytest.approx(sqrt(squares / 3)))
    assert summary([68.25]) == (68.25, None)


def test_interval_has_the_quantiles_of_printed_tables():
    assert interval([5.0]) is None
    assert interval([1.0, 3.0]) == pytest.approx(12.706 * sqrt(2) / sqrt(2), rel=1e-4)
    assert interval([1.0, 2.0, 3.0]) == pytest.approx(4.303 / sqrt(3), rel=1e-3)
    assert interval([4.0, 4.0, 4.0]) == 0.0


def method_of(output: Path, trainer: str) -> Method:
    (method,) = [method for method in collect(output).methods if method.trainer == trainer]
    return method


def pair(output: Path, images: int, seeds: tuple[int, ...] = (1, 2, 3)) -> tuple[Method, Method]:
    """AiR and CPL with random hits; AiR is right more often."""
    rng = random.Random(0)
    for seed in seeds:
        write_run(output, [rng.random() < 0.8 for _ in range(images)], seed=seed)
        write_run(output, [rng.random() < 0.7 for _ in range(images)], seed=seed, trainer="CPL")
    return method_of(output, "AiR"), method_of(output, "CPL")


def test_accuracies_of_a_head_or_the_headline(tmp_path: Path):
    for seed in (2, 1):
        write(tmp_path, result(seed=seed, accuracy=80.0 + seed, headline="fused"))
    write(tmp_path, result(seed=3, heads={"text": {"accuracy": 70.0}}))
    method = method_of(tmp_path, "AiR")
    assert accuracies(method, "digits") == [82.0, 83.0, 70.0]
    assert accuracies(method, "digits", head="text") == [81.0, 82.0, 70.0]
    assert accuracies(method, "digits", head="fused") == [82.0, 83.0]
    assert accuracies(method, "letters") == []


def test_difference_against_a_plain_bootstrap(tmp_path: Path):
    method, baseline = pair(tmp_path, 120)
    found = paired_difference(method, baseline, "digits", resamples=4000)
    assert found is not None and found.seeds == [1, 2, 3] and found.images == 120
    ours, theirs = (np.mean(accuracies(m, "digits")) for m in (method, baseline))
    assert found.points == pytest.approx(ours - theirs)

    def hit(method: Method, seed: int, image: int) -> bool:
        return predictions_of(method.runs["digits"][seed]["path"])["heads"]["text"]["predicted"][image] == 0

    differences = []
    for image in range(120):
        total = 0.0
        for seed in (1, 2, 3):
            total += hit(method, seed, image) - hit(baseline, seed, image)
        differences.append(total / 3)
    rng, means = random.Random(1), []
    for _ in range(4000):
        drawn = 0.0
        for _ in range(120):
            drawn += differences[rng.randrange(120)]
        means.append(100 * drawn / 120)
    means.sort()
    # A percentile of 4000 resamples has a standard error of about 0.1 here, and values lie 100 / 360 apart.
    assert found.low == pytest.approx(means[100], abs=0.6) and found.high == pytest.approx(means[3900], abs=0.6)


def test_interval_of_many_images_is_the_normal_one(tmp_path: Path):
    method, baseline = pair(tmp_path, 3000, seeds=(1,))
    found = paired_difference(method, baseline, "digits")
    hits = [
        np.array(predictions_of(m.runs["digits"][1]["path"])["heads"]["text"]["predicted"]) == 0
        for m in (method, baseline)
    ]
    difference = hits[0].astype(float) - hits[1]
    half = 196 * difference.std() / sqrt(3000)
    assert found is not None and found.low < found.points < found.high
    assert (found.low, found.high) == pytest.approx((found.points - half, found.points + half), abs=0.05 * half)


def test_difference_is_reproducible_and_turns_its_sign(tmp_path: Path):
    method, baseline = pair(tmp_path, 50)
    found, again = (paired_difference(method, baseline, "digits", resamples=200) for _ in range(2))
    turned = paired_difference(baseline, method, "digits", resamples=200)
    assert found == again != paired_difference(method, baseline, "digits", resamples=200, seed=1)
    assert found is not None and turned is not None
    assert turned.points == pytest.approx(-found.points)
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low))


def test_difference_that_every_image_shares_has_no_width(tmp_path: Path):
    write_run(tmp_path, [True] * 8)
    write_run(tmp_path, [False] * 8, trainer="CPL")
    found = paired_difference(method_of(tmp_path, "AiR"), method_of(tmp_path, "CPL"), "digits")
    assert found is not None and (found.points, found.low, found.high) == (100.0, 100.0, 100.0)


def test_a_single_image_has_a_difference_too(tmp_path: Path):
    write_run(tmp_path, [True])
    write_run(tmp_path, [False], trainer="CPL")
    found = paired_difference(method_of(tmp_path, "AiR"), method_of(tmp_path, "CPL"), "digits")
    assert found is not None and (found.points, found.images) == (100.0, 1)


def test_only_common_seeds_count(tmp_path: Path):
    write_run(tmp_path, [True, True], seed=1)
    write_run(tmp_path, [False, False], seed=2)
    write_run(tmp_path, [True, False], seed=1, trainer="CPL")
    write_run(tmp_path, [True, True], seed=3, trainer="CPL")
    found = paired_difference(method_of(tmp_path, "AiR"), method_of(tmp_path, "CPL"), "digits")
    assert found is not None and (found.points, found.seeds) == (50.0, [1])


def test_bootstrap_memory_is_bounded(tmp_path: Path):
    method, baseline = pair(tmp_path, 5000, seeds=(1,))
    paired_difference(method, baseline, "digits", resamples=10)  # imports scipy
    tracemalloc.start()
    try:
        paired_difference(method, baseline, "digits", resamples=4000)  # at once: 160 MB of indices, 160 MB of values
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 120e6


@pytest.mark.parametrize("kind", ["no predictions", "damaged", "other images", "other labels", "no common seed"])
def test_no_difference_has_a_reason(tmp_path: Path, kind: str):
    path = write_run(tmp_path, [True, False, True], seed=2 if kind == "no common seed" else 1)
    other = write_run(tmp_path, [True, True, False], trainer="CPL")
    said = predictions_of(path)
    if kind == "no predictions":
        os.remove(path.with_name("predictions.json"))
    elif kind == "damaged":
        write_predictions(path, "{")
    elif kind == "other images":
        write_predictions(path, {**said, "images": said["images"][::-1]})
    elif kind == "other labels":
        labels, predicted = [0, 1, 0], [0, 0, 0]
        write_predictions(path, {**said, "labels": labels,
                                 "heads": {"text": {"predicted": predicted, "confidence": [1, 1, 1]}}})  # fmt: skip
    method, baseline = method_of(tmp_path, "AiR"), method_of(tmp_path, "CPL")
    reasons: list[str] = []
    assert paired_difference(method, baseline, "digits", reasons=reasons) is None
    assert paired_difference(baseline, method, "digits") is None
    (reason,) = reasons
    assert reason.startswith("digits: no difference of AiR (mini) to CPL (mini): ") and "\n" not in reason
    said_of = {
        "no predictions": f"{path.parent} has no predictions.json", "damaged": str(path.with_name("predictions.json")),
        "other images": f"{path.parent} and {other.parent} were not tested on the same",
        "other labels": f"{path.parent} and {other.parent} were not tested on the same",
        "no common seed": "no seed in common",
    }  # fmt: skip
    assert said_of[kind] in reason
