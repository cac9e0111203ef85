"""Weights in 8 bits, for cards of 24 GB: half the memory of bf16, and no further package.

Why not torchao: its int8 tensors (0.18) cannot be viewed as bytes, so weights would have no fingerprint, by which the
store finds adapters and images again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Int8Linear(torch.nn.Linear):
    """A frozen linear layer whose weights are int8 with a scale for each row; it computes in the type of its input.

    w ~ q s,   s = max |w| / 127,   q = round(w / s)

    Args:
        layer: gives the weights and the bias.
    """

    def __init__(self, layer: torch.nn.Linear) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        weight = layer.weight.detach()
        largest = weight.float().abs().amax(dim=1, keepdim=True)
        scale = (largest / 127).clamp_min(torch.finfo(weight.dtype).tiny).to(weight.dtype)  # (rows, 1)
        rounded = (weight.float() / scale.float()).round().clamp(-127, 127)
        self.weight = torch.nn.Parameter(rounded.to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = layer.bias

    def forward(self, input: Tensor) -> Tensor:
        product: Tensor = _Product.apply(input, self.weight, self.scale)
        return product if self.bias is None else product + self.bias.to(product.dtype)


class _Product(torch.autograd.Function):
    """x w^T. The weights are made from 8 bits again in the backward pass, so that no layer keeps them until then."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return F.linear(x, weight.to(x.dtype) * scale.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        weight, scale = ctx.saved_tensors
        return gradient @ (weight.to(gradient.dtype) * scale.to(gradient.dtype)), None, None


def quantize(model: torch.nn.Module) -> int:
    """Replace the linear layers of a model's blocks by `Int8Linear`; returns how many.

    What is outside of the blocks (embeddings, first and last layers) keeps its type.
    """
    blocks = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    replaced = 0
    for parent in {id(part): part for block in blocks for part in block.modules()}.values():
        for name, layer in list(parent.named_children()):
            if type(layer) is torch.nn.Linear:
                setattr(parent, name, Int8Linear(layer))
                replaced += 1
    return replaced
