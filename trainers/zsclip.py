"""Nothing trained: zero-shot CLIP, alone and with the auxiliary classifier beside it."""

from __future__ import annotations

from dassl.engine import TRAINER_REGISTRY
from torch import Tensor

from air_plugin.mixin import AuxiliaryMixin
from trainers.prompt_trainer import PromptTrainer


@TRAINER_REGISTRY.register()
class ZeroshotCLIP(PromptTrainer):
    """Classifies by the template's text features (Radford et al. 2021)."""

    def build_training(self) -> None:
        """Nothing is learned, and no training image is looked at."""

    def train(self) -> None:
        self.before_train()
        self.after_train()

    def text_features(self) -> Tensor:
        return self.template_features[None]

    def head_probs(self, features: Tensor) -> dict[str, Tensor]:
        return {"text": self.backbone.text_probs(features, self.template_features)}


@TRAINER_REGISTRY.register()
class ZeroshotAiR(AuxiliaryMixin, ZeroshotCLIP):
    """The template head fused with the auxiliary classifier (AiR, PLG, without prompt training)."""
