"""Statistics over seeds and test images, beside plain loops."""

from __future__ import annotations

import os
import random
import tracemalloc
from math import sqrt
from pathlib import Path

import numpy as np
import pytest
from made_up_results import auxiliary_rounds, stages
from result_files import predictions_of, result, write, write_predictions, write_run

from air_plugin.report.collection import Method, collect
from air_plugin.report.comparison import Comparison
from air_plugin.report.fusion import fusion_of
from air_plugin.report.stage_times import stage_seconds
from air_plugin.report.statistics import interval, paired_difference, scores, summary


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


def test_accuracies_of_a_head_or_the_primary_classifier(tmp_path: Path):
    for seed in (2, 1):
        write(tmp_path, result(seed=seed, accuracy=80.0 + seed, primary="fused"))
    write(tmp_path, result(seed=3, heads={"text": {"accuracy": 70.0}}))
    method = method_of(tmp_path, "AiR")
    assert scores(method, "digits") == [82.0, 83.0, 70.0]
    assert scores(method, "digits", head="text") == [81.0, 82.0, 70.0]
    assert scores(method, "digits", head="fused") == [82.0, 83.0]
    assert scores(method, "letters") == []


def test_difference_against_a_plain_bootstrap(tmp_path: Path):
    method, baseline = pair(tmp_path, 120)
    found = paired_difference(method, baseline, "digits", resamples=4000)
    assert found is not None and found.seeds == [1, 2, 3] and found.images == 120
    ours, theirs = (np.mean(scores(m, "digits")) for m in (method, baseline))
    assert found.points == pytest.approx(ours - theirs)

    def hit(method: Method, seed: int, image: int) -> bool:
        return predictions_of(method.runs["digits"][seed].path)["heads"]["text"]["predicted"][image] == 0

    differences = []
    for image in range(120):
        total = 0.0
        for seed in (1, 2, 3):
            total += hit(method, seed, image) - hit(baseline, seed, image)
        differences.append(total / 3)
    rng, means = random.Random(1), []
    for _ in range(4000):
        generated = 0.0
        for _ in range(120):
            generated += differences[rng.randrange(120)]
        means.append(100 * generated / 120)
    means.sort()
    # A percentile of 4000 resamples has a standard error of about 0.1 here, and values lie 100 / 360 apart.
    assert found.low == pytest.approx(means[100], abs=0.6) and found.high == pytest.approx(means[3900], abs=0.6)


