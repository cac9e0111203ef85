"""Text encoders that are too large to stay: on the device only while they encode, and each text is encoded once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor


@dataclass
class _Texts:
    """Of a pipeline: the encoders, by attribute, on the CPU; and what they made of each text, on the CPU."""

    encoders: dict[str, torch.nn.Module] = field(default_factory=dict)
    rows: dict[str | None, dict[str, Tensor]] = field(default_factory=dict)


_TEXTS: WeakKeyDictionary[Any, _Texts] = WeakKeyDictionary()


def take_off(pipeline: Any, names: Sequence[str]) -> None:
    """Move a pipeline's text encoders to the CPU and out of the pipeline, until `encode_each` needs them.

    Args:
        pipeline: of diffusers; its attributes become None, so that it is on one device as a whole.
        names: its attributes; those that are None already are left out.
    """
    texts = _TEXTS.setdefault(pipeline, _Texts())
    for name in names:
        if (encoder := getattr(pipeline, name, None)) is not None:
            texts.encoders[name] = encoder.to("cpu")
            setattr(pipeline, name, None)


@torch.no_grad()
def encode_each(
    pipeline: Any,
    texts: Sequence[str | None],
    names: Sequence[str],
    encode_one: Callable[[Any, str | None], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """Encode texts, each by itself and once in the pipeline's life: a row depends on its text alone, bit by bit.

    Args:
        pipeline: of diffusers, with its encoders or after `take_off`.
        texts: T texts, not all different; None is the empty prompt of guidance.
        names: the attributes of the encoders.
        encode_one: (1, ...) tensors of a text, by name.

    Returns:
        (T, ...) tensors by name, on the device of the pipeline's transformer.
    """
    held = _TEXTS.setdefault(pipeline, _Texts())
    missing = [text for text in dict.fromkeys(texts) if text not in held.rows]
    if missing:
        with _put_on(pipeline, names):
            for text in missing:
                held.rows[text] = {name: value.cpu() for name, value in encode_one(pipeline, text).items()}
    device = pipeline.transformer.device
    rows = [held.rows[text] for text in texts]
    return {name: torch.cat([row[name] for row in rows]).to(device) for name in rows[0]}


@contextmanager
def _put_on(pipeline: Any, names: Sequence[str]) -> Iterator[None]:
    """Context in which the pipeline has its text encoders, on the transformer's device."""
    take_off(pipeline, names)
    device = pipeline.transformer.device
    try:
        for name, encoder in _TEXTS[pipeline].encoders.items():
            setattr(pipeline, name, encoder.to(device))
        yield
    finally:
        take_off(pipeline, names)
        if device.type == "cuda":
            torch.cuda.empty_cache()
