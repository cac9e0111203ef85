"""The cosine of an image and a text, also where an image has several vectors, as in BLIP-2.

An image of Q vectors is one row f = [q_1 .. q_Q] / sqrt(Q), with unit vectors q_1 .. q_Q of as many numbers D as a text
has. So f is a unit row of Q D numbers, and the product of two images is the mean cosine of their vectors of one place.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def cosines(images: Tensor, texts: Tensor) -> Tensor:
    """The cosine of each image and text; of several vectors of an image, the largest (BLIP-2, section 3.1).

    Args:
        images: (..., N, Q D), unit rows.
        texts: (..., C, D), unit rows.

    Returns:
        (..., N, C) f t, or sqrt(Q) max_q f_q t where Q is more than 1.

    Raises:
        ValueError: the length of an image's row is no multiple of a text's.

    Example:
        >>> cosines(torch.eye(2), torch.eye(2)[:1])
        tensor([[1.],
                [0.]])
    """
    count = vectors(images, texts)
    if count == 1:
        return images @ texts.mT
    # One vector after the other: all cosines at once would take Q times the memory.
    parts = (part @ texts.mT for part in images.split(texts.shape[-1], dim=-1))
    return functools.reduce(torch.maximum, parts) * count**0.5


def as_images(texts: Tensor, images: Tensor) -> Tensor:
    """Texts as rows in the space of images, whose product with an image is the mean cosine over its vectors.

    Args:
        texts: (C, D), unit rows.
        images: (N, Q D).

    Returns:
        (C, Q D), unit rows; the texts themselves where Q is 1.

    Raises:
        ValueError: see `cosines`.
    """
    count = vectors(images, texts)
    return texts if count == 1 else texts.repeat(1, count) / count**0.5


def vectors(images: Tensor, texts: Tensor) -> int:
    """Q, the number of vectors of an image."""
    count, rest = divmod(images.shape[-1], texts.shape[-1])
    if rest or not count:
        raise ValueError(f"features of images have {images.shape[-1]} numbers, and those of texts {texts.shape[-1]}")
    return count
