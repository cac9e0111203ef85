"""Statistics of a table: accuracy over seeds, and differences between methods over test images."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from air_plugin.report.collection import Collection, Method
from air_plugin.report.results import Predictions, is_number, load_predictions, settings_of
from air_plugin.utils.errors import UserError

BOOTSTRAP_CELLS = 4_000_000  # resamples x images at once; about 64 MB
TRAINING, TESTS = "prompt training", ("features of test", "features of val")
# Stages in a table's order; others, which a trainer of somebody else's may have, follow them.
STAGES = (
    "backbone",
    "features of train",
    "generator",
    "lora",
    "generation",
    "prototypes",
    "refinement",
    TRAINING,
    *TESTS,
)


@dataclass(frozen=True)
class Difference:
    """How much more a method gets right than a baseline.

    points: difference of the two accuracies, in percentage points. low, high: its 95 % interval. seeds: the common
    ones. images: number of test images.
    """

    points: float
    low: float
    high: float
    seeds: list[int]
    images: int


def accuracies(method: Method, dataset: str, *, head: str | None = None) -> list[float]:
    """Test accuracy in percent, a seed each, of one head or, by default, of each run's primary classifier.

    Runs that have no such head, or no test labels, are left out.
    """
    runs = [run for _, run in sorted(method.runs.get(dataset, {}).items())]
    heads = [run["heads"].get(head or run["primary"]) for run in runs]
    return [found["accuracy"] for found in heads if found and found["accuracy"] is not None]


def is_unknown(method: Method, dataset: str, *, head: str | None = None) -> bool:
    """Whether there are runs with such a head (default: the primary classifier), and none of them had test labels."""
    runs = method.runs.get(dataset, {}).values()
    heads = [run["heads"].get(head or run["primary"]) for run in runs]
    return any(heads) and all(found["accuracy"] is None for found in heads if found)


def summary(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean of one or more values, and their standard deviation (n - 1 below); None for a single value."""
    return mean(values), stdev(values) if len(values) > 1 else None


def interval(values: Sequence[float]) -> float | None:
    """Half the width of the 95 % interval of the mean (Student's t); None for a single value."""
    from scipy.stats import t

    if len(values) < 2:
        return None
    return float(t.ppf(0.975, len(values) - 1)) * stdev(values) / sqrt(len(values))


@dataclass(frozen=True)
class Fusion:
    """The weight of the auxiliary classifier in a method's runs, and what it came to; values over seeds.

    Every list is shorter, or empty, where runs do not hold the figure.

    weights: lambda of the last round.
    fixed: whether the config names lambda; else it was chosen without labels.
    accuracy: of the fused head in percent. oracle: the same with the best lambda that was tried, each seed its own.
    regret: oracle less accuracy, at least 0. The last two need test labels, which the method never saw.
    betas: weight of the loss on generated images. beta_fixed: whether the config names it.
    prior_strengths: n0 of EM, where images were generated.
    rounds: how many rounds of captions and drawing were made.
    labels: percent of the unlabelled images that the last round labels rightly.
    """

    weights: list[float]
    fixed: bool
    accuracy: list[float]
    oracle: list[float]
    regret: list[float]
    betas: list[float]
    beta_fixed: bool
    prior_strengths: list[float]
    rounds: list[float]
    labels: list[float]


