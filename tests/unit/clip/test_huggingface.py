"""Backbones of transformers: their features are transformers' own, prompts are learned in any text tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_folders import KINDS, small_naflex, write_folder
from PIL import Image
from small_backbones import own_forward, small_backbone

from air_plugin.clip.backbone import Backbone
from air_plugin.clip.loading import load_backbone
from air_plugin.clip.prompts import PromptedCLIP, PromptLearner
from air_plugin.functional.similarity import cosines
from air_plugin.utils.errors import UserError

TEXTS = ["a photo of a dog.", "cat", "annual crop land"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    root = tmp_path_factory.mktemp("hf")
    return {kind: (root / kind, write_folder(root / kind, kind)) for kind in KINDS}


def unit(found: Any) -> torch.Tensor:
    return torch.nn.functional.normalize(getattr(found, "pooler_output", found), dim=1)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("blip2", "siglip2_naflex")])
def test_features_are_those_of_transformers(kind: str, folders: dict[str, tuple[Path, Any]]):
    from transformers import AutoImageProcessor, AutoTokenizer

    folder, model = folders[kind]
    backbone = load_backbone(f"hf:{folder}")
    picture = Image.effect_noise((47, 40), 90).convert("RGB")
    pixels = AutoImageProcessor.from_pretrained(folder)(images=picture, return_tensors="pt")["pixel_values"]
    assert (backbone.preprocess(picture) - pixels[0]).abs().max() < 0.05  # two libraries' resizing
    padding = {"padding": "max_length", "max_length": 24} if "siglip" in kind else {"padding": True}
    tokens = AutoTokenizer.from_pretrained(folder)(TEXTS, **padding, return_tensors="pt")
    with torch.no_grad():
        mask = {} if "siglip" in kind else {"attention_mask": tokens["attention_mask"]}
        expected = unit(model.get_text_features(input_ids=tokens["input_ids"], **mask))
        assert torch.allclose(backbone.encode_texts(TEXTS), expected, atol=1e-5)
        assert torch.allclose(
            backbone.encode_images(pixels), unit(model.get_image_features(pixel_values=pixels)), atol=1e-5
        )
    assert backbone.logit_scale == pytest.approx(float(model.logit_scale.detach().exp()))


@pytest.mark.parametrize("positions", [16, 25, 4])
def test_features_of_naflex_are_those_of_transformers_for_a_square_image(positions: int, tmp_path: Path):
    from transformers import AutoImageProcessor

    folder = tmp_path / "naflex"
    write_folder(folder, "siglip2_naflex")
    model = small_naflex(positions=positions)
    model.save_pretrained(folder)
    backbone = load_backbone(f"hf:{folder}")
    picture = Image.effect_noise((32, 32), 90).convert("RGB")  # 16 patches of 8 x 8: nothing is resized
    picture.putpixel((3, 20), (255, 0, 90))
    inputs = AutoImageProcessor.from_pretrained(folder)(images=picture, return_tensors="pt")
    with torch.no_grad():
        expected = unit(model.get_image_features(**inputs))
    found = backbone.encode_images(backbone.preprocess(picture)[None])
    assert backbone.image_size == 32 and torch.allclose(found, expected, atol=1e-5)
    wide = Image.effect_noise((90, 32), 90).convert("RGB")  # becomes a square
    assert backbone.preprocess(wide).shape == (3, 32, 32)
    assert (found * backbone.encode_images(backbone.preprocess(wide)[None])).sum() < 0.9999


def test_blip2_scores_are_those_of_transformers(folders: dict[str, tuple[Path, Any]]):
    from transformers import AutoImageProcessor, AutoTokenizer

    folder, model = folders["blip2"]
    backbone = load_backbone(f"hf:{folder}")
    picture = Image.effect_noise((47, 40), 90).convert("RGB")
    pixels = AutoImageProcessor.from_pretrained(folder)(images=picture, return_tensors="pt")["pixel_values"]
    assert (backbone.preprocess(picture) - pixels[0]).abs().max() < 0.05  # two libraries' resizing
    pixels = torch.cat([pixels, torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))])
    tokens = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(pixel_values=pixels, **tokens, use_image_text_matching_head=False)
    images, texts = backbone.encode_images(pixels), backbone.encode_texts(TEXTS)
    assert torch.allclose(texts, expected.text_embeds, atol=1e-5)
    assert torch.allclose(images.unflatten(1, (5, -1)) * 5**0.5, expected.image_embeds, atol=1e-5)
    assert torch.allclose(cosines(images, texts), expected.logits_per_image, atol=1e-5)
    assert backbone.logit_scale == pytest.approx(1 / 0.07)
    probs = (expected.logits_per_image / 0.07).softmax(dim=1)
    assert torch.allclose(backbone.text_probs(images, texts), probs, atol=1e-5)
    best = expected.image_embeds @ texts.T  # (N, Q, C)
    assert len(best.argmax(dim=1).unique()) > 1  # not one vector that decides for all images and texts


def test_learned_prompts_score_all_vectors_of_blip2(folders: dict[str, tuple[Path, Any]]):
    backbone = load_backbone(f"hf:{folders['blip2'][0]}")
    model = PromptedCLIP(backbone, PromptLearner(backbone, ["dog", "cat"], ctx_init="a photo of a"))
    images = backbone.encode_images(torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    texts = backbone.encode_texts(["a photo of a dog.", "a photo of a cat."])
    logits = model(images)
    assert torch.allclose(logits.softmax(dim=1), backbone.text_probs(images, texts), atol=1e-5)
    logits[0, 0].backward()
    assert float(model.prompt_learner.ctx.grad.abs().sum()) > 0


def test_a_clip_is_the_one_that_open_clip_reads(folders: dict[str, tuple[Path, Any]]):
    ours, theirs = small_backbone("vit"), load_backbone(f"hf:{folders['clip'][0]}")
    assert torch.equal(ours.tokenize(TEXTS).argmax(dim=1), theirs.tokenize(TEXTS).argmax(dim=1))
    assert torch.allclose(ours.encode_texts(TEXTS), theirs.encode_texts(TEXTS), atol=1e-5)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(ours.encode_images(pixels), theirs.encode_images(pixels), atol=1e-5)
    made = [
        PromptedCLIP(one, PromptLearner(one, ["dog", "sea lake"], n_ctx=4, generator=torch.Generator().manual_seed(3)))
        for one in (ours, theirs)
    ]
    assert torch.allclose(made[0].text_features(), made[1].text_features(), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("position", ["end", "front"])
def test_a_learned_context_is_where_its_words_would_be(kind: str, position: str, folders: dict[str, tuple[Path, Any]]):
    backbone = load_backbone(f"hf:{folders[kind][0]}")
    learner = PromptLearner(backbone, ["dog", "cat"], ctx_init="a photo of a", position=position)
    text = PromptedCLIP(backbone, learner).text_features()[0]
    words = [f"a photo of a {name}." if position == "end" else f"{name} a photo of a." for name in ("dog", "cat")]
    if position == "front" and kind not in ("clip", "blip2"):
        words = []  # some tokenizers spell the first word as in the middle of a text
    if words:
        assert torch.allclose(text, backbone.encode_texts(words), atol=1e-5)
    text.sum().backward()
    assert learner.ctx.grad is not None and float(learner.ctx.grad.abs().sum()) > 0
    assert all(weight.grad is None for weight in backbone.model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_context_in_the_model_itself(kind: str, folders: dict[str, tuple[Path, Any]]):
    """Against the model's own forward, with vectors put behind its token embedding."""
    folder, model = folders[kind]
    backbone = load_backbone(f"hf:{folder}")
    learner = PromptLearner(backbone, ["dog"], n_ctx=3, generator=torch.Generator().manual_seed(5))

    def encode(ids: torch.Tensor) -> torch.Tensor:
        end = int(backbone.ends(ids))
        if "siglip" in kind:
            found = model.get_text_features(input_ids=ids)
        elif kind == "blip2":
            mask = (torch.arange(ids.shape[1]) <= end).long()[None]
            found = model(pixel_values=torch.zeros(1, 3, 32, 32), input_ids=ids, attention_mask=mask).text_embeds
        else:
            mask = (torch.arange(ids.shape[1]) <= end).long()[None]
            found = model.get_text_features(input_ids=ids, attention_mask=mask)
        return getattr(found, "pooler_output", found)

    with torch.no_grad():
        expected = own_forward(
            backbone,
            learner.ctx,
            "of of of dog.",
            encode=encode,
            embedding=getattr(model, "text_model", model).get_input_embeddings(),
        )
        found = PromptedCLIP(backbone, learner).text_features()[0, 0]
    assert torch.allclose(found, torch.nn.functional.normalize(expected, dim=0), atol=1e-5)


