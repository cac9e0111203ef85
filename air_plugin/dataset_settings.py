"""The settings of data sets; see air_plugin/settings.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from air_plugin.utils.sections import LARGEST_SEED, Section, setting

Paradigm = Literal["ul", "ssl", "trzsl"]


@dataclass(frozen=True)
class DatasetSettings(Section):
    """What we add to Dassl's DATASET section."""

    SECTION = "DATASET"

    subsample_classes: str = setting(
        "all", "CoOp's: all, base (the first half of the classes) or new (the second half)"
    )
    split_family: str = setting("zhou", "zhou: CoOp's splits; elevater: the data set's own train and test lists")
    class_names: str = setting(
        "coop", "coop: CoOp's class names; grip: those of GRIP and CPL, where a data set has both", old=("WORDING",)
    )
    template: str = setting("a photo of a {}.", "prompt of the zero-shot classifier", template=True)
    paradigm: Paradigm = setting(
        "ul",
        "training labels. ul: none; ssl: of a few images a class; trzsl (transductive zero-shot): of the images of "
        "seen classes; the unlabelled images are of the others",
    )
    labels_per_class: int = setting(2, "in ssl: labelled images a class, always the same ones", low=1)
    split_seed: int = setting(
        500, "in trzsl: decides which classes are seen; GRIP's are 500, 0 and 200", low=0, high=LARGEST_SEED
    )
    seen_labelled: float = setting(
        1.0, "in trzsl: labelled share of each seen class's images; GRIP has 0.8. The rest is val", above=0, high=1
    )
    num_missing_classes: int = setting(
        0, "classes that the unlabelled images lack; for experiments", low=0, old=("MISSING",)
    )
    imbalance_ratio: float = setting(
        1.0,
        "every other class is this many times rarer among the unlabelled images; for experiments",
        low=1,
        old=("RARER",),
    )
    default_config: str = setting("", "CONFIG of the scripts where the command names none")
