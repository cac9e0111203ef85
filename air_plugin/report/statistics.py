"""Statistics of a table: accuracy over seeds, and differences between methods over test images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import mean, stdev

import numpy as np

from air_plugin.report.collection import Method
from air_plugin.report.predictions import load_predictions
from air_plugin.utils.errors import UserError

BOOTSTRAP_CELLS = 4_000_000  # resamples x images at once; about 64 MB


@dataclass(frozen=True)
class Difference:
    """How much more accurate a method is than a baseline.

    points: difference of the two accuracies, in percentage points. low, high: its 95 % interval. seeds: the common
    ones. images: number of test images.
    """

    points: float
    low: float
    high: float
    seeds: list[int]
    images: int


def accuracies(method: Method, dataset: str, *, head: str | None = None) -> list[float]:
    """Test accuracy in percent of each seed, of one head or, by default, of each run's primary classifier.

    Runs that have no such head, or no test labels, are left out.
    """
    found = [run.heads.get(head or run.primary) for run in method.on(dataset)]
    return [metrics.accuracy for metrics in found if metrics and metrics.accuracy is not None]


def is_unknown(method: Method, dataset: str, *, head: str | None = None) -> bool:
    """Whether there are runs with such a head (default: the primary classifier), and none of them had test labels."""
    found = [run.heads.get(head or run.primary) for run in method.on(dataset)]
    return any(found) and not accuracies(method, dataset, head=head)


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
    """Primary accuracy of a method less that of a baseline, image by image over their common seeds.

    The interval is the 95 % percentile interval of a bootstrap over test images (Efron and Tibshirani 1993): images
    are resampled, seeds are not. The same call gives the same interval.

    Args:
        method, baseline: what is compared.
        dataset: on which data set.
        resamples: number of bootstrap samples.
        seed: of the resampling.
        reasons: where there is no difference, a line with the reason is added here.

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
    """(N,) per test image: the share of common seeds on which the method is correct, less that of the baseline.

    Values lie in [-1, 1]; the common seeds come second.

    Raises:
        UserError: no seed is common, predictions are missing or damaged, or the images or labels differ.
    """
    seeds = sorted(method.runs.get(dataset, {}).keys() & baseline.runs.get(dataset, {}).keys())
    if not seeds:
        raise UserError("they have no seed in common")
    total, images, labels, origin = np.zeros(1), None, None, None
    for seed in seeds:
        for run, sign in ((method.runs[dataset][seed], 1.0), (baseline.runs[dataset][seed], -1.0)):
            found = load_predictions(run)
            if found is None:
                raise UserError(f"{run.folder} has no predictions.json")
            if found.labels is None:
                raise UserError("there are no test labels")
            if labels is None:
                images, labels, origin = found.images, found.labels, run.folder
            if found.images != images or not np.array_equal(found.labels, labels):
                raise UserError(f"{origin} and {run.folder} were not tested on the same images and labels")
            total = total + sign * (found.heads[run.primary].predicted == labels)
    return total / len(seeds), seeds
