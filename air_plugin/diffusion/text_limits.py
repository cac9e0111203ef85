"""Texts of a generator: every one must fit into every text tower, since a pipeline cuts longer ones in silence."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from air_plugin.diffusion.families import family_of
from air_plugin.utils.errors import UserError

TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
NO_LIMIT = 10**6  # tokens; transformers writes a number beyond all bounds where a tokenizer has no limit


def require_fit(pipeline: Any, texts: Iterable[str]) -> None:
    """Check that no text is longer than a text tower.

    Args:
        pipeline: of diffusers; each of its tokenizers is asked, with its own limit (77 tokens of CLIP's, start and end
            included).
        texts: prompts and captions.

    Raises:
        UserError: a text is too long; the message names it.
    """
    distinct = list(dict.fromkeys(texts))
    longest = family_of(pipeline).longest_text(pipeline) or NO_LIMIT + 1
    for tokenizer in (getattr(pipeline, name, None) for name in TOKENIZERS):
        limit = min(getattr(tokenizer, "model_max_length", None) or NO_LIMIT + 1, longest)
        if tokenizer is None or limit > NO_LIMIT or not distinct:
            continue
        # verbose: else transformers warns about long texts, which this function is for
        for text, tokens in zip(distinct, tokenizer(distinct, verbose=False).input_ids, strict=True):
            if len(tokens) > limit:
                raise UserError(
                    f"the text '{text}' has {len(tokens)} tokens, but the generator's text tower takes {limit} and "
                    "would leave out the rest; shorten AIR.PROMPT, AIR.LORA.GENERIC or the class name"
                )
