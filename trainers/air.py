"""AiR: "Beyond Words" (CVPR 2025, arXiv 2504.11930)."""

from __future__ import annotations

from typing import Any

from dassl.engine import TRAINER_REGISTRY

from air_plugin.config import Labeler, require_choice
from air_plugin.mixin import AuxiliaryMixin
from trainers.self_training import SelfTraining


@TRAINER_REGISTRY.register()
class AiR(AuxiliaryMixin, SelfTraining):
    """CPL or UPL (TRAINER.AIR.LABELER) whose pseudo-labels also hear the auxiliary classifier."""

    def check_cfg(self, cfg: Any) -> None:
        super().check_cfg(cfg)
        require_choice("TRAINER.AIR.LABELER", cfg.TRAINER.AIR.LABELER, Labeler)
        self.labeler = cfg.TRAINER.AIR.LABELER
