"""The settings of rivals that classify images together; see air_plugin/settings.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from air_plugin.utils.sections import Section, setting

Transduction = Literal["none", "transclip", "stata", "zlap"]
FittedOn = Literal["test", "unlabelled"]
Anchors = Literal["text", "images"]
AnchorWeight = Literal["fixed", "data"]


@dataclass(frozen=True)
class TransductionSettings(Section):
    """Rivals over the predictions of every head."""

    SECTION = "TRAINER.TRANSDUCTION"

    method: Transduction = setting("none", "transclip, stata or zlap, over the predictions of every classifier")
    on: FittedOn = setting(
        "test",
        "images that are classified together: test (transductive), or unlabelled, and then the test images one by one",
    )
    classes_per_batch: int = setting(
        0,
        "ON test, for experiments: test images come in batches of so many classes, and each batch is classified by "
        "itself; 0: all together",
        low=0,
    )
    batch_size: int = setting(64, "images of such a batch", low=1)
    anchors: Anchors = setting(
        "text",
        "of stata and zlap: the text features; images: the class means of generated images, with zlap beside the text",
    )
    anchor_weight: AnchorWeight = setting("fixed", "of stata: fixed: 1 image; data: estimated from the predictions")

    @property
    def needs_images(self) -> bool:
        """Whether generated images are the anchors."""
        return self.method != "none" and self.anchors == "images"

    @property
    def needs_test_labels(self) -> bool:
        """Whether batches are made by the labels of test images."""
        return self.method != "none" and self.on == "test" and self.classes_per_batch > 0
