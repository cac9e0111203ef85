"""AiR: "Beyond Words" (CVPR 2025, arXiv 2504.11930)."""

from __future__ import annotations

from dassl.engine import TRAINER_REGISTRY

from air_plugin.mixin import AuxiliaryMixin
from trainers.cpl import CPL


@TRAINER_REGISTRY.register()
class AiR(AuxiliaryMixin, CPL):
    """CPL whose pseudo-labels also hear the auxiliary classifier."""
