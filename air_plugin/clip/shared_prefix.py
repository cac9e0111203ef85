"""Prompts that begin with the same tokens: the tower computes these tokens once, and for each prompt its own tokens.

In a causal tower the hidden states of a token depend on the tokens before it alone. Prompts with one context for all
classes, "[start] v_1 .. v_n name_c . [end]", therefore share the states of the first 1 + n tokens, and the end token of
each prompt gives the same feature, with the same gradient, whether those are computed once or once a class. Language
models use the same idea: Prefix Grouper (arXiv 2506.05433) and arXiv 2410.20305.

All prompts lie in one sequence: P tokens of the prefix, then R rows of S tokens, which hold the prompts' own tokens one
after another. Norms, linear layers and MLPs process this sequence, which has almost no padding. Attention processes
the rows, each with the prefix in front, under a mask: a token sees the prefix and the tokens before it of its prompt.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

ROW = 128  # own tokens a row, about; more is less copying of the prefix, and more attention between strange prompts
BLOCK_PARTS = {"ln_1", "attn", "ln_2", "mlp", "ls_1", "ls_2"}


class Layout(nn.Module):
    """Where the tokens of T prompts are in the sequence of P + R * S tokens.

    source: (P + R * S,) index of each token in the flattened (T, L) prompts; padding repeats the first token.
    position: (P + R * S,) position of each token in its prompt.
    mask: (R, 1, P + S, P + S) bool, whether a token (second to last axis) sees another one (last axis).
    end: (T,) index of the end tokens in the sequence.
    queries, end_mask, slot: the end tokens row by row, M a row: (R * M,) their index in the sequence, (R, 1, M, P + S)
        what they see, and the (T,) index of each prompt's end token among the R * M.
    """

    source: Tensor
    position: Tensor
    mask: Tensor
    end: Tensor
    queries: Tensor
    end_mask: Tensor
    slot: Tensor

    def __init__(self, ends: Sequence[int], *, prefix: int, length: int) -> None:
        """Lay prompts out.

        Args:
            ends: position of each prompt's end token, at least `prefix`.
            prefix: P, number of tokens with which all prompts begin.
            length: L, of the prompts with their padding.
        """
        super().__init__()
        self.prefix = prefix
        rows = _fill_rows([end + 1 - prefix for end in ends])
        width = max(sum(ends[prompt] + 1 - prefix for prompt in row) for row in rows)
        most = max(len(row) for row in rows)
        self.rows = len(rows)
        source, position = list(range(prefix)), list(range(prefix))
        owner = torch.full((len(rows), prefix + width), -1)  # -1 is the prefix, -2 - i is the i-th token of the padding
        queries, end, slot = [0] * (len(rows) * most), [0] * len(ends), [0] * len(ends)
        for number, row in enumerate(rows):
            for place, prompt in enumerate(row):
                first = len(source)
                own = range(prefix, ends[prompt] + 1)
                source += [prompt * length + index for index in own]
                position += own
                begin = first - number * width
                owner[number, begin : begin + len(own)] = prompt
                end[prompt], slot[prompt] = first + len(own) - 1, number * most + place
                queries[slot[prompt]] = end[prompt]
            padding = prefix + (number + 1) * width - len(source)
            if padding:
                owner[number, -padding:] = -2 - torch.arange(padding)
            source += [0] * padding
            position += [0] * padding
        mask = ((owner[:, :, None] == owner[:, None]) | (owner[:, None] == -1)).tril()
        within = torch.tensor(queries).view(len(rows), most) - torch.arange(len(rows))[:, None] * width
        end_mask = mask.gather(1, within.clamp(min=0)[..., None].expand(-1, -1, prefix + width))
        for name, values in (
            ("source", source),
            ("position", position),
            ("mask", mask[:, None]),
            ("end", end),
            ("queries", queries),
            ("end_mask", end_mask[:, None]),
            ("slot", slot),
        ):
            self.register_buffer(name, torch.as_tensor(values), persistent=False)

    def to_rows(self, x: Tensor) -> Tensor:
        """(E, P + R * S, W) to (E * R, P + S, W), each row with the prefix in front."""
        if self.rows == 1:
            return x
        prefix = x[:, None, : self.prefix].expand(-1, self.rows, -1, -1)
        return torch.cat([prefix, x[:, self.prefix :].unflatten(1, (self.rows, -1))], dim=2).flatten(0, 1)

    def from_rows(self, x: Tensor) -> Tensor:
        """(E * R, P + S, W) to (E, P + R * S, W); every row has the same prefix."""
        if self.rows == 1:
            return x
        x = x.unflatten(0, (-1, self.rows))
        return torch.cat([x[:, 0, : self.prefix], x[:, :, self.prefix :].flatten(1, 2)], dim=1)


def _fill_rows(lengths: Sequence[int]) -> list[list[int]]:
    """Distribute prompts over about sum / ROW rows: the longest first, always into the emptiest row."""
    filled = [(0, row) for row in range(-(-sum(lengths) // ROW))]
    rows: list[list[int]] = [[] for _ in filled]
    for prompt in sorted(range(len(lengths)), key=lambda prompt: -lengths[prompt]):
        used, row = heapq.heappop(filled)
        rows[row].append(prompt)
        heapq.heappush(filled, (used + lengths[prompt], row))
    return [sorted(row) for row in rows if row]


def is_plain(block: nn.Module) -> bool:
    """Whether a block is CLIP's own, x + attn(ln_1(x)), x + mlp(ln_2(x)), so that `run_block` computes the same.

    Blocks with other parts, with other attention, with dropout, or with hooks that expect whole prompts are not.
    """
    parts = dict(block.named_children())
    attn = parts.get("attn")
    hooked = any(part._forward_hooks or part._forward_pre_hooks for part in (block, attn) if part is not None)
    return (
        type(attn) is nn.MultiheadAttention
        and {"ln_1", "ln_2", "mlp"} <= set(parts) <= BLOCK_PARTS
        and attn._qkv_same_embed_dim
        and attn.bias_k is None
        and not (attn.add_zero_attn or attn.dropout or hooked)
    )


def run_blocks(blocks: Sequence[Any], x: Tensor, layout: Layout) -> Tensor:
    """(E, P + R * S, W) input of the first block to the (E, T, W) output of the last one at the end tokens.

    E sets of prompts have one layout, each with a prefix of its own.
    """
    members = len(x)
    mask = _additive(layout.mask, x, members)
    for block in blocks[:-1]:
        qkv = linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias)
        x = residuals(block, x, layout.from_rows(attention(block.attn, layout.to_rows(qkv), mask)))
    block, width = blocks[-1], x.shape[2]
    normed = block.ln_1(x)
    weight, bias = block.attn.in_proj_weight, block.attn.in_proj_bias
    keys = layout.to_rows(linear(normed, weight[width:], None if bias is None else bias[width:]))
    queries = linear(normed.index_select(1, layout.queries), weight[:width], None if bias is None else bias[:width])
    queries = queries.unflatten(1, (layout.rows, -1)).flatten(0, 1)  # (E * R, M, W)
    seen = attention(block.attn, keys, _additive(layout.end_mask, x, members), queries)
    seen = seen.unflatten(0, (members, -1)).flatten(1, 2).index_select(1, layout.slot)  # (E, R * M, W) to (E, T, W)
    return residuals(block, x.index_select(1, layout.end), seen)


def _additive(mask: Tensor, x: Tensor, members: int) -> Tensor:
    """A mask as numbers to add to the attention's logits."""
    return (
        torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_fill(~mask, -torch.inf).repeat(members, 1, 1, 1)
    )


def attention(attn: Any, projected: Tensor, mask: Tensor | None, queries: Tensor | None = None) -> Tensor:
    """Attention of B rows without its output projection: (B, N, 3 W), or (B, N, 2 W) and (B, M, W) queries."""
    heads = projected.unflatten(2, (-1, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4).unbind()
    query = heads[0] if queries is None else queries.unflatten(2, (attn.num_heads, -1)).transpose(1, 2)
    out = scaled_dot_product_attention(query, heads[-2], heads[-1], attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


def residuals(block: Any, x: Tensor, seen: Tensor) -> Tensor:
    """What follows the attention in a block, token by token."""
    seen = linear(seen, block.attn.out_proj.weight, block.attn.out_proj.bias)
    x = x + (block.ls_1(seen) if hasattr(block, "ls_1") else seen)
    changed = block.mlp(block.ln_2(x))
    return x + (block.ls_2(changed) if hasattr(block, "ls_2") else changed)
