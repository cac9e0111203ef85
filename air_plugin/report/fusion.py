"""The weight of the auxiliary classifier over seeds: lambda, the best lambda afterwards, and the rounds before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from air_plugin.report.collection import Method
from air_plugin.report.record import RunResult
from air_plugin.report.statistics import scores


@dataclass(frozen=True)
class Fusion:
    """The auxiliary classifier in a method's runs on one data set; every list holds values over seeds.

    A list is shorter, or empty, where runs do not have the number.

    weights: lambda of the last round. fixed: the config sets lambda; otherwise it was chosen without labels.
    accuracy: score of the fused head in percent, in trzsl the harmonic mean. oracle: the same with the best lambda that
        was tried, each seed its own.
    regret: oracle less accuracy, at least 0. Oracle and regret need test labels, which the method never saw.
    betas: weight of the loss on synthetic images. beta_fixed: the config sets it.
    prior_strengths: of EM, where there are synthetic images.
    rounds: number of rounds of captions, LoRA and synthetic images.
    labels: percent of the unlabelled images that the last round labels correctly.
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
    """The auxiliary classifier of a method on a data set; None where no run has one."""
    runs = [run for run in method.on(dataset) if run.auxiliary or run.by_lambda]
    if not runs:
        return None
    fixed = _fixed(runs, "AIR.LAMBDA")
    last = [run.auxiliary[-1] for run in runs if run.auxiliary]
    accuracy, oracle = [], []
    for run in runs:
        fused = run.score("fused")
        if run.by_lambda and fused is not None:
            accuracy.append(fused)
            # The lambda of the run is among those tried; by_lambda is float32 and must not fall below it by a rounding.
            oracle.append(max(fused, *(value for _, value in run.by_lambda)))
    return Fusion(
        weights=[entry.lambda_ for entry in last] or fixed,
        fixed=len(fixed) == len(runs),
        accuracy=accuracy or scores(method, dataset, head="fused"),
        oracle=oracle,
        regret=[best - value for best, value in zip(oracle, accuracy, strict=True)],
        betas=[run.beta for run in runs if run.beta is not None],
        beta_fixed=len(_fixed(runs, "AIR.BETA")) == len(runs),
        prior_strengths=[entry.prior_strength for entry in last if entry.prior_strength],  # 0: no synthetic images
        rounds=[float(len(run.auxiliary)) for run in runs if run.auxiliary],
        labels=[entry.accuracy for entry in last if entry.accuracy is not None],
    )


def _fixed(runs: Sequence[RunResult], key: str) -> list[float]:
    """The values of a setting in those runs whose config gives it as a number."""
    values = [run.number_setting(key) for run in runs]
    return [value for value in values if value is not None]
