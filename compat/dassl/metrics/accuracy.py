"""Top-k accuracy."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def compute_accuracy(output: Tensor | Sequence[Tensor], target: Tensor, topk: Sequence[int] = (1,)) -> list[Tensor]:
    """How often the target is among the k highest outputs.

    Args:
        output: (N, C) scores, or a sequence that begins with them.
        target: (N,) class indices.
        topk: the values of k.

    Returns:
        One (1,) tensor for each k, in percent.
    """
    scores = output[0] if isinstance(output, (tuple, list)) else output
    assert isinstance(scores, Tensor)
    ranked = scores.topk(max(topk), dim=1).indices
    hits = ranked == target.view(-1, 1)  # (N, max k)
    return [hits[:, :k].float().sum().view(1) * (100.0 / len(target)) for k in topk]
