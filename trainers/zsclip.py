"""Without training: zero-shot CLIP, alone and fused with the auxiliary classifier."""

from __future__ import annotations

from dassl.engine import TRAINER_REGISTRY
from torch import Tensor

from trainers.fused_heads import FusedHeads
from trainers.prompt_trainer import PromptTrainer


@TRAINER_REGISTRY.register()
class ZeroshotCLIP(PromptTrainer):
    """Classifies by the template's text features (Radford et al. 2021); TRAINER.PROMPT.MODALITY is not read."""

    is_visual = False

    def build_training(self) -> None:
        """Nothing is trained, and no training image is read."""

    def train(self) -> None:
        self.before_train()
        self.after_train()

    def text_features(self) -> Tensor:
        return self.template_features[None]

    def head_probs(self, features: Tensor, frozen: Tensor | None = None) -> dict[str, Tensor]:
        return {"text": self.backbone.text_probs(features, self.template_features)}


@TRAINER_REGISTRY.register()
class ZeroshotAiR(FusedHeads, ZeroshotCLIP):
    """p* = p + lambda p^ with the template's p (AiR, PLG, without prompt training; air_plugin/functional/fusion.py)."""
