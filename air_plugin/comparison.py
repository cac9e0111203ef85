"""Statistics of a table: accuracy over seeds, and differences between methods over test images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import sqrt
from statistics import mean, stdev

import numpy as np

from air_plugin.collection import Collection, Method
from air_plugin.errors import UserError
from air_plugin.results import Predictions, load_predictions

BOOTSTRAP_CELLS = 4_000_000  # resamples x images at once; about 64 MB


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
    """Test accuracy in percent, a seed each, of one head or, by default, of each run's headline head.

    Runs that have no such head, or no test labels, are left out.
    """
    runs = [run for _, run in sorted(method.runs.get(dataset, {}).items())]
    heads = [run["heads"].get(head or run["headline"]) for run in runs]
    return [found["accuracy"] for found in heads if found and found["accuracy"] is not None]


def is_unknown(method: Method, dataset: str, *, head: str | None = None) -> bool:
    """Whether there are runs with such a head (by default: the headline head), and none of them had test labels."""
    runs = method.runs.get(dataset, {}).values()
    heads = [run["heads"].get(head or run["headline"]) for run in runs]
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


def paired_difference(
    method: Method,
    baseline: Method,
    dataset: str,
    *,
    resamples: int = 10_000,
    seed: int = 0,
    reasons: list[str] | None = None,
) -> Difference | None:
    """Headline accuracy of a method less that of a baseline, image by image over their common seeds.

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
            (values,), np.mean, n_resamples=resamples, batch=max(1, BOOTSTRAP_CELLS // len(values)), vectorized=True,
            confidence_level=0.95, method="percentile", rng=np.random.default_rng(seed),
        ).confidence_interval  # fmt: skip
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
            total += sign * (said.predicted[run["headline"]] == said.labels)
    return total / len(seeds), seeds


@dataclass
class Comparison:
    """A collection, how to look at it, and what follows: computed once for every table and page.

    baseline: a method that the others are compared with, image by image.
    ci95: spreads are half of the 95 % interval over seeds, instead of the standard deviation.
    differences: (trainer, config, data set) -> difference to the baseline, where there is one.
    faults: why there is none elsewhere, a line each.
    """

    collection: Collection
    baseline: Method | None = None
    ci95: bool = False
    differences: dict[tuple[str, str, str], Difference] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for method in self.collection.methods:
            for dataset in self.collection.datasets:
                if self.baseline is None or method is self.baseline or dataset not in method.runs:
                    continue
                found = paired_difference(method, self.baseline, dataset, reasons=self.faults)
                if found:
                    self.differences[method.trainer, method.config, dataset] = found

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
