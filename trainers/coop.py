"""CoOp: context optimisation with a few labelled images a class (Zhou et al., IJCV 2022, arXiv 2109.01134)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from dassl.engine import TRAINER_REGISTRY
from torch import Tensor

from air_plugin.utils.errors import UserError
from air_plugin.utils.files import digest, to_json
from trainers.prompt_trainer import PromptTrainer


@TRAINER_REGISTRY.register()
class CoOp(PromptTrainer):
    """Prompts trained on labels: of DATASET.NUM_SHOTS images a class, or of all images where that is below 1."""

    def prepare(self) -> None:
        items = sorted(self.dm.dataset.train_x, key=lambda item: item.impath)
        self.paths = [item.impath for item in items]
        if any(item.label < 0 for item in items):
            raise UserError(f"{items[0].impath} has no label, and CoOp learns from labels; use UPL, CPL or AiR")
        self.labels = torch.tensor([item.label for item in items], device=self.device)
        self.table = self.training_table(self.paths, name="features of train", views=self.views)

    def training_paths(self) -> list[str]:
        return self.paths

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "labels": digest(to_json(self.labels.tolist()).encode())}

    def training_set(self) -> tuple[Tensor, dict[str, Tensor]]:
        return torch.arange(len(self.labels), device=self.device), {"target": self.labels}

    static_losses = True

    def losses(self, batch: dict[str, Tensor], text: Tensor) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(self.model.logits(batch["img"], text), batch["target"])}
