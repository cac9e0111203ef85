"""CPL: candidate pseudo-labels (Zhang et al., ICML 2024, arXiv 2406.10502)."""

from __future__ import annotations

from dassl.engine import TRAINER_REGISTRY

from trainers.self_training import SelfTraining


@TRAINER_REGISTRY.register()
class CPL(SelfTraining):
    """Prompts trained on sets of candidate labels (air_plugin/functional/pseudo_labels.py, `candidate_sets`).

    TRAINER.PROMPT.ROUNDS above 1 is the paper's iterative form.
    """

    labeler = "CPL"
