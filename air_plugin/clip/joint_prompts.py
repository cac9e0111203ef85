"""Prompts of both towers that one small network makes: multimodal prompts (UPT)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from air_plugin.clip.prompts import PromptLearner
from air_plugin.clip.visual_prompts import VisualPrompts
from air_plugin.utils.seeding import reseeding

if TYPE_CHECKING:
    from air_plugin.clip.shared_prefix import Layout

WIDTH = 128  # of the network


class Mixer(nn.Module):
    """One transformer layer with one head: x + attention(norm(x)), then x + mlp(norm(x)). Every token sees all."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(L, W) to (L, W)."""
        query, key, value = self.qkv(self.norm_1(x)).chunk(3, dim=1)
        x = x + self.out(F.scaled_dot_product_attention(query[None], key[None], value[None])[0])
        return x + self.mlp(self.norm_2(x))


class JointPrompts(nn.Module):
    """Text and visual prompts from one sequence of learned tokens (UPT: Zang et al. 2022, arXiv 2210.07225).

    The tokens of both kinds go through a linear layer to 128 numbers each, then together through `Mixer`, and each kind
    through a linear layer back to the width of its tower. All weights are trained. It takes the place of a
    `PromptLearner` and of `VisualPrompts`.

    Args:
        text: its context is the n text tokens. One context for all classes.
        visual: its tokens are the P visual ones.
        seed: of the initial weights, those of torch's layers.
    """

    def __init__(self, text: PromptLearner, visual: VisualPrompts, *, seed: int) -> None:
        super().__init__()
        self.text, self.visual = text, visual
        words, patches = text.ctx.shape[1], visual.tokens.shape[1]
        with reseeding() as start:
            start(seed)
            self.text_in, self.visual_in = nn.Linear(words, WIDTH), nn.Linear(patches, WIDTH)
            self.mixer = Mixer(WIDTH)
            self.text_out, self.visual_out = nn.Linear(WIDTH, words), nn.Linear(WIDTH, patches)
        self.to(visual.tokens.device)

    @property
    def length(self) -> int:
        """Of the longest prompt."""
        return self.text.length

    @property
    def layout(self) -> Layout | None:
        """See `PromptLearner`."""
        return self.text.layout

    def contexts(self) -> tuple[Tensor, Tensor]:
        """(n, W) context of the text tower and (P, W') tokens of the image tower."""
        joint = torch.cat([self.text_in(self.text.ctx), self.visual_in(self.visual.tokens)])
        text, visual = self.mixer(joint).split([len(self.text.ctx), len(self.visual.tokens)])
        return self.text_out(text), self.visual_out(visual)

    def packed(self) -> Tensor:
        """As `PromptLearner.packed`, with the network's context."""
        return self.text.packed(self.contexts()[0])

    def forward(self) -> tuple[Tensor, Tensor]:
        """As `PromptLearner.forward`, with the network's context."""
        return self.text(self.contexts()[0])

    def visual_tokens(self) -> Tensor:
        """(P, W') tokens of the image tower."""
        return self.contexts()[1]
