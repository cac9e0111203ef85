"""The largest entries of every row, with a rule for ties."""

from __future__ import annotations

import torch
from torch import Tensor


def largest(scores: Tensor, k: int) -> Tensor:
    """The k largest entries of every row, without a full sort and, unlike torch.topk, with a rule for ties.

    Args:
        scores: (R, N).
        k: 1 <= k <= N.

    Returns:
        (R, k) column indices by falling score; ties go to the lower index.
    """
    chosen = at_least(scores, scores.topk(k, dim=1).values[:, -1:], count=k)
    index = chosen.nonzero()[:, 1].view(-1, k)
    return index.gather(1, scores.gather(1, index).argsort(dim=1, descending=True, stable=True))


def at_least(values: Tensor, smallest: Tensor, *, count: Tensor | int) -> Tensor:
    """(R, N) bool: the `count` entries of each row that are at least `smallest`; ties go to the lower index.

    Args:
        values: (R, N).
        smallest: (R, 1), the smallest entry of each row that is to be marked.
        count: number of entries to mark, one for all rows or (R, 1).
    """
    chosen = values >= smallest
    count = torch.as_tensor(count, device=values.device).expand_as(smallest)
    crowded = (chosen.sum(dim=1) > count.squeeze(1)).nonzero().squeeze(1)  # ties of the smallest
    rows, least = values[crowded], smallest[crowded]
    larger, equal = rows > least, rows == least
    room = count[crowded] - larger.sum(dim=1, keepdim=True)
    chosen[crowded] = larger | (equal & (equal.cumsum(dim=1) <= room))
    return chosen