def fusion_of(method: Method, dataset: str) -> Fusion | None:
    """What lambda came to on a data set; None where no run tells."""
    every = [run for _, run in sorted(method.runs.get(dataset, {}).items())]
    runs = [run for run in every if run.get("auxiliary") or run.get("by_lambda")]
    if not runs:
        return None
    fixed = _named(runs, "AIR.LAMBDA")
    last = [run["auxiliary"][-1] for run in runs if run.get("auxiliary")]
    tried = [
        (run["heads"]["fused"]["accuracy"], [accuracy for _, accuracy in run["by_lambda"]])
        for run in runs
        if run.get("by_lambda") and run["heads"].get("fused", {}).get("accuracy") is not None
    ]
    # The lambda that was used is among those tried; by_lambda is float32, and must not fall below it by a rounding.
    oracle = [max(own, *others) for own, others in tried]
    return Fusion(
        weights=[figures["lambda"] for figures in last] or fixed,
        fixed=len(fixed) == len(runs),
        accuracy=[own for own, _ in tried] or accuracies(method, dataset, head="fused"),
        oracle=oracle,
        regret=[best - own for best, (own, _) in zip(oracle, tried, strict=True)],
        betas=[run["beta"] for run in runs if run.get("beta") is not None],
        beta_fixed=len(_named(runs, "AIR.BETA")) == len(runs),
        prior_strengths=[
            figures["prior_strength"] for figures in last if figures.get("prior_strength")
        ],  # 0: no image was generated
        rounds=[float(len(run["auxiliary"])) for run in runs if run.get("auxiliary")],
        labels=[figures["accuracy"] for figures in last if figures.get("accuracy") is not None],
    )


