"""Which images the adapter is trained on, and with which captions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from air_plugin.config import LoraSettings
from air_plugin.diffusion.captions import choose_captions

PROBS = torch.tensor([[0.7, 0.3], [0.9, 0.1], [0.4, 0.6], [0.8, 0.2], [0.45, 0.55]])
NAMES = ["crop_land", "sea"]


def test_confident_captions_are_of_the_most_confident_images_of_each_class():
    settings = LoraSettings(captions="confident", per_class=2)
    index, captions = choose_captions(PROBS, NAMES, "a photo of {}.", settings)
    sea, crop = "a photo of sea.", "a photo of crop land."
    assert (index, captions) == ([1, 2, 3, 4], [crop, sea, crop, sea])


def confident_images_slowly(probs: Tensor, k: int) -> list[int]:
    """Reference: of the images to which as many are equal or below as above, the k most confident of every class that
    has at least half of N / 2C of them."""
    best = [max(row) for row in probs.tolist()]
    confident = [i for i in range(len(best)) if sum(b > best[i] for b in best) <= sum(b <= best[i] for b in best)]
    chosen = []
    for c in range(probs.shape[1]):
        members = [i for i in confident if probs[i].tolist().index(best[i]) == c]
        if len(members) >= len(best) / (2 * probs.shape[1]) / 2:
            chosen += sorted(members, key=lambda i: -best[i])[:k]
    return sorted(chosen)


@pytest.mark.parametrize(("images", "k"), [(40, 3), (41, 8), (40, 40), (1, 5)])
@pytest.mark.parametrize("leaning", [0.0, 3.0])
def test_captions_above_the_median_are_those_of_a_loop(images: int, k: int, leaning: float):
    lean = leaning * torch.tensor([1.0, 0.5, 0.0, -0.5])
    probs = (3 * torch.randn(images, 4, generator=torch.Generator().manual_seed(images)) + lean).softmax(dim=1)
    settings = LoraSettings(captions="above_median", per_class=k)
    index, captions = choose_captions(probs, list("abcd"), "{}", settings)
    assert index == confident_images_slowly(probs, k)
    assert captions == ["abcd"[c] for c in probs[index].argmax(dim=1)]


def test_a_class_with_few_confident_images_has_no_caption_even_where_these_are_the_most_confident():
    probs = torch.full((20, 2), 0.1)
    probs[:18, 0] = torch.linspace(0.85, 0.95, 18)
    probs[18:, 1] = torch.tensor([0.99, 0.98])  # 2 of the 10 above the median; an even share is 5, half of it 2.5
    settings = LoraSettings(captions="above_median", per_class=20)
    assert set(choose_captions(probs, NAMES, "{}", settings)[1]) == {"crop land"}
    probs[17] = torch.tensor([0.03, 0.97])
    assert set(choose_captions(probs, NAMES, "{}", settings)[1]) == {"crop land", "sea"}


def test_a_complete_set_with_even_confidence_loses_no_class_to_the_bound():
    probs = torch.tensor([[0.8, 0.2], [0.2, 0.8]]).repeat(6, 1)
    index, _ = choose_captions(probs, NAMES, "{}", LoraSettings(captions="above_median", per_class=4))
    assert index == list(range(8))


def test_a_class_below_the_median_has_no_caption():
    probs = torch.tensor([[0.9, 0.1], [0.95, 0.05], [0.8, 0.2], [0.45, 0.55], [0.4, 0.6]])
    index, captions = choose_captions(probs, NAMES, "{}", LoraSettings(captions="above_median", per_class=2))
    assert (index, captions) == ([0, 1], ["crop land"] * 2)
    index, _ = choose_captions(probs, NAMES, "{}", LoraSettings(captions="confident", per_class=2))
    assert index == [0, 1, 3, 4]


def test_all_images_with_their_pseudo_labels():
    index, captions = choose_captions(PROBS, NAMES, "{}", LoraSettings(captions="all"))
    assert (index, captions) == ([0, 1, 2, 3, 4], ["crop land", "crop land", "sea", "crop land", "sea"])


def test_one_generic_caption():
    index, captions = choose_captions(PROBS, NAMES, "{}", LoraSettings(captions="generic", generic="a photo."))
    assert (index, captions) == ([0, 1, 2, 3, 4], ["a photo."] * 5)
