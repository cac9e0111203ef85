"""The auxiliary classifier as a mixin over a prompt trainer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from air_plugin.auxiliary import Auxiliary, auxiliary_of_real_images, build_auxiliary
from air_plugin.config import AirSettings
from air_plugin.features import stable_seed
from air_plugin.losses import consistency_loss, synthetic_loss
from air_plugin.pseudo_labels import fuse

LAMBDAS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)

_Host: Any = object  # a PromptTrainer; the library imports no trainer


class AuxiliaryMixin(_Host):
    """Fuses the auxiliary classifier into pseudo-labels and prediction, and adds beta * L_s to the loss (AiR).

    Stands before a PromptTrainer: `class AiR(AuxiliaryMixin, CPL)`.
    """

    auxiliary: Auxiliary
    air: AirSettings
    headline: str
    by_lambda: list[tuple[float, float]] | None = None

    def check_cfg(self, cfg: Any) -> None:
        super().check_cfg(cfg)
        self.air = AirSettings.from_cfg(cfg)
        self.headline = self.air.headline

    def prepare(self) -> None:
        """Build the auxiliary classifier once features and zero-shot probabilities are there."""
        super().prepare()
        if self.air.source == "real":
            with self.stages.stage("prototypes"):
                self.auxiliary = auxiliary_of_real_images(
                    self.paths,
                    self.table.plain,
                    self.zero_shot_probs,
                    settings=self.air,
                    logit_scale=self.backbone.logit_scale,
                )
            return
        self.auxiliary = build_auxiliary(
            self.backbone,
            self.classnames,
            self.paths,
            probs=self.zero_shot_probs,
            settings=self.air,
            store=self.store,
            stages=self.stages,
        )

    def pseudo_probs(self) -> Tensor:
        """(N, C) p* of the unlabelled images."""
        return self.fused(super().pseudo_probs(), self.table.plain)

    def fused(self, text_probs: Tensor, features: Tensor) -> Tensor:
        """p* from (N, C) text probabilities and the (N, D) features behind them."""
        return fuse(text_probs, self.auxiliary.classifier.probs(features), weight=self.air.weight)

    def head_probs(self, features: Tensor) -> dict[str, Tensor]:
        heads = super().head_probs(features)
        return {**heads, "fused": self.fused(heads["text"], features)}

    def diagnose(self, features: Tensor, labels: Tensor) -> None:
        """Accuracy of the fused head for other lambdas; looked at afterwards, nothing is chosen by it."""
        super().diagnose(features, labels)
        if self.cfg.TRAINER.TRANSCLIP.ENABLED:
            return  # its fused head is another one
        text, auxiliary = super().head_probs(features)["text"], self.auxiliary.classifier.probs(features)
        self.by_lambda = [
            (weight, 100.0 * float((fuse(text, auxiliary, weight=weight).argmax(dim=1) == labels).float().mean()))
            for weight in sorted({*LAMBDAS, self.air.weight})
        ]

    def figures(self) -> dict[str, Any]:
        return {**super().figures(), "by_lambda": self.by_lambda}

    def losses(self, batch: dict[str, Tensor], text: Tensor) -> dict[str, Tensor]:
        losses = super().losses(batch, text)
        if self.air.beta == 0:
            return losses
        if self.air.loss == "consistency":
            value = consistency_loss(self.model.logits(batch["img"], text), self.model.logits(batch["img2"], text))
        else:
            features, label = self._draw_prototypes(len(batch["img"]))
            value = synthetic_loss(self.model.logits(features, text), label)
        return {**losses, "loss_s": self.air.beta * value}

    def _draw_prototypes(self, count: int) -> tuple[Tensor, Tensor]:
        """(B, D) kept generated features and their (B,) classes; which ones depends on seed, epoch and batch alone."""
        prototypes = self.auxiliary.prototypes
        classes, kept, _ = prototypes.shape
        seed = stable_seed("synthetic", self.seed, self.epoch, self.batch_idx)
        pick = torch.randint(classes * kept, (count,), generator=torch.Generator().manual_seed(seed))
        pick = pick.to(prototypes.device)
        return prototypes.flatten(0, 1)[pick], pick // kept
