"""A model with the attribute names of OpenAI's `clip` package, as host trainers have it.

Its sequences come first, and every block holds its mask.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class HostBlock(nn.Module):
    def __init__(self, width: int, heads: int, mask: Tensor) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        layers = [("c_fc", nn.Linear(width, 4 * width)), ("gelu", QuickGELU()), ("c_proj", nn.Linear(4 * width, width))]
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.ln_2 = nn.LayerNorm(width)
        self.attn_mask = mask

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=self.attn_mask)[0]
        return x + self.mlp(self.ln_2(x))


class HostClip(nn.Module):
    """The text half of a CLIP."""

    def __init__(self, *, width: int = 32, heads: int = 2, layers: int = 2, length: int = 77, out: int = 24) -> None:
        super().__init__()
        mask = torch.full((length, length), float("-inf")).triu(1)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.Sequential(*(HostBlock(width, heads, mask) for _ in range(layers)))
        self.token_embedding = nn.Embedding(49408, width)
        self.positional_embedding = nn.Parameter(torch.empty(length, width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, out))
        self.logit_scale = nn.Parameter(torch.empty(()))

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.resblocks[0].attn.in_proj_weight.dtype

    def encode_text(self, tokens: Tensor) -> Tensor:
        x = (self.token_embedding(tokens) + self.positional_embedding).permute(1, 0, 2)
        x = self.ln_final(self.transformer.resblocks(x).permute(1, 0, 2))
        return x[torch.arange(len(x)), tokens.argmax(dim=1)] @ self.text_projection


def host_model(model: Any) -> HostClip:
    """The same weights in the other shape."""
    host = HostClip().requires_grad_(False).eval()
    wanted = host.state_dict()
    host.load_state_dict({name: value for name, value in model.state_dict().items() if name in wanted})
    return host
