"""Rivals that classify images together, over the predictions of any head (TRAINER.TRANSDUCTION)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from air_plugin.functional.stata import stata
from air_plugin.functional.transclip import Mixture, transclip
from air_plugin.functional.zlap import propagate
from air_plugin.settings import TransductionSettings
from air_plugin.utils.errors import UserError

if TYPE_CHECKING:
    from trainers.prompt_trainer import PromptTrainer


def refined_heads(trainer: PromptTrainer, features: Tensor, heads: dict[str, Tensor]) -> dict[str, Tensor]:
    """The predictions of every head after TRAINER.TRANSDUCTION.METHOD; as they are where it is none.

    TransCLIP and StatA start from a head's predictions. ZLaP knows anchors only, so that its result is the same for
    every head.

    Args:
        trainer: whose settings, anchors and unlabelled images are used.
        features: (N, D) of the test images, unit rows.
        heads: name -> (N, C) probabilities.
    """
    settings = TransductionSettings.from_cfg(trainer.cfg)
    if settings.method == "none":
        return heads
    text = normalize(trainer.text_features().mean(dim=0), dim=1)  # (C, D)
    images = None if settings.anchors == "text" else _means_of_images(trainer)
    if settings.method == "zlap":
        anchors = text if images is None else torch.cat([text, images])
        labels = torch.arange(len(anchors), device=anchors.device) % len(text)
        graph = propagate(features if settings.on == "test" else trainer.unlabelled.features, anchors, labels)
        probs = graph.probs if settings.on == "test" else graph.predict(features)
        return {name: probs.to(given) for name, given in heads.items()}

    def refine(x: Tensor, y: Tensor) -> tuple[Tensor, Mixture]:
        if settings.method == "transclip":
            return transclip(x, y)
        return stata(x, y, text if images is None else images, anchor_weight=settings.anchor_weight)

    if settings.on == "test":
        return {name: refine(features, probs)[0] for name, probs in heads.items()}
    unlabelled = trainer.unlabelled.features
    fitted = {name: refine(unlabelled, probs)[1] for name, probs in trainer.head_probs(unlabelled).items()}
    return {name: fitted[name].predict(features, probs) for name, probs in heads.items()}


def _means_of_images(trainer: PromptTrainer) -> Tensor:
    """(C, D) unit class means of all images that the auxiliary classifier is made of."""
    return normalize(trainer.auxiliary.prototypes.generated.mean(dim=1), dim=1)


def require_anchors(cfg: Any, *, has_images: bool) -> None:
    """Validate TRAINER.TRANSDUCTION.

    Raises:
        UserError: a value is invalid, or the anchors are those of generated images, and the trainer has none.
    """
    settings = TransductionSettings.from_cfg(cfg)
    if settings.method != "none" and settings.anchors == "images" and not has_images:
        raise UserError(
            f"TRAINER.TRANSDUCTION.ANCHORS is images, and {cfg.TRAINER.NAME} has no auxiliary classifier; use "
            "ZeroshotAiR, AiR, or +AiR behind the trainer's name"
        )