def test_a_text_that_is_too_long_is_refused(folders: dict[str, tuple[Path, Any]]):
    backbone: Backbone = load_backbone(f"hf:{folders['siglip'][0]}")
    with pytest.raises(UserError, match="longer than the 24 tokens"):
        backbone.tokenize(["dog " * 30])


@pytest.mark.parametrize("kind", ["clip", "blip2"])
def test_half_precision_reaches_both_towers(kind: str, folders: dict[str, tuple[Path, Any]]):
    name, pixels = f"hf:{folders[kind][0]}", torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    backbone, exact = load_backbone(name, precision="bf16"), load_backbone(name)
    assert backbone.text_encoder.dtype == torch.bfloat16
    for half, full in (
        (backbone.encode_images(pixels), exact.encode_images(pixels)),
        (backbone.encode_texts(TEXTS), exact.encode_texts(TEXTS)),
    ):
        assert half.dtype == torch.float32
        assert (half * full).sum(dim=1).min() > 0.98


def test_weights_in_half_precision_are_computed_with_in_fp32(tmp_path: Path):
    write_folder(tmp_path / "clip", "clip").half().save_pretrained(tmp_path / "clip")
    backbone = load_backbone(f"hf:{tmp_path / 'clip'}")
    assert {weight.dtype for weight in backbone.model.parameters()} == {torch.float32}


def test_what_cannot_be_used_is_one_line(
    tmp_path: Path, folders: dict[str, tuple[Path, Any]], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("AIR_OFFLINE", "1")  # else the hub's library tries for 20 seconds where there is no network
    from transformers import BertConfig, Blip2Config, BlipConfig

    captions = Blip2Config(architectures=["Blip2ForConditionalGeneration"])
    for name, config, message in (
        ("bert", BertConfig(), "type bert, which is no dual encoder"),
        ("captions", captions, "without the head that compares images and texts; take a Blip2ForImageTextRetrieval"),
        ("unnamed", Blip2Config(), "without the head that compares images and texts"),
        ("blip", BlipConfig(), "type blip, whose features are no plain vectors"),
    ):
        config.save_pretrained(tmp_path / name)
        with pytest.raises(UserError, match=message):
            load_backbone(f"hf:{tmp_path / name}")
    for name, message in (
        ("hf:", "names no model"),
        (f"hf:{tmp_path / 'absent'}", "absent, which does not exist"),
        (f"hf:{folders['clip'][0] / 'config.json'}", "names a file; give the folder"),
        ("hf:nobody/has-this-model", "not on this machine"),
    ):
        with pytest.raises(UserError, match=message) as error:
            load_backbone(name)
        assert "\n" not in str(error.value)