def test_interval_of_many_images_is_the_normal_one(tmp_path: Path):
    method, baseline = pair(tmp_path, 3000, seeds=(1,))
    found = paired_difference(method, baseline, "digits")
    hits = [
        np.array(predictions_of(m.runs["digits"][1].path)["heads"]["text"]["predicted"]) == 0
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
    content = predictions_of(path)
    if kind == "no predictions":
        os.remove(path.with_name("predictions.json"))
    elif kind == "damaged":
        write_predictions(path, "{")
    elif kind == "other images":
        write_predictions(path, {**content, "images": content["images"][::-1]})
    elif kind == "other labels":
        labels, predicted = [0, 1, 0], [0, 0, 0]
        write_predictions(
            path, {**content, "labels": labels, "heads": {"text": {"predicted": predicted, "confidence": [1, 1, 1]}}}
        )
    method, baseline = method_of(tmp_path, "AiR"), method_of(tmp_path, "CPL")
    reasons: list[str] = []
    assert paired_difference(method, baseline, "digits", reasons=reasons) is None
    assert paired_difference(baseline, method, "digits") is None
    (reason,) = reasons
    assert reason.startswith("digits: no difference of AiR to CPL: ") and "\n" not in reason
    expected = {
        "no predictions": f"{path.parent} has no predictions.json",
        "damaged": str(path.with_name("predictions.json")),
        "other images": f"{path.parent} and {other.parent} were not tested on the same",
        "other labels": f"{path.parent} and {other.parent} were not tested on the same",
        "no common seed": "no seed in common",
    }
    assert expected[kind] in reason


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
    assert reason.startswith("digits: no difference of UPL to CPL: ")
    assert not Comparison(collection).differences and not Comparison(collection).faults


# Lambda


def settings(weight: object) -> dict[str, object]:
    return {"settings": {"AIR.LAMBDA": weight}}


def test_regret_against_a_plain_loop(tmp_path: Path):
    rng = random.Random(5)
    slow_oracle, slow_regret, slow_accuracy, slow_weights = [], [], [], []
    for seed in range(1, 6):
        chosen = rng.uniform(0.5, 4)
        curve = {weight: rng.uniform(60, 90) for weight in (0.0, 1.0, 2.0, 4.0, chosen)}
        heads = {"text": {"accuracy": curve[0.0]}, "fused": {"accuracy": curve[chosen]}}
        rounds = auxiliary_rounds(99.0, chosen, seed=seed)
        write(
            tmp_path,
            result(
                seed=seed,
                heads=heads,
                by_lambda=sorted(map(list, curve.items())),
                auxiliary=rounds,
                provenance=settings("auto"),
            ),
        )
        best = -1.0
        for weight in curve:
            if curve[weight] > best:
                best = curve[weight]
        slow_oracle.append(best)
        slow_regret.append(best - curve[chosen])
        slow_accuracy.append(curve[chosen])
        slow_weights.append(chosen)
    found = fusion_of(method_of(tmp_path, "AiR"), "digits")
    assert found is not None and not found.fixed
    assert found.oracle == pytest.approx(slow_oracle) and found.regret == pytest.approx(slow_regret)
    assert found.accuracy == pytest.approx(slow_accuracy) and found.weights == pytest.approx(slow_weights)
    assert len(set(slow_regret)) == 5 and max(slow_regret) > 1  # each seed has its own oracle
    assert found.rounds == [2.0] * 5 and found.labels == [89.0] * 5
    assert found.prior_strengths == [12.0, 13.0, 14.0, 15.0, 16.0]  # of the last round


def test_the_best_lambda_has_no_regret_whatever_its_rounding(tmp_path: Path):
    exact = 100.0 * 713 / 797  # by_lambda is made from float32
    for seed, error in enumerate((-2e-6, 0.0, 2e-6), start=1):
        heads = {"text": {"accuracy": 50.0}, "fused": {"accuracy": exact}}
        write(tmp_path, result(seed=seed, heads=heads, by_lambda=[[0.0, 50.0], [2.0, exact + error]]))
    found = fusion_of(method_of(tmp_path, "AiR"), "digits")
    assert found is not None and all(0 <= regret < 1e-5 for regret in found.regret) and len(found.regret) == 3


def test_lambda_of_the_config_is_fixed_and_that_of_older_results_is_read_there(tmp_path: Path):
    write(tmp_path, result(by_lambda=[[0, 70.0], [2, 83.0]], provenance=settings(2)))
    found = fusion_of(method_of(tmp_path, "AiR"), "digits")
    assert found is not None and found.fixed and found.weights == [2.0]
    assert (found.accuracy, found.oracle, found.regret) == ([81.0], [83.0], [2.0])
    assert found.rounds == found.prior_strengths == found.labels == []
    for seed, odd in enumerate((True, "2", float("nan"), -1, [2], None), start=2):
        write(tmp_path, result(seed=seed, by_lambda=[[0, 70.0]], provenance=settings(odd)))
    found = fusion_of(method_of(tmp_path, "AiR"), "digits")
    assert found is not None and not found.fixed and found.weights == [2.0] and len(found.regret) == 7


def test_a_method_without_the_auxiliary_classifier_has_no_lambda(tmp_path: Path):
    write(tmp_path, result("CPL", provenance=settings(2.0), by_lambda=None, auxiliary=[]))
    assert fusion_of(method_of(tmp_path, "CPL"), "digits") is None
    assert fusion_of(method_of(tmp_path, "CPL"), "letters") is None


def test_without_test_labels_there_is_a_lambda_but_no_regret(tmp_path: Path):
    heads = {"text": {"accuracy": None}, "fused": {"accuracy": None}}
    write(tmp_path, result(heads=heads, auxiliary=auxiliary_rounds(2.5, accuracy=None)))
    found = fusion_of(method_of(tmp_path, "AiR"), "digits")
    assert found is not None and found.weights == [2.5]
    assert found.accuracy == found.oracle == found.regret == found.labels == []


def test_another_fused_head_has_an_accuracy_but_no_regret(tmp_path: Path):
    write(tmp_path, result(auxiliary=auxiliary_rounds(2.5), by_lambda=None))  # TransCLIP makes its own
    found = fusion_of(method_of(tmp_path, "AiR"), "digits")
    assert found is not None and found.accuracy == [81.0] and found.oracle == found.regret == []


def test_em_without_synthetic_images_has_no_prior_strength(tmp_path: Path):
    rounds = [{**entry, "prior_strength": 0.0} for entry in auxiliary_rounds(2.5)]
    write(tmp_path, result(auxiliary=rounds))
    found = fusion_of(method_of(tmp_path, "AiR"), "digits")
    assert found is not None and found.prior_strengths == []


# Seconds


def test_seconds_of_stages_against_a_plain_loop(tmp_path: Path):
    rng = random.Random(6)
    names = ["backbone", "lora", "generation", "lora, round 2", "generation, round 2", "lora, round 3"]
    spent: dict[str, list[float]] = {name: [] for name in names}
    for seed in range(1, 6):
        entries: list[tuple[str, float | None]] = []
        for name in names if seed > 1 else names[:3]:  # the first seed needs one round only
            seconds = rng.uniform(1, 9) if rng.random() < 0.6 and name != "generation" else None
            entries.append((name, seconds))
            if seconds is not None:
                spent[name].append(seconds)
        if seed == 1:
            for name in names[3:]:
                spent[name].append(0.0)
        write(tmp_path, result(seed=seed, stages=stages(*entries)))
    slow = {}
    for name in names:
        total = 0.0
        for value in spent[name]:
            total += value
        slow[name] = pytest.approx(total / len(spent[name])) if spent[name] else None
    found = stage_seconds(method_of(tmp_path, "AiR"), "digits")
    assert list(found) == ["backbone", "lora", "generation"]
    assert found["backbone"] == [slow["backbone"]]
    assert found["lora"] == [slow["lora"], slow["lora, round 2"], slow["lora, round 3"]]
    assert found["generation"] == [None, slow["generation, round 2"]]
    assert any(len(values) < 5 for values in spent.values()) and len(spent["lora"]) > 1


def test_the_test_at_the_end_of_training_counts_once(tmp_path: Path):
    write(tmp_path, result("CPL", stages=stages(("features of test", 4.0), ("prompt training", 10.0))))
    assert stage_seconds(method_of(tmp_path, "CPL"), "digits") == {"features of test": [4.0], "prompt training": [6.0]}
    write(tmp_path, result("AiR", stages=stages(("prompt training", 10.0), ("features of test", 4.0))))
    assert stage_seconds(method_of(tmp_path, "AiR"), "digits")["prompt training"] == [10.0]  # it stands by itself


def test_two_stages_of_one_name_are_summed_less_what_was_in_the_store(tmp_path: Path):
    entries = [("features of train", None), ("features of train", 5.0), ("features of train", 2.0)]
    write(tmp_path, result(stages=stages(*entries)))
    assert stage_seconds(method_of(tmp_path, "AiR"), "digits") == {"features of train": [7.0]}


def test_a_name_that_is_no_round_of_ours_is_a_stage_of_its_own(tmp_path: Path):
    names = ["lora, round 1", "lora, round 1000", "lora, round two", ", round 2"]
    write(tmp_path, result(stages=stages(*((name, 1.0) for name in names))))
    assert stage_seconds(method_of(tmp_path, "AiR"), "digits") == {name: [1.0] for name in names}


def test_older_results_have_no_seconds(tmp_path: Path):
    write(tmp_path, result())
    assert stage_seconds(method_of(tmp_path, "AiR"), "digits") == {}
