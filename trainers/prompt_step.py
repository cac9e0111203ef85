"""A step of prompt training, on a GPU as one CUDA graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from air_plugin.utils.cuda_graph import GraphedStep

if TYPE_CHECKING:
    from trainers.prompt_trainer import PromptTrainer


def prompt_step(trainer: PromptTrainer) -> GraphedStep:
    """From a batch to its losses by name, and to the gradients of the contexts: text side, losses, backward, clipping.

    The optimiser's step is not part of it, so every optimiser and schedule of the host works as it does: on one tensor
    a member it starts few kernels, and the learning rate changes with the epochs. Make one for each round.
    """
    settings, contexts = trainer.cfg.TRAINER.PROMPT, list(trainer.model.prompt_learner.parameters())  # one a member

    def step(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        losses = trainer.losses(batch, trainer.model.text_features())
        # A loss is the mean over the members of an ensemble; times their number, each has the gradient of its own loss.
        (sum(losses.values()) * settings.ENSEMBLE).backward()
        if settings.CLIP_GRAD > 0:
            for context in contexts:
                nn.utils.clip_grad_norm_([context], settings.CLIP_GRAD)
        return losses

    enabled = trainer.cfg.AIR.CUDA_GRAPHS and _are_static(type(trainer))
    return GraphedStep(step, contexts, device=trainer.device, name="prompts", enabled=enabled)


def _are_static(kind: type[PromptTrainer]) -> bool:
    """Whether every class that defines `losses` says with `static_losses` that a graph may repeat them."""
    return all(vars(one).get("static_losses", False) for one in kind.__mro__ if "losses" in vars(one))
