"""The text tower of CLIP, from token embeddings to text features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from air_plugin.clip.shared_prefix import Layout, is_plain, run_blocks
from air_plugin.utils.errors import UserError


class TextEncoder(nn.Module):
    """The text tower of a CLIP model as a module of token embeddings, so that prompts can be learned (CoOp's name).

    Takes an open_clip model, or an OpenAI `clip` model as other trainers have it. A causal tower processes no token
    after the longest prompt's end of text: later tokens cannot change earlier ones, so the result is exact. Tokens with
    which all prompts begin are computed once, see `layout`. SigLIP's tower is not causal and pools the last position,
    so it processes all tokens.

    Raises:
        UserError: the model's text tower is of another kind.
    """

    attn_mask: Tensor | None

    def __init__(self, model: Any) -> None:
        super().__init__()
        text = getattr(model, "text", model)
        if not hasattr(text, "token_embedding") or getattr(text, "cls_emb", None) is not None:
            raise UserError(f"text towers like {type(text).__name__} of this model are not supported; take CLIP's own")
        self.transformer: Any = text.transformer
        self.ln_final: nn.Module = text.ln_final
        self.token_embedding: nn.Embedding = text.token_embedding
        self.positional_embedding: Tensor = text.positional_embedding
        self.text_projection: Any = text.text_projection
        blocks = self.transformer.resblocks
        self.sequence_first = hasattr(blocks[0], "attn_mask")  # OpenAI's blocks hold the mask
        mask = blocks[0].attn_mask if self.sequence_first else text.attn_mask
        self.register_buffer("attn_mask", mask, persistent=False)
        pool = getattr(text, "pool_type", getattr(text, "text_pool_type", "argmax"))
        if pool not in ("argmax", "eos", "last"):
            raise UserError(f"text towers that pool by '{pool}' are not supported")
        self.pools_last = pool == "last"
        # "argmax": the end of a text is its largest token; "eos": its first one with that id.
        self.end_token = getattr(text, "eos_id", getattr(text, "text_eos_id", None)) if pool == "eos" else None

    @property
    def dtype(self) -> torch.dtype:
        """Type of the tower's computations."""
        # open_clip keeps layer norms, the first parameters, in fp32 at every precision.
        return next(self.transformer.resblocks[0].mlp.parameters()).dtype

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """(T, L) token ids to (T, D) features, not normalised."""
        marks = tokens if self.end_token is None else (tokens == self.end_token).int()
        end = marks.argmax(dim=1)
        layout = self.layout(end.tolist(), prefix=_common(tokens, end))
        if layout is None:
            return self(self.token_embedding(tokens), end)
        return self.encode_packed(self.token_embedding(tokens.flatten()[layout.source])[None], layout)

    def layout(self, ends: Sequence[int], *, prefix: int) -> Layout | None:
        """How `encode_packed` takes prompts with a common beginning; None where only `forward` encodes them.

        It does where later tokens cannot change earlier ones, and where the blocks are CLIP's own.

        Args:
            ends: position of each prompt's end-of-text token.
            prefix: number of tokens with which all prompts begin, at most the smallest of the ends; 0 is none.
        """
        blocks, mask = list(self.transformer.resblocks), self.attn_mask
        if not prefix or mask is None or self.pools_last or getattr(self.transformer, "grad_checkpointing", False):
            return None
        known = self.sequence_first or {type(block).__name__ for block in blocks} == {"ResidualAttentionBlock"}
        hooked = self.transformer._forward_hooks or self.transformer._forward_pre_hooks
        causal = torch.full_like(mask, -torch.inf).triu(1)
        if not known or hooked or not torch.equal(mask, causal) or not all(map(is_plain, blocks)):
            return None
        return Layout(ends, prefix=prefix, length=len(self.positional_embedding)).to(mask.device)

    def encode_packed(self, embeddings: Tensor, layout: Layout) -> Tensor:
        """Encode E sets of T prompts, each set with a common beginning.

        Args:
            embeddings: (E, N, W) embeddings of the N tokens that `layout.source` names, without positions.
            layout: of the T prompts, the same for every set.

        Returns:
            (E * T, D) text features, not normalised.
        """
        x = embeddings.to(self.dtype) + self.positional_embedding[layout.position].to(self.dtype)
        return self._project(self.ln_final(run_blocks(self.transformer.resblocks, x, layout)).flatten(0, 1))

    def forward(self, embeddings: Tensor, end: Tensor, *, length: int | None = None) -> Tensor:
        """Encode prompts.

        Args:
            embeddings: (T, L, W) token embeddings, without positions.
            end: (T,) position of each prompt's end-of-text token; a tower that pools the last token needs none.
            length: of the longest prompt with its end-of-text token; by default it is read from `end`, for which the
                host waits for the device.

        Returns:
            (T, D) text features, not normalised.
        """
        causal = self.attn_mask is not None and not self.pools_last
        if not causal:
            length = embeddings.shape[1]
        elif length is None:
            length = int(end.max()) + 1
        x = embeddings[:, :length].to(self.dtype) + self.positional_embedding[:length].to(self.dtype)
        mask = self.attn_mask[:length, :length] if self.attn_mask is not None else None
        x = self._read_sequence_first(x, mask) if self.sequence_first else self.transformer(x, attn_mask=mask)
        x = self.ln_final(x)
        pooled = x[:, -1] if self.pools_last else x[torch.arange(len(x), device=x.device), end]
        return self._project(pooled)

    def _project(self, pooled: Tensor) -> Tensor:
        projection = self.text_projection
        if projection is None:
            return pooled
        return projection(pooled) if isinstance(projection, nn.Module) else pooled @ projection

    def _read_sequence_first(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """OpenAI's blocks with a mask of this length; the mask that they hold is not changed."""
        x = x.transpose(0, 1)  # (T, L, W) -> (L, T, W)
        mask = None if mask is None else mask.to(x)
        for block in self.transformer.resblocks:
            normed = block.ln_1(x)
            x = x + block.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
            x = x + block.mlp(block.ln_2(x))
        return x.transpose(0, 1)


def end_positions(tokens: Tensor, end: int, *, missing: int) -> Tensor:
    """(T, L) token ids to the (T,) positions of the first token `end`; `missing` where there is none."""
    hits = torch.eq(tokens, end)
    return torch.where(hits.any(dim=1), hits.int().argmax(dim=1), missing)


def _common(tokens: Tensor, end: Tensor) -> int:
    """Number of tokens before their ends with which all of (T, L) texts begin."""
    if not len(tokens):
        return 0
    same = (tokens == tokens[0]).all(dim=0).int().cumprod(dim=0).sum()
    return int(torch.minimum(same, end.min()))
