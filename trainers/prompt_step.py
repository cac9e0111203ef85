"""A step of prompt training, on a GPU as one CUDA graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from air_plugin.utils.cuda_graph import GraphedStep

if TYPE_CHECKING:
    from trainers.prompt_trainer import PromptTrainer


def prompt_step(trainer: PromptTrainer) -> GraphedStep:
    """From a batch to its losses by name, and to the gradients of the prompts: towers, losses, backward, clipping.

    The optimiser's step is not part of it, so every optimiser and schedule of the host works as it does: on one tensor
    a member it starts few kernels, and the learning rate changes with the epochs. Make one for each round.
    """
    settings, model = trainer.cfg.TRAINER.PROMPT, trainer.model
    members = [list(member.parameters()) for member in getattr(model.prompt_learner, "members", [model.prompt_learner])]
    parameters = [parameter for member in members for parameter in member]

    def step(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        losses = trainer.losses(model.encode_batch(batch), model.text_features())
        # A loss is the mean over the members of an ensemble; times their number, each has the gradient of its own loss.
        (sum(losses.values()) * (settings.ENSEMBLE * model.loss_scale)).backward()
        if model.loss_scale != 1:
            _unscale([parameter.grad for parameter in parameters if parameter.grad is not None], model.loss_scale)
        if settings.CLIP_GRAD > 0:
            for member in members:
                nn.utils.clip_grad_norm_(member, settings.CLIP_GRAD)
        return losses

    enabled = trainer.cfg.AIR.CUDA_GRAPHS and _are_static(type(trainer))
    return GraphedStep(step, parameters, device=trainer.device, name="prompts", enabled=enabled)


def _unscale(gradients: list[Tensor], scale: float) -> None:
    """Divide gradients; all become 0 where one of them overflowed, so that the step changes little."""
    finite = torch.stack([gradient.isfinite().all() for gradient in gradients]).all()
    for gradient in gradients:
        gradient.copy_(torch.where(finite, gradient / scale, torch.zeros_like(gradient)))


def _are_static(kind: type[PromptTrainer]) -> bool:
    """Whether every class that defines `losses` says with `static_losses` that a graph may repeat them."""
    return all(vars(one).get("static_losses", False) for one in kind.__mro__ if "losses" in vars(one))
