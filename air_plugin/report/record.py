"""result.json: everything that a finished run reports about itself, as one dataclass."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from air_plugin.dataset_settings import Paradigm
from air_plugin.report.old_format import upgrade_result
from air_plugin.report.schema import OPTIONAL, Count, Invalid, Line, Number, Percent, load, plain, read
from air_plugin.utils.errors import UserError
from air_plugin.utils.files import to_json, write_atomically

USUAL_CLASS_NAMES = "coop"
USUAL_PARADIGM: Paradigm = "ul"  # also of results from before there were others


@dataclass(frozen=True)
class HeadMetrics:
    """Test metrics of one head in percent; None where there are no test labels. per_class: class name -> accuracy.

    seen, unseen: accuracy on the test images of seen and of unseen classes. harmonic: 2 s u / (s + u) of these two.
        All three belong to the paradigm trzsl and are in no other file.
    """

    accuracy: Percent | None
    macro_f1: Percent | None = None
    per_class: dict[str, Percent] = field(default_factory=dict)
    seen: Percent | None = field(default=None, metadata=OPTIONAL)
    unseen: Percent | None = field(default=None, metadata=OPTIONAL)
    harmonic: Percent | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True)
class PseudoLabelMetrics:
    """Pseudo-labels of one round, measured after training; see `air_plugin.functional.metrics.pseudo_label_metrics`.

    selected: number of images. coverage: the same in percent of all images. accuracy: percent of the selected images
    whose top-1 candidate is the true class. candidates: mean number an image. candidate_recall: percent of the
    selected images whose true class is a candidate.
    """

    accuracy: Percent | None
    selected: Count = 0
    coverage: Percent | None = None
    candidates: Number | None = None
    candidate_recall: Percent | None = None


@dataclass(frozen=True)
class AuxiliaryRound:
    """One round of captions, LoRA and synthetic images.

    lambda_: weight of the auxiliary classifier. changed: percent of the labels that differ from the round's captions.
    accuracy: percent of the unlabelled images that the round labels correctly, measured after training. scale: inverse
    temperature. prior_strength, iterations, converged, soft_counts (C,): of EM, where it ran.
    """

    lambda_: Number
    changed: Percent | None = None
    accuracy: Percent | None = None
    scale: Number | None = None
    prior_strength: Number | None = None
    iterations: Count | None = None
    converged: bool | None = None
    soft_counts: tuple[Number, ...] | None = None


@dataclass(frozen=True)
class StageTime:
    """Seconds of one stage; `cached` where its output came from the store."""

    name: Line
    seconds: Number
    cached: bool


@dataclass(frozen=True)
class Provenance:
    """Where a result came from; see `air_plugin.utils.provenance.collect`.

    settings: full key -> value. inputs: kind (images, lists, class_names, backbone, generator, ...) -> digest of
    what the run had; empty in results from before these were recorded.
    """

    commit: str | None = None
    dirty: bool | None = None
    command: tuple[str, ...] = ()
    python: str = ""
    platform: str = ""
    packages: dict[str, str | None] = field(default_factory=dict)
    dassl: dict[str, str] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """A finished run (result.json, format 1).

    trainer, config, dataset, seed: which run; also the names of its folders.
    backbone, split_family, template, class_names, paradigm: results that differ in these do not stand in one table.
        class_names is the source of the class names (coop or grip), paradigm tells which labels training had.
    heads: name -> test metrics. primary: name of the head that the config chose beforehand.
    pseudo_labels: of the last round. rounds: of every round.
    by_lambda: (lambda, percent) of the fused head, measured after training from test labels.
    auxiliary: rounds of the auxiliary classifier. beta: weight of the loss on synthetic images.
    stages: seconds by stage, in order. provenance: commit, versions and settings.
    other_metrics: what a trainer of your own adds in `metrics()`.
    path: the file that this was read from; not in the file.
    """

    format: Literal[1] = 1
    trainer: Line
    dataset: Line
    config: Line
    backbone: Line
    split_family: Line
    template: Line
    class_names: Line = USUAL_CLASS_NAMES
    paradigm: Paradigm = USUAL_PARADIGM
    seed: int
    heads: dict[Line, HeadMetrics]
    primary: Line
    pseudo_labels: PseudoLabelMetrics
    rounds: tuple[PseudoLabelMetrics, ...] = ()
    by_lambda: tuple[tuple[Number, Percent], ...] = ()
    auxiliary: tuple[AuxiliaryRound, ...] = ()
    beta: Number | None = None
    stages: tuple[StageTime, ...] = ()
    other_metrics: dict[str, Any] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=Provenance)
    path: Path = field(default=Path("result.json"), compare=False, metadata={"stored": False})

    def __post_init__(self) -> None:
        if self.primary not in self.heads:
            raise Invalid(f"its primary classifier is {self.primary}, and it has no such head")

    @classmethod
    def from_plain(cls, data: dict[str, Any]) -> RunResult:
        """A result from nested dicts and lists, as they stand in the file.

        Raises:
            UserError: a value is missing, has another type or is out of its range.
        """
        try:
            return read(cls, data)
        except Invalid as error:
            raise UserError(f"the result of the run is not valid: {error}") from error

    @classmethod
    def load(cls, path: Path) -> RunResult:
        """Read a result.json, also one from before the files had a format.

        Raises:
            FileNotFoundError: there is no such file.
            UserError: the file is damaged; the message names the value that is wrong.
        """
        result = load(cls, path, upgrade=upgrade_result)
        object.__setattr__(result, "path", path)
        return result

    def save(self, path: Path) -> None:
        """Write the file whole or not at all, and wait until the disk has it: result.json marks a run as complete."""
        write_atomically(path, to_json(plain(self), indent=1).encode(), durable=True)

    @property
    def folder(self) -> Path:
        return self.path.parent

    @property
    def row(self) -> tuple[str, str]:
        """Trainer and config: the row of a table that the run belongs to."""
        return self.trainer, self.config

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting by its full key; empty where the file does not hold them."""
        return self.provenance.settings

    def score(self, head: str | None = None) -> float | None:
        """What runs are compared by, in percent: accuracy, in trzsl the harmonic mean; None where it is unknown.

        Args:
            head: its name; None is the primary classifier. A head that the run does not have has no score.
        """
        metrics = self.heads.get(head or self.primary)
        if metrics is None:
            return None
        return metrics.harmonic if self.paradigm == "trzsl" else metrics.accuracy

    def number_setting(self, key: str) -> float | None:
        """A setting of 0 or more; None where the file does not hold it, or it is not such a number ("auto")."""
        try:
            return read(Number, self.settings.get(key))
        except Invalid:
            return None
