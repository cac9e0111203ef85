"""Rivals that classify images together, over the predictions of any head (TRAINER.TRANSDUCTION)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from air_plugin.functional.similarity import as_images
from air_plugin.functional.stata import stata
from air_plugin.functional.transclip import Mixture, transclip
from air_plugin.functional.zlap import propagate
from air_plugin.transduction_settings import TransductionSettings
from air_plugin.utils.errors import UserError
from air_plugin.utils.seeding import stable_seed

if TYPE_CHECKING:
    from trainers.prompt_trainer import PromptTrainer


def refined_heads(
    trainer: PromptTrainer, features: Tensor, heads: dict[str, Tensor], labels: Tensor | None
) -> dict[str, Tensor]:
    """The predictions of every head after TRAINER.TRANSDUCTION.METHOD; as they are where it is none.

    TransCLIP and StatA start from a head's predictions. ZLaP knows anchors only, so that its result is the same for
    every head.

    Args:
        trainer: whose settings, anchors and unlabelled images are used.
        features: (N, D) of the test images, unit rows.
        heads: name -> (N, C) probabilities.
        labels: (N,) true classes, of which the batches of CLASSES_PER_BATCH are made: the experiment, not the method;
            see `require_test_labels`.
    """
    settings = TransductionSettings.from_cfg(trainer.cfg)
    if settings.method == "none":
        return heads
    refiner = _refiner(trainer, settings, features)
    if settings.on == "unlabelled":
        unlabelled = trainer.unlabelled.features  # of the frozen tower, as those of test images: MODALITY is text
        given = trainer.head_probs(unlabelled)
        return {name: refiner(unlabelled, given[name])[1](features, probs) for name, probs in heads.items()}
    if not settings.classes_per_batch or labels is None:
        return {name: refiner(features, probs)[0] for name, probs in heads.items()}
    batches = stream(labels, classes=settings.classes_per_batch, size=settings.batch_size, seed=trainer.seed)
    refined = {name: probs.clone() for name, probs in heads.items()}
    for name, probs in heads.items():
        for batch in batches:
            refined[name][batch] = refiner(features[batch], probs[batch])[0]
    return refined


Predict = Callable[[Tensor, Tensor], Tensor]


def _refiner(
    trainer: PromptTrainer, settings: TransductionSettings, features: Tensor
) -> Callable[[Tensor, Tensor], tuple[Tensor, Predict]]:
    """The method: from (N, D) features and (N, C) predictions to refined ones, and to what classifies other images."""
    if settings.method == "transclip":
        return lambda x, y: _with_prediction(*transclip(x, y))
    text = as_images(normalize(trainer.text_features().mean(dim=0), dim=1), features)  # (C, D)
    images = None if settings.anchors == "text" else _means_of_images(trainer)
    if settings.method == "stata":
        anchors, weight = text if images is None else images, settings.anchor_weight
        return lambda x, y: _with_prediction(*stata(x, y, anchors, anchor_weight=weight))
    anchors = text if images is None else torch.cat([text, images])
    labels = torch.arange(len(anchors), device=anchors.device) % len(text)

    def spread(x: Tensor, y: Tensor) -> tuple[Tensor, Predict]:
        graph = propagate(x, anchors, labels)
        return graph.probs.to(y), lambda others, given: graph.predict(others).to(given)

    return spread


def _with_prediction(refined: Tensor, mixture: Mixture) -> tuple[Tensor, Predict]:
    return refined, mixture.predict


def stream(labels: Tensor, *, classes: int, size: int, seed: int) -> list[Tensor]:
    """Batches of few classes, as a stream of images has them (StatA's experiment, arXiv 2501.03729).

    The classes are divided at random into groups of `classes`; the images of a group come in random order.

    Args:
        labels: (N,) true classes.
        classes: in a batch; the last group may have fewer.
        size: images of a batch; the last one of a group may have fewer.
        seed: of the division and the order.

    Returns:
        (B,) indices of the images of each batch; every image is in one.
    """
    rng = torch.Generator().manual_seed(stable_seed("stream", seed))
    found = labels.cpu().unique()
    batches: list[Tensor] = []
    for group in found[torch.randperm(len(found), generator=rng)].split(classes):
        members = torch.isin(labels.cpu(), group).nonzero().squeeze(1)
        batches += members[torch.randperm(len(members), generator=rng)].to(labels.device).split(size)
    return batches


def _means_of_images(trainer: PromptTrainer) -> Tensor:
    """(C, D) unit class means of the images that the auxiliary classifier is made of."""
    prototypes = trainer.auxiliary.prototypes
    counted = prototypes.generated if prototypes.usable is None else prototypes.generated * prototypes.usable[..., None]
    return normalize(counted.mean(dim=1), dim=1)


def require_anchors(cfg: Any, *, has_images: bool) -> None:
    """Validate TRAINER.TRANSDUCTION.

    Raises:
        UserError: a value is invalid, or the anchors are those of generated images, and the trainer has none.
    """
    if TransductionSettings.from_cfg(cfg).needs_images and not has_images:
        raise UserError(
            f"TRAINER.TRANSDUCTION.ANCHORS is images, and {cfg.TRAINER.NAME} has no auxiliary classifier; use "
            "ZeroshotAiR, AiR, or +AiR behind the trainer's name"
        )


def require_test_labels(cfg: Any, labels: Iterable[int]) -> None:
    """Raise a UserError where CLASSES_PER_BATCH needs the labels of test images and some (-1) are not known."""
    if TransductionSettings.from_cfg(cfg).needs_test_labels and min(labels, default=0) < 0:
        raise UserError(
            "TRAINER.TRANSDUCTION.CLASSES_PER_BATCH makes batches by the labels of test images, and there are none; "
            "set it to 0"
        )
