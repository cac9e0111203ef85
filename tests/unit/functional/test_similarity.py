"""Cosines of images and texts, against loops over the vectors of an image."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from air_plugin.functional.similarity import as_images, cosines

SIZE, VECTORS = 6, 4


def rows(*shape: int, seed: int) -> Tensor:
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def several(count: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(N, Q, D) unit vectors and the same as rows."""
    parts = rows(count, VECTORS, SIZE, seed=seed)
    return parts, parts.flatten(1) / math.sqrt(VECTORS)


def test_of_several_vectors_the_largest_cosine_counts():
    parts, images = several(7)
    texts = rows(3, SIZE, seed=1)
    found = cosines(images, texts)
    for i, image in enumerate(parts):
        for c, text in enumerate(texts):
            assert found[i, c] == pytest.approx(max(float(vector @ text) for vector in image), abs=1e-6)
    assert torch.allclose(images.norm(dim=1), torch.ones(7))


def test_one_vector_is_the_product_bit_for_bit():
    images, texts = rows(7, SIZE, seed=0), rows(3, SIZE, seed=1)
    assert torch.equal(cosines(images, texts), images @ texts.T)


def test_leading_dimensions_are_those_of_an_ensemble():
    images = torch.stack([several(5, seed=seed)[1] for seed in (0, 1)])
    texts = torch.stack([rows(3, SIZE, seed=seed) for seed in (2, 3)])
    found = cosines(images, texts)
    assert torch.equal(found, torch.stack([cosines(a, b) for a, b in zip(images, texts, strict=True)]))
    assert torch.equal(cosines(images[0], texts)[1], cosines(images[0], texts[1]))  # one set of images, two of texts


def test_a_text_among_images_has_the_mean_cosine():
    parts, images = several(7)
    texts = rows(3, SIZE, seed=1)
    anchors = as_images(texts, images)
    assert torch.allclose(images @ anchors.T, torch.einsum("nqd,cd->nqc", parts, texts).mean(dim=1), atol=1e-6)
    assert torch.allclose(anchors.norm(dim=1), torch.ones(3))
    assert as_images(texts, texts) is texts


def test_lengths_that_do_not_fit_are_an_error():
    for width in (SIZE - 1, SIZE + 1, 2 * SIZE + 1):
        with pytest.raises(ValueError, match=f"have {width} numbers, and those of texts {SIZE}"):
            cosines(rows(2, width, seed=0), rows(2, SIZE, seed=1))
