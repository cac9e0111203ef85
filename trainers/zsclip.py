"""Zero-shot CLIP: the template text head, nothing trained."""

from __future__ import annotations

from dassl.engine import TRAINER_REGISTRY
from torch import Tensor

from trainers.prompt_trainer import PromptTrainer


@TRAINER_REGISTRY.register()
class ZeroshotCLIP(PromptTrainer):
    """Classifies by the template's text features (Radford et al. 2021)."""

    def build_training(self) -> None:
        """Nothing is learned, and no training image is looked at."""

    def train(self) -> None:
        self.before_train()
        self.after_train()

    def head_probs(self, features: Tensor) -> dict[str, Tensor]:
        return {"text": self.backbone.text_probs(features, self.template_features)}
