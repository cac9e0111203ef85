"""An image tower that computes in half precision: when it does, how near it is, and what is kept apart from fp32.

On the CPU nothing does so by itself; autocast is set by hand here, and torch's own works on the CPU, too.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from air_plugin.auxiliary.stages import make_prototypes
from air_plugin.clip import loading
from air_plugin.clip.backbone import Backbone
from air_plugin.clip.features import extract_features
from air_plugin.clip.loading import load_backbone
from air_plugin.config import AirSettings, own_config
from air_plugin.utils.errors import UserError
from air_plugin.utils.store import Store

HALF = [torch.bfloat16, torch.float16]


def with_autocast(backbone: Backbone, kind: torch.dtype | None) -> Backbone:
    return dataclasses.replace(backbone, autocast=kind)


@pytest.mark.parametrize(
    ("device", "capability", "expected"),
    [("cpu", None, None), ("cuda", (9, 0), torch.float16), ("cuda:1", (7, 0), torch.float16), ("cuda", (6, 1), None)],
)
def test_fp16_is_for_gpus_with_tensor_cores(
    device: str, capability: tuple[int, int] | None, expected: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
):
    def ask(asked: torch.device) -> tuple[int, int] | None:
        assert asked == torch.device(device)
        return capability

    monkeypatch.setattr(torch.cuda, "get_device_capability", ask)
    assert loading.fast_half(torch.device(device)) is expected


def test_it_can_be_turned_off_and_is_for_fp32_weights_only(monkeypatch: pytest.MonkeyPatch):
    assert load_backbone("mini").autocast is None  # on the CPU
    monkeypatch.setattr(loading, "fast_half", lambda device: torch.float16)
    assert load_backbone("mini").autocast is torch.float16
    assert load_backbone("mini", autocast=False).autocast is None
    assert load_backbone("mini", precision="bf16").autocast is None


@pytest.mark.parametrize("kind", HALF)
def test_features_are_near_those_in_fp32_and_texts_are_the_same(tiny_backbone: Backbone, kind: torch.dtype):
    half = with_autocast(tiny_backbone, kind)
    pixels = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    features, exact = half.encode_images(pixels), tiny_backbone.encode_images(pixels)
    assert features.dtype == torch.float32
    assert torch.allclose(features.norm(dim=1), torch.ones(5), atol=1e-6)
    distance = (features - exact).abs().max()
    assert 0 < distance < {torch.bfloat16: 2e-2, torch.float16: 2e-3}[kind]
    texts = ["a dog", "a cat"]
    assert torch.equal(half.encode_texts(texts), tiny_backbone.encode_texts(texts))


def test_its_tables_are_kept_apart(tiny_backbone: Backbone, store: Store, pictures: list[str]):
    def extract(backbone: Backbone) -> tuple[torch.Tensor, bool]:
        table, cached = extract_features(backbone, pictures, store=store)
        return table.features, cached

    exact, _ = extract(tiny_backbone)
    half, cached = extract(with_autocast(tiny_backbone, torch.bfloat16))
    assert not cached and not torch.equal(half, exact)
    again, cached = extract(with_autocast(tiny_backbone, torch.bfloat16))
    assert cached and torch.equal(again, half)
    again, cached = extract(tiny_backbone)
    assert cached and torch.equal(again, exact)
    marks = [json.loads(path.read_text()) for path in store.root.rglob("entry.json")]
    keys = sorted(mark["settings"].get("autocast", "none") for mark in marks)
    assert keys == ["none", "torch.bfloat16"]


def test_the_key_of_a_table_in_fp32_is_that_of_version_0_1(tiny_backbone: Backbone, store: Store, pictures: list[str]):
    """Tables that were made before are found."""
    extract_features(tiny_backbone, pictures, store=store)
    (mark,) = store.root.rglob("entry.json")
    settings = json.loads(mark.read_text())["settings"]
    assert sorted(settings) == ["augment", "backbone", "dtype", "images", "plain", "recipe", "seed", "views"]
    assert settings["dtype"] == "torch.float32" and settings["recipe"] == 3


def test_its_prototypes_are_kept_apart(tiny_backbone: Backbone, store: Store, pictures: list[str]):
    cfg = own_config(0)
    cfg.AIR.M, cfg.AIR.K = 3, 2
    generator: Any = SimpleNamespace(fingerprint="of a generator")

    def prototypes(backbone: Backbone) -> Any:
        images = [Path(path) for path in pictures[:6]]
        options = {"settings": AirSettings.from_cfg(cfg), "store": store, "generator": generator, "adapter": None}
        return make_prototypes(backbone, ["dog", "cat"], images, **options)

    exact, half = prototypes(tiny_backbone), prototypes(with_autocast(tiny_backbone, torch.bfloat16))
    assert not half.cached and half.key != exact.key and not torch.equal(half.features, exact.features)
    assert torch.equal(half.features, half.generated.gather(1, half.kept[..., None].expand(-1, -1, 24)))
    again = prototypes(tiny_backbone)
    assert again.cached and again.key == exact.key and torch.equal(again.features, exact.features)


def test_an_overflow_is_an_error_and_leaves_nothing(store: Store, pictures: list[str]):
    backbone = load_backbone("mini")
    with torch.no_grad():
        next(weight for weight in backbone.model.visual.parameters() if weight.ndim == 4).mul_(1e8)
    with pytest.raises(UserError, match=r"mini overflows in float16; .*TRAINER\.PROMPT\.AUTOCAST False"):
        extract_features(with_autocast(backbone, torch.float16), pictures, store=store)
    assert not list(store.root.rglob("entry.json")) and not list(store.root.rglob("*.safetensors"))
