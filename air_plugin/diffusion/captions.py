"""Captions for the LoRA: which images the adapter is trained on, and with which text (AiR, adaptation)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from air_plugin.config import LoraSettings
from air_plugin.functional.pseudo_labels import top_k_per_class
from air_plugin.utils.class_names import fill


def choose_captions(
    probs: Tensor, classnames: Sequence[str], template: str, settings: LoraSettings
) -> tuple[list[int], list[str]]:
    """Choose the unlabelled images that the adapter is trained on, and their captions.

    Args:
        probs: (N, C) zero-shot probabilities, rows sum to 1; no label is used.
        classnames: C names.
        template: with {} for the name.
        settings: `captions` is one of
            confident: the `per_class` most confident images of each predicted class (AiR);
            above_median: those of them whose confidence is at least the median of all images, and only of classes that
            have enough such images (ours);
            all: every image, with its pseudo-label;
            generic: every image, with one caption without a class.

    Returns:
        S image indices, ascending, and S captions.
    """
    if settings.captions in ("confident", "above_median"):
        chosen = top_k_per_class(probs, settings.per_class)
        if settings.captions == "above_median":
            chosen = chosen[_confident_and_common(probs)[chosen]]
        index = chosen.tolist()
    else:
        index = list(range(len(probs)))
    if settings.captions == "generic":
        return index, [settings.generic] * len(index)
    label = probs.argmax(dim=1).tolist()
    return index, [fill(template, classnames[label[i]]) for i in index]


def captions_of_labels(
    labels: Sequence[int], classnames: Sequence[str], template: str, settings: LoraSettings
) -> list[str]:
    """The captions of labelled images: the template with their class, or the generic caption where that is asked for.

    Args:
        labels: L true classes.
        classnames, template, settings: as in `choose_captions`.
    """
    generic = settings.captions == "generic"
    return [settings.generic if generic else fill(template, classnames[label]) for label in labels]


def _confident_and_common(probs: Tensor) -> Tensor:
    """(N,) bool from (N, C) probabilities: which captions do no harm where classes are absent or rare (ours).

    Images that are predicted as an absent class belong to other classes, and generated images of the absent class would
    look like them. Most of them have a low confidence, but not all. So an image needs at least the median confidence,
    and its predicted class at least N / 4C such images, half of an even share. Of a class without captions the
    generator makes images from the class name and the style of the other images.
    """
    confidence, label = probs.max(dim=1)
    confident = confidence >= confidence.median()
    counts = torch.bincount(label[confident], minlength=probs.shape[1])
    return confident & (4 * counts * probs.shape[1] >= len(probs))[label]
