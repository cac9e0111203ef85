"""Seeds that depend on their parts alone, and global random states that stay as they were."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def stable_seed(*parts: object) -> int:
    """A seed in [0, 2^63) that depends on the parts alone, on every machine."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@contextmanager
def randomness_kept() -> Iterator[None]:
    """Put the global random states of Python, NumPy and torch back afterwards: others draw what they would have drawn.

    Even an import may use them up (rich, which scikit-learn may import, calls `random`).
    """
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):  # named: by default several are warned of
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def member_seed(member: int) -> tuple[int, ...]:
    """What a member of an ensemble adds to the parts of a `stable_seed`; the first adds nothing, as if alone."""
    return (member,) if member else ()
