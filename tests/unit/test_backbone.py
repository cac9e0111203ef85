"""Backbones: what they encode, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from small_models import make_backbone, make_clip

from air_plugin.backbone import Backbone, load_backbone
from air_plugin.errors import UserError

TEXTS = ["a photo of a dog.", "cat"]


def write_folder(folder: Path) -> Path:
    """A small model as open_clip saves it."""
    config = {
        "embed_dim": 24,
        "quick_gelu": True,
        "vision_cfg": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    preprocess = {"size": 16, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    save_file(make_clip().state_dict(), folder / "open_clip_model.safetensors")
    return folder


def pixels() -> torch.Tensor:
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_features_are_unit_and_the_models_own(tiny_backbone: Backbone):
    images, texts = tiny_backbone.encode_images(pixels()), tiny_backbone.encode_texts(TEXTS)
    model = tiny_backbone.model
    assert torch.allclose(images, model.encode_image(pixels(), normalize=True), atol=1e-6)
    assert torch.allclose(texts, model.encode_text(tiny_backbone.tokenizer(TEXTS), normalize=True), atol=1e-6)
    assert torch.allclose(images.norm(dim=1), torch.ones(3)) and torch.allclose(texts.norm(dim=1), torch.ones(2))


def test_zero_shot_probabilities_are_clips(tiny_backbone: Backbone):
    images, texts = tiny_backbone.encode_images(pixels()), tiny_backbone.encode_texts(TEXTS)
    logits, _ = tiny_backbone.model.get_logits(pixels(), tiny_backbone.tokenizer(TEXTS))
    assert torch.allclose(tiny_backbone.text_probs(images, texts), logits.softmax(dim=1), atol=1e-5)


def test_text_is_never_cut_in_silence(tiny_backbone: Backbone):
    longest = " ".join(["dog"] * 75)  # with start and end 77
    assert tiny_backbone.tokenize([longest])[0].argmax() == 76
    for count in (76, 151, 152, 153, 400):
        with pytest.raises(UserError, match="longer than the 77 tokens of tiny"):
            tiny_backbone.tokenize(["cat", " ".join(["dog"] * count)])


def test_fingerprint_tells_weights_apart_and_not_names():
    one, same, other = make_backbone(), make_backbone(), make_backbone(seed=1)
    same.name = "another name"
    assert one.fingerprint == same.fingerprint != other.fingerprint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("models") / "tiny")


def test_a_local_folder_loads_frozen(folder: Path, tiny_backbone: Backbone):
    backbone = load_backbone(str(folder))
    assert backbone.image_size == 16 and backbone.context_length == 77
    assert not backbone.model.training and not any(p.requires_grad for p in backbone.model.parameters())
    assert torch.allclose(backbone.encode_texts(TEXTS), tiny_backbone.encode_texts(TEXTS), atol=1e-6)
    picture = Image.new("RGB", (20, 16), "red")
    assert torch.allclose(backbone.preprocess(picture)[:, 0, 0], torch.tensor([1.0, -1.0, -1.0]))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_gives_nearly_the_same_features(folder: Path, tiny_backbone: Backbone, precision: str):
    backbone = load_backbone(str(folder), precision=precision)
    for ours, exact in (
        (backbone.encode_texts(TEXTS), tiny_backbone.encode_texts(TEXTS)),
        (backbone.encode_images(pixels()), tiny_backbone.encode_images(pixels())),
    ):
        assert ours.dtype == torch.float32
        assert torch.allclose(ours, exact, atol=0.03) and not torch.equal(ours, exact)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("RN-50", "did you mean"),
        ("vit_b_32", "did you mean"),
        ("nothing of the kind", "unknown backbone"),
        ("ViT-B-32", "openai"),
        ("ViT-B-32:no_such_tag", "openai"),
        ("ViT-B-32:weights.safetensors", "missing"),
        ("some/folder", "no folder"),
        ("weights.pt", "no folder"),
    ],
)
def test_bad_names_are_errors_for_people(name: str, said: str):
    with pytest.raises(UserError, match=said) as raised:
        load_backbone(name)
    assert "\n" not in str(raised.value)


def test_pickles_are_refused(tmp_path: Path):
    pickle = tmp_path / "weights.pt"
    torch.save(make_clip().state_dict(), pickle)
    with pytest.raises(UserError, match="pickle"):
        load_backbone(f"ViT-B-32:{pickle}")
    write_folder(tmp_path / "folder")
    (tmp_path / "folder" / "open_clip_model.safetensors").rename(tmp_path / "folder" / "open_clip_pytorch_model.bin")
    with pytest.raises(UserError, match="missing"):
        load_backbone(str(tmp_path / "folder"))


def test_weights_of_another_architecture_are_an_error(folder: Path):
    with pytest.raises(UserError, match="cannot be loaded"):
        load_backbone(f"ViT-B-32:{folder / 'open_clip_model.safetensors'}")


def test_unknown_precision_is_an_error():
    with pytest.raises(UserError, match="fp15"):
        load_backbone("mini", precision="fp15")
