"""Prepared images in the store: what they are, that they are made once, and what a training samples of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from small_models import make_backbone, write_pictures
from torch import Tensor
from torchvision import transforms as T

from air_plugin.clip import prepared_images
from air_plugin.clip.backbone import Backbone
from air_plugin.clip.features import FeatureTable
from air_plugin.clip.prepared_images import ImageTable, prepare_images
from air_plugin.clip.views import Views
from air_plugin.clip.visual_prompts import Normalise
from air_plugin.utils.errors import UserError
from air_plugin.utils.images import load_rgb
from air_plugin.utils.store import Store

AUGMENT = T.Compose(
    [
        T.RandomResizedCrop(16, scale=(0.3, 1.0)),
        T.RandomHorizontalFlip(),
        T.ToTensor(),
        T.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    ]
)


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared_images, "CHUNK", 3)


def table_of(backbone: Backbone, paths: list[str], store: Store, **options: object) -> ImageTable:
    return prepare_images(backbone, paths, store=store, **options)[0]  # type: ignore[arg-type]


def test_images_are_those_that_the_backbone_prepares(
    tiny_backbone: Backbone, pictures: list[str], store: Store, small_files: None
):
    table, cached = prepare_images(tiny_backbone, pictures, store=store)
    assert not cached and len(table) == 7 and table.views == 1
    expected = torch.stack([tiny_backbone.preprocess(load_rgb(path)) for path in pictures])
    assert torch.equal(Normalise(tiny_backbone)(table.plain.read()), expected)
    some = table.plain[torch.tensor([6, 0, 3, 3])][torch.tensor([1, 0, 2])]
    assert len(some) == 3 and torch.equal(Normalise(tiny_backbone)(some.read()), expected[[0, 6, 3]])
    assert [len(part) for part in table.plain.batches(4)] == [4, 3]
    assert torch.equal(torch.cat(list(table.plain.batches(2))), table.plain.read())
    assert [len(file) for file in table.files] == [3, 3, 1]


def test_views_are_those_of_feature_extraction(
    tiny_backbone: Backbone, pictures: list[str], store: Store, small_files: None
):
    table = table_of(tiny_backbone, pictures, store, views=4, augment=AUGMENT)
    views = Views(tiny_backbone.preprocess, AUGMENT, views=4, seed=0)
    for index, path in enumerate(pictures):
        made = views.read((index, path))
        for view in range(4):
            assert torch.equal(table.read(torch.tensor([index]), torch.tensor([view]))[0], torch.tensor(made[view]))


def test_they_are_made_once_and_anew_after_a_change(
    tiny_backbone: Backbone, pictures: list[str], store: Store, small_files: None
):
    prepare_images(tiny_backbone, pictures, store=store)
    assert prepare_images(tiny_backbone, pictures, store=store)[1]
    assert prepare_images(make_backbone(seed=3), pictures, store=store)[1]  # the weights make no difference
    assert not prepare_images(tiny_backbone, pictures[::-1], store=store)[1]
    assert not prepare_images(tiny_backbone, pictures, store=store, views=2, augment=AUGMENT)[1]
    other = T.Compose([T.Resize((16, 16)), *AUGMENT.transforms[2:]])
    changed = Backbone("tiny", tiny_backbone.model, other, tiny_backbone.tokenizer, 16, 77)
    assert not prepare_images(changed, pictures, store=store)[1]
    load_rgb(pictures[0]).rotate(90).save(pictures[0])
    assert not prepare_images(tiny_backbone, pictures, store=store)[1]


def test_an_interrupted_preparation_goes_on(
    tiny_backbone: Backbone,
    pictures: list[str],
    store: Store,
    small_files: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
):
    """After a kill only the images of unfinished files are decoded again, and the result is the same."""
    whole = table_of(tiny_backbone, pictures, Store(tmp_path / "undisturbed")).plain.read()
    read, seen = Views.read, []

    def stops(self: Views, place: tuple[int, str]) -> object:
        if place[0] == 5:
            raise KeyboardInterrupt
        return read(self, place)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Views, "read", stops)
        prepare_images(tiny_backbone, pictures, store=store)

    def counts(self: Views, place: tuple[int, str]) -> object:
        seen.append(place[0])
        return read(self, place)

    monkeypatch.setattr(Views, "read", counts)
    table, cached = prepare_images(tiny_backbone, pictures, store=store)
    assert seen == [3, 4, 5, 6] and not cached
    assert torch.equal(table.plain.read(), whole)


def test_workers_make_the_same_images(tiny_backbone: Backbone, pictures: list[str], store: Store, tmp_path: Path):
    one = table_of(tiny_backbone, pictures, store, views=3, augment=AUGMENT)
    other = table_of(tiny_backbone, pictures, Store(tmp_path / "other"), views=3, augment=AUGMENT, workers=2)
    assert torch.equal(torch.cat(list(one.files)), torch.cat(list(other.files)))


def test_unreadable_images_are_named_and_nothing_is_complete(tiny_backbone: Backbone, tmp_path: Path, store: Store):
    paths = write_pictures(tmp_path / "some", 3)
    for path in paths[:2]:
        os.truncate(path, 20)
    with pytest.raises(UserError, match=r"000\.png.*and 1 more.*001\.png.*; repair or remove it"):
        prepare_images(tiny_backbone, paths, store=store)
    for path, again in zip(paths[:2], write_pictures(tmp_path / "whole", 2), strict=True):
        Path(again).replace(path)
    assert len(table_of(tiny_backbone, paths, store)) == 3


def test_what_cannot_be_kept_as_bytes_is_refused(tiny_backbone: Backbone, pictures: list[str], store: Store):
    noisy = T.Compose([*AUGMENT.transforms, T.Lambda(lambda x: x + 1)])
    with pytest.raises(UserError, match="must end with normalize"):
        prepare_images(tiny_backbone, pictures, store=store, views=2, augment=noisy)
    with pytest.raises(UserError, match="there are no images"):
        prepare_images(tiny_backbone, [], store=store)


@pytest.mark.parametrize(("views", "count"), [(1, 1), (1, 2), (2, 2), (4, 1), (4, 2)])
def test_views_are_sampled_as_those_of_features(views: int, count: int):
    """With the same generator the same views are chosen, so (image, view) is the same in both kinds of table."""
    places = torch.arange(6 * views).reshape(6, views, 1)
    images = places.to(torch.uint8)[..., None, None].expand(-1, -1, 2, 2, 3).contiguous()
    index = torch.tensor([5, 0, 2])

    def chosen(table: ImageTable | FeatureTable) -> Tensor:
        found = table.sample(index, generator=torch.Generator().manual_seed(7), count=count)
        return found.flatten(2)[:, :, 0].long()

    found = chosen(ImageTable([images[:4], images[4:]]))
    assert torch.equal(found, chosen(FeatureTable(places.float())))
    assert torch.equal(found // views, index.expand(count, -1))
