"""CPL: candidate pseudo-labels (Zhang et al., ICML 2024, arXiv 2406.10502), a single round with the loss 'cc'."""

from __future__ import annotations

from typing import Any

from dassl.engine import TRAINER_REGISTRY
from torch import Tensor

from air_plugin.config import require_range
from air_plugin.losses import candidate_loss
from air_plugin.metrics import pseudo_label_metrics
from air_plugin.pseudo_labels import candidate_sets
from trainers.prompt_trainer import PromptTrainer


@TRAINER_REGISTRY.register()
class CPL(PromptTrainer):
    """Prompts that are trained on candidate sets made of zero-shot probabilities."""

    def check_cfg(self, cfg: Any) -> None:
        super().check_cfg(cfg)
        require_range("TRAINER.CPL.ALPHA", cfg.TRAINER.CPL.ALPHA, 0, 1)
        require_range("TRAINER.CPL.BETA", cfg.TRAINER.CPL.BETA, 0, 1)
        require_range("TRAINER.CPL.PER_CLASS", cfg.TRAINER.CPL.PER_CLASS, 1, float("inf"))

    def training_set(self) -> tuple[Tensor, Tensor]:
        cpl = self.cfg.TRAINER.CPL
        self.label_probs = self.pseudo_probs()
        self.candidates = candidate_sets(self.label_probs, alpha=cpl.ALPHA, beta=cpl.BETA, per_class=cpl.PER_CLASS)
        index, mask = self.candidates.index, self.candidates.mask
        empty = [name for name, any_ in zip(self.classnames, mask.any(dim=0).tolist(), strict=True) if not any_]
        if empty:
            print(f"warning: no pseudo-label for {len(empty)} of {len(self.classnames)} classes: {', '.join(empty)}")
        return index, mask

    def losses(self, batch: dict[str, Tensor], text: Tensor) -> dict[str, Tensor]:
        return {"loss_r": candidate_loss(self.model.logits(batch["img"], text), batch["target"])}

    def pseudo_label_summary(self) -> dict[str, Any]:
        index = self.candidates.index
        return pseudo_label_metrics(
            index, self.candidates.mask, self.label_probs[index], total=len(self.table), labels=self.hidden_labels()
        )
