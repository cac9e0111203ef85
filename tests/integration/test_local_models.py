"""Weights from a person's disk: the layouts that open_clip and diffusers save, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from air_plugin import mini
from air_plugin.clip.loading import load_backbone
from air_plugin.diffusion.pipeline import load_generator
from air_plugin.utils.errors import UserError

CONFIG = {
    "embed_dim": 128,
    "quick_gelu": True,
    "vision_cfg": {"layers": [1, 1, 1, 1], "width": 16, "head_width": 32, "image_size": 32},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 3},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The embedded CLIP as open_clip lays out a folder."""
    settings = {"model_cfg": CONFIG, "preprocess_cfg": {"mean": list(mini.MEAN), "std": list(mini.STD)}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(settings))
    save_file(mini.load_clip().state_dict(), tmp_path / "open_clip_model.safetensors")
    return tmp_path


def test_a_folder_of_open_clip_is_the_same_model(folder: Path) -> None:
    ours, theirs = load_backbone("mini"), load_backbone(str(folder))
    assert ours.fingerprint == theirs.fingerprint
    texts = ["a photo of the digit seven.", "a photo of a cat."]
    assert torch.allclose(ours.encode_texts(texts), theirs.encode_texts(texts), atol=1e-6)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(ours.encode_images(pixels), theirs.encode_images(pixels), atol=1e-6)


def test_overlong_text_is_refused_not_cut() -> None:
    backbone = load_backbone("mini")
    fits, overlong = "seven " * 30, "seven " * 31
    assert backbone.tokenize([fits]).shape == (1, 32)
    with pytest.raises(UserError, match="longer than the 32 tokens"):
        backbone.tokenize([overlong])


def test_pickles_and_missing_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_bytes(b"pickle")
    for name, said in (
        (f"RN50-quickgelu:{tmp_path}/weights.pt", "safetensors"),
        (f"RN50-quickgelu:{tmp_path}/none.safetensors", "missing"),
        (str(tmp_path), "missing"),
        ("ViT-B-32", "TAG"),
        ("VIT-B-33", "did you mean"),
    ):
        with pytest.raises(UserError, match=said):
            load_backbone(name)


def test_a_folder_of_diffusers_draws_the_same_images(tmp_path: Path) -> None:
    mini.load_pipeline().save_pretrained(tmp_path, safe_serialization=True)
    ours, theirs = load_generator("mini"), load_generator(str(tmp_path))
    assert ours.fingerprint == theirs.fingerprint
    generated = [
        generator.pipeline(
            ["a photo of the digit seven."],
            height=32,
            width=32,
            num_inference_steps=3,
            generator=[torch.Generator().manual_seed(0)],
            output_type="pt",
        ).images
        for generator in (ours, theirs)
    ]
    assert torch.allclose(generated[0], generated[1], atol=1e-5)


def test_unknown_generators_are_refused(tmp_path: Path) -> None:
    for name in ("minni", str(tmp_path)):
        with pytest.raises(UserError):
            load_generator(name)
