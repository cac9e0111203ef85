"""AiR: "Beyond Words" (CVPR 2025, arXiv 2504.11930)."""

from __future__ import annotations

from typing import Any

import torch
from dassl.engine import TRAINER_REGISTRY
from torch import Tensor

from air_plugin.config import validate
from air_plugin.functional.fusion import relative_weight
from air_plugin.functional.losses import consistency_loss, synthetic_loss
from air_plugin.functional.pseudo_labels import possible
from air_plugin.utils.checks import require
from air_plugin.utils.seeding import stable_seed
from trainers.fused_heads import FusedHeads
from trainers.self_training import SelfTraining


@TRAINER_REGISTRY.register()
class AiR(FusedHeads, SelfTraining):
    """CPL or UPL (TRAINER.AIR.LABELER) with pseudo-labels from both classifiers, and the loss L = L_r + beta L_s.

    p* = p + lambda p^ (AiR, PLG) is air_plugin/functional/fusion.py; p^, the auxiliary classifier, is
    air_plugin/auxiliary; L_r and L_s are air_plugin/functional/losses.py.
    """

    _chosen: float | None = None

    def check_cfg(self, cfg: Any) -> None:
        super().check_cfg(cfg)
        validate(cfg, "TRAINER.AIR")
        self.labeler = cfg.TRAINER.AIR.LABELER
        self.two_views = self.air.loss == "consistency" and self.air.beta != 0
        if self.two_views and cfg.TRAINER.PROMPT.MODALITY != "text":
            views = cfg.TRAINER.PROMPT.IMAGE_VIEWS
            require(
                views > 1, "TRAINER.PROMPT.IMAGE_VIEWS", views, "at least 2 where AIR.LS consistency compares views"
            )

    def train_on(self, index: Tensor, targets: dict[str, Tensor]) -> None:
        super().train_on(index, targets)
        if self.air.beta is None:
            self._chosen = self._choose_beta(index, targets["target"] > 0)

    @property
    def beta(self) -> float | None:
        """Weight of L_s; None only where AIR.BETA is auto and nothing was trained on yet."""
        return self._chosen if self.air.beta is None else self.air.beta

    def _choose_beta(self, index: Tensor, candidates: Tensor) -> float:
        """AIR.BETA auto (ours): the weight of each loss follows the probability that its labels are right.

        That probability is the zero-shot text head's, since the auxiliary classifier is made of the images of one loss.

        Args:
            index: (S,) selected images.
            candidates: (S, C) bool.
        """
        probs = possible(self.unlabelled.probs[index], self.unlabelled_classes)
        real = (probs * candidates).sum(dim=1).mean()
        prototypes = self.auxiliary.prototypes.features  # (C, K, D)
        generated = self.backbone.text_probs(prototypes.flatten(0, 1), self.template_features)
        synthetic = generated.unflatten(0, prototypes.shape[:2]).mean(dim=1).diagonal().mean()
        return relative_weight(float(synthetic), to=float(real))

    def metrics(self) -> dict[str, Any]:
        return {**super().metrics(), "beta": self.beta}

    def inputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        batch = super().inputs(batch)
        if not self.beta or self.air.loss == "consistency":
            return batch
        images, label = self._sample_prototypes(len(batch["img"]))
        return {**batch, "generated": images, "generated_label": label}

    static_losses = True

    def losses(self, batch: dict[str, Tensor], text: Tensor) -> dict[str, Tensor]:
        losses, beta = super().losses(batch, text), self.beta
        if not beta:
            return losses
        if self.air.loss == "consistency":
            value = consistency_loss(self.model.logits(batch["img"], text), self.model.logits(batch["img2"], text))
        else:
            value = synthetic_loss(self.model.logits(batch["generated"], text), batch["generated_label"])
        return {**losses, "loss_s": beta * value}

    def _sample_prototypes(self, count: int) -> tuple[Tensor, Tensor]:
        """B kept generated images, as the prompts are trained on, and their (B,) classes.

        Which ones depends on seed, epoch and batch alone.
        """
        table, kept = self.kept_images, self.auxiliary.prototypes.kept.shape[1]
        rng = torch.Generator().manual_seed(stable_seed("synthetic", self.seed, self.epoch, self.batch_idx))
        pick = torch.randint(len(table), (count,), generator=rng)
        return table.sample(pick, generator=rng)[0], (pick // kept).to(self.device)
