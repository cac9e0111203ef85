"""A collection with everything that tables and pages compute from it, computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import mean

from air_plugin.report.collection import Collection, Method
from air_plugin.report.fusion import Fusion, fusion_of
from air_plugin.report.stage_times import stage_seconds
from air_plugin.report.statistics import Difference, interval, paired_difference, scores, summary


@dataclass
class Comparison:
    """A collection and its statistics, computed once for every table and page.

    baseline: a method that the others are compared with, image by image.
    ci95: spreads are half of the 95 % interval over seeds, instead of the standard deviation.
    differences: (trainer, config, data set) -> difference to the baseline, where there is one.
    fusions: the same keys -> the auxiliary classifier, where there is one. stages: the same keys -> seconds by stage.
    faults: a line for each difference that could not be computed.
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
                key = *method.cell, dataset
                self.stages[key] = stage_seconds(method, dataset)
                fusion = fusion_of(method, dataset)
                if fusion:
                    self.fusions[key] = fusion
                if self.baseline is None or method is self.baseline or dataset not in method.runs:
                    continue
                found = paired_difference(method, self.baseline, dataset, reasons=self.faults)
                if found:
                    self.differences[key] = found

    @property
    def has_groups(self) -> bool:
        """Whether there are accuracies of seen and unseen classes, whose harmonic mean H is compared."""
        return self.collection.paradigm == "trzsl"

    def spread(self, values: Sequence[float]) -> tuple[float, float | None]:
        """Mean and spread over seeds of one or more values; no spread for a single one."""
        average, deviation = summary(values)
        return average, interval(values) if self.ci95 else deviation

    def mean(self, method: Method) -> float | None:
        """Mean over data sets of the means over seeds of what is compared; None where the method lacks a data set."""
        values = [scores(method, dataset) for dataset in self.collection.datasets]
        return mean(mean(v) for v in values) if all(values) else None

    def difference(self, method: Method, dataset: str) -> Difference | None:
        return self.differences.get((*method.cell, dataset))

    def fusion(self, method: Method, dataset: str) -> Fusion | None:
        return self.fusions.get((*method.cell, dataset))

    def seconds(self, method: Method, dataset: str) -> dict[str, list[float | None]]:
        return self.stages[method.trainer, method.config, dataset]
