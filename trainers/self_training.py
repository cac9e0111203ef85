"""What prompt trainers with pseudo-labels share: rounds of labelling the unlabelled images and training on them."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from air_plugin.config import validate
from air_plugin.former_settings import ROUND_TENSORS
from air_plugin.functional.losses import CandidateForm, candidate_weights, partial_label_loss
from air_plugin.functional.metrics import pseudo_label_metrics
from air_plugin.functional.pseudo_labels import Candidates, candidate_sets, hard_labels, restrict, soft_labels, widen
from air_plugin.utils.class_names import listed
from air_plugin.utils.digests import content_digest
from air_plugin.utils.errors import UserError
from air_plugin.utils.files import digest, to_json
from air_plugin.utils.tensors import load_tensors, save_tensors
from trainers.labelled import BothBatches, LabelledBatches, LabelledImages, labelled_batch, unlabelled_classes
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
    """Pseudo-labels, and prompts trained on them, and on labelled images where the paradigm has such (ssl, trzsl).

    The template labels the images of the first round; the prompts of the round before label those of a later round.
    Every round begins with fresh prompts. With R > 1 rounds, round t selects int(t * int(N / R) / C) images of each
    class, at least one: the schedule of GRIP (Menghini et al., NeurIPS 2023, arXiv 2306.01669) and of CPL, which both
    have 10 rounds. The formulas stand in air_plugin/functional: pseudo_labels.py and losses.py.

    Pseudo-labels are made of the probabilities of the classes that an unlabelled image may have, renormalised: in trzsl
    the unseen ones, whose number then is C. The prompts are of all classes, and so are the losses. With labelled images
    the loss is CE(labelled) + L_r, as CPL has it.
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

    def prepare(self) -> None:
        super().prepare()
        dataset = self.dm.dataset
        classes = unlabelled_classes(dataset)
        self.unlabelled_classes = (
            None if classes is None else torch.tensor(classes, device=self.device)
        )  # (U,); None: all
        self.labelled = LabelledImages.of(dataset)
        if self.labelled:
            paths = self.labelled.paths
            self.labelled_table = self.training_table(paths, name="features of labelled", views=self.views)

    def identity(self) -> dict[str, Any]:
        rounds = self.cfg.TRAINER.PROMPT.ROUNDS  # of more than one, each depends on the length of those before it
        found = {**super().identity(), **({"rounds": [rounds, self.cfg.OPTIM.MAX_EPOCH]} if rounds > 1 else {})}
        if self.labelled:
            images = content_digest(self.labelled.paths, cache=self.store.digests)
            found |= {"labelled": images, "labels": digest(to_json(self.labelled.labels).encode())}
        return found

    def pseudo_probs(self) -> Tensor:
        """(N, C) class probabilities of the unlabelled images, rows sum to 1; the pseudo-labels are made of them."""
        return self.model(self.table.plain).softmax(dim=1) if self.rounds else self.unlabelled.probs

    def select(self, probs: Tensor) -> Candidates:
        """Pseudo-labels of the round that begins, from the (N, C) probabilities of the classes that may have them."""
        cpl, classes, share = self.cfg.TRAINER.CPL, probs.shape[1], self.images_per_class(*probs.shape)
        if self.labeler == "UPL":
            return hard_labels(probs, share or self.cfg.TRAINER.UPL.PER_CLASS)
        beta = max(0.0, 1 - cpl.GAMMA / classes) if cpl.GAMMA else cpl.BETA  # gamma = C (1 - beta)
        return candidate_sets(probs, alpha=cpl.ALPHA, beta=beta, per_class=share or cpl.PER_CLASS)

    def images_per_class(self, count: int, classes: int) -> int | None:
        """Of the round that begins, in the iterative form; None where there is one round, which has its own number."""
        rounds = self.cfg.TRAINER.PROMPT.ROUNDS
        return max(1, (len(self.rounds) + 1) * (count // rounds) // classes) if rounds > 1 else None

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
        chosen = widen(
            self.select(restrict(probs, self.unlabelled_classes)), self.unlabelled_classes, total=probs.shape[1]
        )
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
        used = chosen.mask.any(dim=0)  # (C,)
        expected = torch.arange(len(used)) if self.unlabelled_classes is None else self.unlabelled_classes
        empty = [self.classnames[label] for label in expected.tolist() if not used[label]]
        if empty:
            log.warning("no pseudo-label for %d of %d classes: %s", len(empty), len(expected), listed(empty))

    def train_on(self, index: Tensor, targets: dict[str, Tensor]) -> None:
        """With labelled images, each batch has some of them beside the (S,) unlabelled ones."""
        super().train_on(index, targets)
        if not self.labelled:
            return
        batch, beside = self.batch_sizes(len(index))
        self.train_loader_x.batch_size = min(batch, len(index))
        labelled = LabelledBatches(
            self.labelled_table,
            torch.tensor(self.labelled.labels, device=self.device),
            batch_size=beside,
            batches=len(self.train_loader_x),
            seed=self.seed,
            epoch=lambda: self.epoch,
            members=self.cfg.TRAINER.PROMPT.ENSEMBLE,
        )
        both: Any = BothBatches(self.train_loader_x, labelled)
        self.train_loader_x = both

    def batch_sizes(self, selected: int) -> tuple[int, int]:
        """Images in a batch: unlabelled ones, of which `selected` have pseudo-labels, and labelled ones."""
        batch = self.cfg.DATALOADER.TRAIN_X.BATCH_SIZE
        return batch, labelled_batch(batch, labelled=len(self.labelled), selected=selected)

    def loss_weights(self) -> tuple[float, float]:
        """Of the losses on labelled and on pseudo-labelled images; used where there are labelled ones."""
        return 1.0, 1.0

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
        real = partial_label_loss(logits, labels, weights, form=self.form, leverage=leverage)
        if "labelled" not in batch:
            return {"loss_r": real}
        given, pseudo = self.loss_weights()
        supervised = F.cross_entropy(self.model.logits(batch["labelled"], text), batch["label"])
        return {"loss_l": given * supervised, "loss_r": pseudo * real}

    def metrics(self) -> dict[str, Any]:
        labels, total = self.hidden_labels(), len(self.table)
        rounds = [pseudo_label_metrics(r.index, r.mask, r.top1, total=total, labels=labels) for r in self.rounds]
        return {"pseudo_labels": rounds[-1], "rounds": rounds}


def _file(folder: str | Path, number: int) -> Path:
    """What a round, counted from 0, was trained on."""
    return Path(folder) / "rounds" / f"{number + 1}.safetensors"
