"""UPL: unsupervised prompt learning (Huang, Chu, Wei 2022, arXiv 2204.03649)."""

from __future__ import annotations

from dassl.engine import TRAINER_REGISTRY

from trainers.self_training import SelfTraining


@TRAINER_REGISTRY.register()
class UPL(SelfTraining):
    """Prompts trained on the TRAINER.UPL.PER_CLASS most confident images of each class, with hard labels.

    TRAINER.PROMPT.ENSEMBLE 16 is the paper's ensemble: the mean prediction of 16 prompts of 16 seeds.
    """

    labeler = "UPL"
