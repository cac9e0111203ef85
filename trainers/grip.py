"""GRIP: grow and refine iteratively pseudo-labels (Menghini et al., NeurIPS 2023, arXiv 2306.01669)."""

from __future__ import annotations

from typing import Any

from dassl.engine import TRAINER_REGISTRY
from torch import Tensor

from air_plugin.config import validate
from air_plugin.functional.pseudo_labels import Candidates, leaderboards
from trainers.self_training import SelfTraining


@TRAINER_REGISTRY.register()
class GRIP(SelfTraining):
    """Prompts trained on the most confident images of every class (functional/pseudo_labels.py, `leaderboards`).

    Each of TRAINER.PROMPT.ROUNDS rounds has more images than the one before, and new prompts; a single round is the
    paper's FPL, with TRAINER.GRIP.PER_CLASS images a class. With L labelled and S pseudo-labelled images the losses are

        ul:    CE(pseudo)
        ssl:   L / S CE(labelled) + CE(pseudo), in FPL S / L CE(labelled) + CE(pseudo)
        trzsl: CE(labelled) + L / S CE(pseudo)

    A batch contains both kinds in proportion to L and S, at least one of each; in the authors' code it is a random
    sample of all of them.
    """

    labeler = "GRIP"

    def check_cfg(self, cfg: Any) -> None:
        super().check_cfg(cfg)
        validate(cfg, "TRAINER.GRIP")

    def select(self, probs: Tensor) -> Candidates:
        return leaderboards(probs, self.images_per_class(*probs.shape) or self.cfg.TRAINER.GRIP.PER_CLASS)

    def batch_sizes(self, selected: int) -> tuple[int, int]:
        batch, total = self.cfg.DATALOADER.TRAIN_X.BATCH_SIZE, selected + len(self.labelled)
        beside = min(max(round(batch * len(self.labelled) / total), 1), max(batch - 1, 1))
        return max(batch - beside, 1), beside

    def loss_weights(self) -> tuple[float, float]:
        ratio = len(self.labelled) / len(self.rounds[-1].index)
        if self.cfg.DATASET.PARADIGM == "trzsl":
            return 1.0, ratio
        return (ratio, 1.0) if self.cfg.TRAINER.PROMPT.ROUNDS > 1 else (1 / ratio, 1.0)
