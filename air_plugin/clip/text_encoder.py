"""The text tower of CLIP, from token embeddings to text features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from air_plugin.utils.errors import UserError


class TextEncoder(nn.Module):
    """The text tower of a CLIP model as a module of token embeddings, so that prompts can be learned (CoOp's name).

    Takes an open_clip model, or an OpenAI `clip` model as other trainers have it. A causal tower processes no token
    after the longest prompt's end of text: later tokens cannot change earlier ones, so the result is exact. SigLIP's
    tower is not causal and pools the last position, so it processes all tokens.

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
        return self(self.token_embedding(tokens), marks.argmax(dim=1))

    def forward(self, embeddings: Tensor, end: Tensor) -> Tensor:
        """Encode prompts.

        Args:
            embeddings: (T, L, W) token embeddings, without positions.
            end: (T,) position of each prompt's end-of-text token; a tower that pools the last token needs none.

        Returns:
            (T, D) text features, not normalised.
        """
        causal = self.attn_mask is not None and not self.pools_last
        length = int(end.max()) + 1 if causal else embeddings.shape[1]
        x = embeddings[:, :length].to(self.dtype) + self.positional_embedding[:length].to(self.dtype)
        mask = self.attn_mask[:length, :length] if self.attn_mask is not None else None
        x = self._read_sequence_first(x, mask) if self.sequence_first else self.transformer(x, attn_mask=mask)
        x = self.ln_final(x)
        pooled = x[:, -1] if self.pools_last else x[torch.arange(len(x), device=x.device), end]
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