def _named(runs: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """The values of a setting in those runs whose config gives it as a number."""
    values: list[Any] = [settings_of(run).get(key) for run in runs]
    return [float(value) for value in values if is_number(value)]


def stage_seconds(method: Method, dataset: str) -> dict[str, list[float | None]]:
    """Stage -> seconds of its first round, its second, ...; means over seeds.

    What a seed took from the store does not count; None where every seed did. A seed that needed no such round has
    0 seconds of it.
    """
    runs = [_own_seconds(run) for run in method.runs.get(dataset, {}).values()]
    found: dict[str, list[float | None]] = {}
    for name in dict.fromkeys(name for run in runs for name, _ in run):
        rounds = max(number for run in runs for other, number in run if other == name)
        first = [run[name, 1] for run in runs if (name, 1) in run]
        later = [[run.get((name, number), 0.0) for run in runs] for number in range(2, rounds + 1)]
        found[name] = [_mean_known(values) for values in [first, *later]]
    return found


def _own_seconds(run: Mapping[str, Any]) -> dict[tuple[str, int], float | None]:
    """(stage, number of its round) -> seconds; None where all of it came from the store."""
    parts: dict[tuple[str, int], list[float]] = defaultdict(list)
    tested = 0.0
    for stage in run.get("stages") or []:
        later = re.fullmatch(r"(.+), round ([2-9]|[1-9][0-9])", stage["name"])
        name, number = (later[1], int(later[2])) if later else (stage["name"], 1)
        seconds = stage["seconds"]
        if name in TESTS:
            tested += seconds
        if name == TRAINING:  # Dassl tests at the end of training: that stage lies within this one
            seconds = max(0.0, seconds - tested)
        parts[name, number] += [] if stage["cached"] else [seconds]
    return {key: sum(values) if values else None for key, values in parts.items()}


def _mean_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known else None


def paired_difference(
    method: Method,
    baseline: Method,
    dataset: str,
    *,
    resamples: int = 10_000,
    seed: int = 0,
    reasons: list[str] | None = None,
) -> Difference | None:
    """Primary accuracy of a method less that of a baseline, image by image over their common seeds.

    The interval is the 95 % percentile interval of a bootstrap over test images (Efron and Tibshirani 1993): images
    are resampled, seeds are not. The same call gives the same interval.

    Args:
        method, baseline: what is compared.
        dataset: on which data set.
        resamples: number of bootstrap samples.
        seed: of the resampling.
        reasons: where there is no difference, a line that says why is added here.

    Returns:
        None where no seed is common, predictions are missing or damaged, or the images or labels differ.
    """
    from scipy.stats import bootstrap

    if is_unknown(method, dataset) or is_unknown(baseline, dataset):
        return None  # the report says so of the whole data set
    try:
        values, seeds = image_differences(method, baseline, dataset)
    except UserError as error:
        if reasons is not None:
            reasons.append(f"{dataset}: no difference of {method.title} to {baseline.title}: {error}")
        return None
    low = high = points = float(values.mean())
    if len(values) > 1:
        low, high = bootstrap(
            (values,),
            np.mean,
            n_resamples=resamples,
            batch=max(1, BOOTSTRAP_CELLS // len(values)),
            vectorized=True,
            confidence_level=0.95,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).confidence_interval
    return Difference(100.0 * points, 100.0 * float(low), 100.0 * float(high), seeds, len(values))


def image_differences(method: Method, baseline: Method, dataset: str) -> tuple[np.ndarray, list[int]]:
    """(N,) per test image: the share of common seeds on which the method is right, less that of the baseline.

    Values lie in [-1, 1]; the common seeds come second.

    Raises:
        UserError: no seed is common, predictions are missing or damaged, or the images or labels differ.
    """
    seeds = sorted(method.runs.get(dataset, {}).keys() & baseline.runs.get(dataset, {}).keys())
    if not seeds:
        raise UserError("they have no seed in common")
    first: Predictions | None = None
    origin = Path()
    total = np.zeros(0)
    for seed in seeds:
        for run, sign in ((method.runs[dataset][seed], 1.0), (baseline.runs[dataset][seed], -1.0)):
            said = load_predictions(run)
            if said is None:
                raise UserError(f"{run['path'].parent} has no predictions.json")
            if not said.labelled:
                raise UserError("there are no test labels")
            if first is None:
                first, origin, total = said, run["path"].parent, np.zeros(len(said.labels))
            if said.images != first.images or not np.array_equal(said.labels, first.labels):
                raise UserError(f"{origin} and {run['path'].parent} were not tested on the same images and labels")
            total += sign * (said.predicted[run["primary"]] == said.labels)
    return total / len(seeds), seeds


@dataclass
class Comparison:
    """A collection, how to look at it, and what follows: computed once for every table and page.

    baseline: a method that the others are compared with, image by image.
    ci95: spreads are half of the 95 % interval over seeds, instead of the standard deviation.
    differences: (trainer, config, data set) -> difference to the baseline, where there is one.
    fusions: the same -> lambda and what it came to, where there is one. stages: the same -> seconds by stage.
    faults: why there is none elsewhere, a line each.
    """

    collection: Collection
    baseline: Method | None = None
    ci95: bool = False
    differences: dict[tuple[str, str, str], Difference] = field(default_factory=dict)
    fusions: dict[tuple[str, str, str], Fusion] = field(default_factory=dict)
    stages: dict[tuple[str, str, str], dict[str, list[float | None]]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for method in self.collection.methods:
            for dataset in self.collection.datasets:
                key = method.trainer, method.config, dataset
                self.stages[key] = stage_seconds(method, dataset)
                fusion = fusion_of(method, dataset)
                if fusion:
                    self.fusions[key] = fusion
                if self.baseline is None or method is self.baseline or dataset not in method.runs:
                    continue
                found = paired_difference(method, self.baseline, dataset, reasons=self.faults)
                if found:
                    self.differences[key] = found

    def spread(self, values: Sequence[float]) -> tuple[float, float | None]:
        """Mean and spread over seeds of one or more values; no spread for a single one."""
        average, deviation = summary(values)
        return average, interval(values) if self.ci95 else deviation

    def mean(self, method: Method) -> float | None:
        """Mean over data sets of the means over seeds; None where the method lacks a data set."""
        values = [accuracies(method, dataset) for dataset in self.collection.datasets]
        return mean(mean(v) for v in values) if all(values) else None

    def difference(self, method: Method, dataset: str) -> Difference | None:
        return self.differences.get((method.trainer, method.config, dataset))

    def fusion(self, method: Method, dataset: str) -> Fusion | None:
        return self.fusions.get((method.trainer, method.config, dataset))

    def seconds(self, method: Method, dataset: str) -> dict[str, list[float | None]]:
        return self.stages[method.trainer, method.config, dataset]
