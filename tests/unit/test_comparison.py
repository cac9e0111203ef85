"""Statistics over seeds and test images, beside plain loops."""

from __future__ import annotations

import os
import random
import tracemalloc
from math import sqrt
from pathlib import Path

import numpy as np
import pytest
from test_results import predictions_of, result, write, write_predictions, write_run

from air_plugin.collection import Method, collect
from air_plugin.comparison import Comparison, accuracies, interval, paired_difference, summary


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


# All of it, for tables and pages


def test_a_comparison_holds_every_difference_to_the_baseline_and_the_reasons_for_none(tmp_path: Path):
    for dataset in ("digits", "letters"):
        write_run(tmp_path, [True, False, True, True], dataset=dataset)
        write_run(tmp_path, [True, False, False, True], trainer="CPL", dataset=dataset)
    write(tmp_path, result("UPL"))
    collection = collect(tmp_path)
    upl, cpl, air = collection.methods
    found = Comparison(collection, cpl)
    assert found.differences.keys() == {("AiR", "mini", "digits"), ("AiR", "mini", "letters")}
    assert found.difference(air, "letters") == paired_difference(air, cpl, "letters")
    assert found.difference(cpl, "digits") is found.difference(upl, "digits") is None
    (reason,) = found.faults
    assert reason.startswith("digits: no difference of UPL (mini) to CPL (mini): ")
    assert not Comparison(collection).differences and not Comparison(collection).faults
