"""From the config to a model with prompts: of words (CoOp), in the image tower (VPT), or both (UPT)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from air_plugin.clip.backbone import Backbone
from air_plugin.clip.joint_prompts import JointPrompts
from air_plugin.clip.prompts import PromptedCLIP, PromptEnsemble, PromptLearner
from air_plugin.clip.visual_prompts import VisuallyPromptedCLIP, VisualPrompts, require_vision_transformer
from air_plugin.utils.checks import require
from air_plugin.utils.seeding import member_seed, stable_seed


def make_model(
    backbone: Backbone, classnames: Sequence[str], template: Tensor, *, cfg: Any, seed: int
) -> tuple[PromptedCLIP, Any]:
    """The model of TRAINER.PROMPT.MODALITY, and its part that is trained.

    Args:
        backbone: stays as it is.
        classnames: C names.
        template: (C, D) unit text features, which visual prompts are compared with.
        cfg: the whole config.
        seed: of the initial prompts.

    Raises:
        UserError: settings do not go with the modality, or the image tower takes no prompts.
    """
    transduction, cfg = cfg.TRAINER.TRANSDUCTION, cfg.TRAINER.PROMPT
    modality = cfg.MODALITY
    if modality == "text":
        members = [_text(backbone, classnames, cfg, seed, *member_seed(member)) for member in range(cfg.ENSEMBLE)]
        learner: Any = PromptEnsemble(members) if len(members) > 1 else members[0]
        return PromptedCLIP(backbone, learner), learner
    _require_what_goes_together(cfg, transduction)
    generator = torch.Generator().manual_seed(stable_seed("visual prompts", seed))
    if modality == "visual":
        learner = VisualPrompts(backbone, classnames, count=cfg.N_VISUAL, generator=generator)
    else:
        bound = _bound(backbone)
        visual = VisualPrompts(backbone, classnames, count=cfg.N_VISUAL, bound=bound, generator=generator)
        learner = JointPrompts(_text(backbone, classnames, cfg, seed), visual, seed=stable_seed("joint prompts", seed))
    fixed = template if modality == "visual" else None
    return VisuallyPromptedCLIP(backbone, learner, template=fixed, checkpointing=cfg.CHECKPOINTING), learner


def _text(backbone: Backbone, classnames: Sequence[str], cfg: Any, *seed: int) -> PromptLearner:
    return PromptLearner(
        backbone,
        classnames,
        n_ctx=cfg.N_CTX,
        ctx_init=cfg.CTX_INIT,
        class_specific=cfg.CSC,
        position=cfg.CLASS_TOKEN_POSITION,
        generator=torch.Generator().manual_seed(stable_seed("context", *seed)),
    )


def _bound(backbone: Backbone) -> float:
    """Of the initial visual tokens of UPT: sqrt(6 / (3 p^2 + W)) with the patch side p and the tower's width W."""
    tower = require_vision_transformer(backbone)
    (height, width), tokens = tower.conv1.kernel_size, tower.positional_embedding.shape[1]
    return (6 / (3 * height * width + tokens)) ** 0.5


def _require_what_goes_together(cfg: Any, transduction: Any) -> None:
    """Refuse settings of text prompts that have no meaning in another modality."""
    modality, where = cfg.MODALITY, f"where MODALITY is {cfg.MODALITY}"
    require(cfg.ENSEMBLE == 1, "TRAINER.PROMPT.ENSEMBLE", cfg.ENSEMBLE, f"1 {where}")
    require(not cfg.CSC, "TRAINER.PROMPT.CSC", cfg.CSC, f"False {where}: all classes share the image tower")
    what = "no words are learned" if modality == "visual" else "a network makes the context, from random numbers"
    require(not cfg.CTX_INIT, "TRAINER.PROMPT.CTX_INIT", repr(cfg.CTX_INIT), f"empty {where}: {what}")
    if modality == "visual":
        position = cfg.CLASS_TOKEN_POSITION
        require(position == "end", "TRAINER.PROMPT.CLASS_TOKEN_POSITION", position, f"end {where}: {what}")
    if transduction.METHOD != "none":  # other features than the test images have with the prompts
        require(transduction.ON == "test", "TRAINER.TRANSDUCTION.ON", transduction.ON, f"test {where}")
        require(transduction.ANCHORS == "text", "TRAINER.TRANSDUCTION.ANCHORS", transduction.ANCHORS, f"text {where}")
