"""Statistics of a table: scores over seeds, and differences between methods over test images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Literal

import numpy as np

from air_plugin.functional.metrics import harmonic_mean
from air_plugin.report.collection import Method
from air_plugin.report.predictions import load_predictions
from air_plugin.report.record import RunResult
from air_plugin.utils.errors import UserError

BOOTSTRAP_CELLS = 4_000_000  # resamples x images at once; about 64 MB


@dataclass(frozen=True)
class Difference:
    """How much better a method is than a baseline.

    points: difference of the two scores (accuracy, in trzsl the harmonic mean), in percentage points. low, high: its
        95 % interval. seeds: the common ones. images: number of test images.
    """

    points: float
    low: float
    high: float
    seeds: list[int]
    images: int


def scores(method: Method, dataset: str, *, head: str | None = None) -> list[float]:
    """What is compared, in percent, of each seed: test accuracy, in trzsl the harmonic mean.

    Of one head or, by default, of each run's primary classifier. Runs without it, or without test labels, are left out.
    """
    found = [run.score(head) for run in method.on(dataset)]
    return [value for value in found if value is not None]


def group_accuracies(method: Method, dataset: str, group: Literal["seen", "unseen"]) -> list[float]:
    """Accuracy of the primary classifier in trzsl on the test images of seen or of unseen classes, of each seed."""
    found = [getattr(run.heads[run.primary], group) for run in method.on(dataset)]
    return [value for value in found if value is not None]


def is_unknown(method: Method, dataset: str, *, head: str | None = None) -> bool:
    """Whether there are runs with such a head (default: the primary classifier), and none of them had test labels."""
    found = [run.heads.get(head or run.primary) for run in method.on(dataset)]
    return any(found) and not scores(method, dataset, head=head)


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
    """Score of a method less that of a baseline, image by image over their common seeds.

    The score is the accuracy of the primary classifier, in trzsl the harmonic mean. The interval is the 95 % percentile
    interval of a bootstrap over test images (Efron and Tibshirani 1993): images are resampled, seeds are not. The same
    call gives the same interval.

    Args:
        method, baseline: what is compared.
        dataset: on which data set.
        resamples: number of bootstrap samples.
        seed: of the resampling.
        reasons: where there is no difference, a line with the reason is added here.

    Returns:
        None where no seed is common, predictions are missing or damaged, or the images or labels differ.
    """
    if is_unknown(method, dataset) or is_unknown(baseline, dataset):
        return None  # the report says so of the whole data set
    try:
        found = compare(method, baseline, dataset)
    except UserError as error:
        if reasons is not None:
            reasons.append(f"{dataset}: no difference of {method.title} to {baseline.title}: {error}")
        return None
    interval_of = _accuracy_interval if found.is_seen is None else _harmonic_interval
    points, low, high = interval_of(found, resamples, np.random.default_rng(seed))
    return Difference(100.0 * points, 100.0 * low, 100.0 * high, found.seeds, found.hits.shape[2])


@dataclass(frozen=True, eq=False)
class Compared:
    """Two methods on the same N test images and S common seeds.

    hits: (2, S, N) bool, whether the method, and the baseline, is right. is_seen: (N,) bool, whether the true class is
    a seen one; None without trzsl.
    """

    hits: np.ndarray
    seeds: list[int]
    is_seen: np.ndarray | None


def _accuracy_interval(found: Compared, resamples: int, rng: np.random.Generator) -> tuple[float, float, float]:
    """Difference of the accuracies, and its interval."""
    from scipy.stats import bootstrap

    values = image_differences(found)
    points = float(values.mean())
    if len(values) == 1:
        return points, points, points
    low, high = bootstrap(
        (values,),
        np.mean,
        n_resamples=resamples,
        batch=max(1, BOOTSTRAP_CELLS // len(values)),
        vectorized=True,
        confidence_level=0.95,
        method="percentile",
        rng=rng,
    ).confidence_interval
    return points, float(low), float(high)


def image_differences(found: Compared) -> np.ndarray:
    """(N,) per test image: the share of seeds on which the method is right, less that of the baseline; in [-1, 1]."""
    ours, theirs = found.hits.astype(float).sum(axis=1)
    return (ours - theirs) / len(found.seeds)


def _harmonic_interval(found: Compared, resamples: int, rng: np.random.Generator) -> tuple[float, float, float]:
    """Difference of the harmonic means, and its interval. Resamples that lack a group have no harmonic mean."""
    # Images on which all runs are right or wrong alike are the same to H: a resample is how many it has of each kind.
    rows = np.vstack([found.hits.reshape(-1, found.hits.shape[2]), np.asarray(found.is_seen)])
    kinds, counts = np.unique(rows, axis=1, return_counts=True)
    points = float(_harmonic_difference(kinds, counts[None])[0])
    size = max(1, BOOTSTRAP_CELLS // len(counts))
    batches = [min(size, resamples - begin) for begin in range(0, resamples, size)]
    shares, total = counts / counts.sum(), int(counts.sum())
    samples = (rng.multinomial(total, shares, size=number) for number in batches)
    values = np.concatenate([_harmonic_difference(kinds, sample) for sample in samples])
    values = values[~np.isnan(values)]
    low, high = np.percentile(values, (2.5, 97.5)) if len(values) else (points, points)
    return points, float(low), float(high)


def _harmonic_difference(kinds: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(R,) mean over seeds of H of the method, less that of the baseline.

    Args:
        kinds: (2 S + 1, P) bool: right or wrong of the method's seeds, then the baseline's; the last row is the group.
        counts: (R, P) how many images of each kind.
    """
    hits, is_seen = kinds[:-1].astype(float), kinds[-1]
    groups = []
    for group in (is_seen, ~is_seen):
        total = counts[:, group].sum(axis=1, keepdims=True)
        groups.append(counts[:, group] @ hits[:, group].T / np.where(total == 0, np.nan, total))  # (R, 2 S)
    ours, theirs = np.split(harmonic_mean(*groups), 2, axis=1)
    return ours.mean(axis=1) - theirs.mean(axis=1)


