"""Reproducible seeds, and protection of the global random states."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch


def stable_seed(*parts: object) -> int:
    """A seed in [0, 2^63) that depends only on the parts, on every machine: the first 63 bits of their SHA-256."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@contextmanager
def randomness_kept() -> Iterator[None]:
    """Restore the global random states of Python, NumPy and torch afterwards, so that other code is not affected.

    Even an import may change them (rich, which scikit-learn may import, calls `random`).
    """
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(
            devices=range(torch.cuda.device_count())
        ):  # by default it warns where there are several
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def reseeding() -> Iterator[Callable[[int], None]]:
    """Seed the global generators of Python, NumPy and torch (CPU) as often as needed; afterwards they are as before.

    Transforms of images use all three: torchvision's torch, Dassl's Random2DTranslation Python's.

    Yields:
        A function that seeds all three.
    """
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield _seed
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)  # torch.manual_seed changes GPUs' generators, too
    random.seed(seed)
    np.random.seed(seed % 2**32)


def member_seed(member: int) -> tuple[int, ...]:
    """The further parts of a member's `stable_seed`; the first member has none, and so the seed of a single model."""
    return (member,) if member else ()
