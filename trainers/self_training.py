"""What unsupervised prompt trainers share: rounds of labelling the unlabelled images and training on these labels."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from air_plugin.config import validate
from air_plugin.former_settings import ROUND_TENSORS
from air_plugin.functional.losses import CandidateForm, candidate_weights, partial_label_loss
from air_plugin.functional.metrics import pseudo_label_metrics
from air_plugin.functional.pseudo_labels import Candidates, candidate_sets, hard_labels, soft_labels
from air_plugin.utils.class_names import listed
from air_plugin.utils.errors import UserError
from air_plugin.utils.tensors import load_tensors, save_tensors
from trainers.prompt_trainer import PromptTrainer

log = logging.getLogger(f"air_plugin.{__name__}")  # `show_logs` shows what is below air_plugin


@dataclass(frozen=True)
class Round:
    """What one round was trained on.

    index: (S,) selected images. mask: (S, C) bool, their candidates. top1: (S,) the most confident candidate of each.
    labels: (S, C) soft labels, which sum to 1 over the candidates; None: 1 for every candidate.
    """

    index: Tensor
    mask: Tensor
    top1: Tensor
    labels: Tensor | None = None


class SelfTraining(PromptTrainer):
    """Pseudo-labels, and prompts trained on them.

    The template labels the images of the first round; the prompts of the round before label those of a later round.
    Every round begins with fresh prompts. With R > 1 rounds, round t selects int(t * int(N / R) / C) images of each
    class, at least one: the schedule of GRIP (Menghini et al., NeurIPS 2023, arXiv 2306.01669) and of CPL, which both
    have 10 rounds. The formulas stand in air_plugin/functional: pseudo_labels.py and losses.py.
    """

    labeler: str

    def check_cfg(self, cfg: Any) -> None:
        super().check_cfg(cfg)
        validate(cfg, "TRAINER.CPL", "TRAINER.UPL")
        loss = cfg.TRAINER.CPL.LOSS
        if loss != "cc" and cfg.TRAINER.PROMPT.ENSEMBLE > 1:
            raise UserError(f"TRAINER.CPL.LOSS is {loss}; with TRAINER.PROMPT.ENSEMBLE above 1 it must be cc")

    @property
    def form(self) -> CandidateForm:
        """Of the loss. Of one candidate an image, which is what UPL selects, cc is plain cross entropy."""
        return self.cfg.TRAINER.CPL.LOSS if self.labeler == "CPL" else "cc"

    def build_training(self) -> None:
        super().build_training()
        self.rounds: list[Round] = []
        self.max_epoch = self.cfg.TRAINER.PROMPT.ROUNDS * self.cfg.OPTIM.MAX_EPOCH

    def identity(self) -> dict[str, Any]:
        rounds = self.cfg.TRAINER.PROMPT.ROUNDS  # of more than one, each depends on the length of those before it
        return {**super().identity(), **({"rounds": [rounds, self.cfg.OPTIM.MAX_EPOCH]} if rounds > 1 else {})}

    def pseudo_probs(self) -> Tensor:
        """(N, C) class probabilities of the unlabelled images, rows sum to 1; the pseudo-labels are made of them."""
        return self.model(self.table.plain).softmax(dim=1) if self.rounds else self.unlabelled.probs

    def select(self, probs: Tensor) -> Candidates:
        """Pseudo-labels of the round that begins, from (N, C) probabilities."""
        count, classes = probs.shape
        rounds = self.cfg.TRAINER.PROMPT.ROUNDS
        share = max(1, (len(self.rounds) + 1) * (count // rounds) // classes) if rounds > 1 else None
        if self.labeler == "UPL":
            return hard_labels(probs, share or self.cfg.TRAINER.UPL.PER_CLASS)
        cpl = self.cfg.TRAINER.CPL
        beta = max(0.0, 1 - cpl.GAMMA / classes) if cpl.GAMMA else cpl.BETA  # gamma = C (1 - beta)
        return candidate_sets(probs, alpha=cpl.ALPHA, beta=beta, per_class=share or cpl.PER_CLASS)

    def training_set(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Of a resumed run's round, else of the first one."""
        for number in range(math.ceil(self.start_epoch / self.cfg.OPTIM.MAX_EPOCH)):
            path = _file(self.resumed, number)
            saved = load_tensors(path)
            if saved is None:
                raise UserError(f"{path} is missing or damaged; remove {self.resumed} and run again")
            saved = {ROUND_TENSORS.get(name, name): tensor for name, tensor in saved.items()}
            if saved["mask"].shape[1] != len(self.classnames) or int(saved["index"].max()) >= len(self.table):
                raise UserError(f"{path} is of other images or classes; choose another OUTPUT_DIR, or remove it")
            if self.resumed != Path(self.output_dir):
                save_tensors(_file(self.output_dir, number), saved)
            self.rounds.append(Round(**{name: tensor.to(self.device) for name, tensor in saved.items()}))
        return self._targets() if self.rounds else self.begin_round()

    @torch.no_grad()
    def begin_round(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Label the images with the current model, then reset the prompts to their initial values."""
        probs = self.pseudo_probs()
        chosen = self.select(probs)
        self._warn_of_empty(chosen)
        top1 = probs[chosen.index].masked_fill(~chosen.mask, -1).argmax(dim=1)
        saved = {"index": chosen.index, "mask": chosen.mask, "top1": top1}
        if self.labeler == "CPL" and self.cfg.TRAINER.PROMPT.ROUNDS > 1 and not self.rounds:
            saved["labels"] = soft_labels(probs[chosen.index], chosen.mask)
        save_tensors(_file(self.output_dir, len(self.rounds)), saved)
        self.rounds.append(Round(**saved))
        self.model.prompt_learner.load_state_dict(self.initial)
        self._optims["prompt_learner"], self._scheds["prompt_learner"] = self.new_optimiser()
        return self._targets()

    def _warn_of_empty(self, chosen: Candidates) -> None:
        labelled = chosen.mask.any(dim=0).tolist()  # (C,)
        empty = [name for name, has_any in zip(self.classnames, labelled, strict=True) if not has_any]
        if empty:
            log.warning("no pseudo-label for %d of %d classes: %s", len(empty), len(self.classnames), listed(empty))

    def _targets(self) -> tuple[Tensor, dict[str, Tensor]]:
        last = self.rounds[-1]
        return last.index, {"target": last.mask if last.labels is None else last.labels}

    @torch.no_grad()
    def before_epoch(self) -> None:
        super().before_epoch()
        begins = self.epoch % self.cfg.OPTIM.MAX_EPOCH == 0
        if begins and self.epoch // self.cfg.OPTIM.MAX_EPOCH == len(self.rounds):
            self.train_on(*self.begin_round())
        if self.form != "cc":
            index, targets = self._targets()
            logits = None if begins else self.model(self.table.plain[index])
            self.train_loader_x.targets["weights"] = candidate_weights(logits, targets["target"], form=self.form)

    def after_epoch(self) -> None:
        super().after_epoch()
        if (self.epoch + 1) % self.cfg.OPTIM.MAX_EPOCH == 0 and self.epoch + 1 < self.max_epoch:
            self.save_model(self.epoch, self.output_dir)  # a kill costs at most one round

    static_losses = True

    def losses(self, batch: dict[str, Tensor], text: Tensor) -> dict[str, Tensor]:
        logits, leverage = self.model.logits(batch["img"], text), self.cfg.TRAINER.CPL.LEVERAGE
        labels, weights = batch["target"], batch.get("weights")
        return {"loss_r": partial_label_loss(logits, labels, weights, form=self.form, leverage=leverage)}

    def metrics(self) -> dict[str, Any]:
        labels, total = self.hidden_labels(), len(self.table)
        rounds = [pseudo_label_metrics(r.index, r.mask, r.top1, total=total, labels=labels) for r in self.rounds]
        return {"pseudo_labels": rounds[-1], "rounds": rounds}


def _file(folder: str | Path, number: int) -> Path:
    """What a round, counted from 0, was trained on."""
    return Path(folder) / "rounds" / f"{number + 1}.safetensors"