def compare(method: Method, baseline: Method, dataset: str) -> Compared:
    """What two methods predicted with their common seeds.

    Raises:
        UserError: no seed is common, predictions are missing or damaged, or images, labels or seen classes differ.
    """
    seeds = sorted(method.runs.get(dataset, {}).keys() & baseline.runs.get(dataset, {}).keys())
    if not seeds:
        raise UserError("they have no seed in common")
    tested = [[_tested(runs.runs[dataset][seed]) for seed in seeds] for runs in (method, baseline)]
    first = tested[0][0]
    for one in (one for pair in zip(*tested, strict=True) for one in pair):
        if one.images != first.images or not np.array_equal(one.labels, first.labels):
            raise UserError(f"{first.folder} and {one.folder} were not tested on the same images and labels")
        if one.seen != first.seen:
            raise UserError(f"{first.folder} and {one.folder} do not have the same seen classes")
    hits = np.array([[one.predicted == one.labels for one in side] for side in tested])
    return Compared(hits, seeds, None if first.seen is None else np.isin(first.labels, sorted(first.seen)))


@dataclass(frozen=True, eq=False)
class _Tested:
    """The predictions of a run's primary classifier: N images, (N,) labels and predicted classes, the seen classes."""

    folder: Path
    images: tuple[str, ...]
    labels: np.ndarray
    predicted: np.ndarray
    seen: frozenset[int] | None


def _tested(run: RunResult) -> _Tested:
    made = load_predictions(run)
    if made is None:
        raise UserError(f"{run.folder} has no predictions.json")
    if made.labels is None:
        raise UserError("there are no test labels")
    seen = None if made.seen is None else frozenset(made.seen.tolist())
    return _Tested(run.folder, made.images, made.labels, made.heads[run.primary].predicted, seen)
