"""Full-size architectures with random weights, against other libraries' models of the same weights, in fp32.

`pytest -m slow tests/slow/test_backbones.py`; on two cores about a minute a model, and 6 GB of memory for the largest.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_backbones import clip_of_transformers, own_forward, scramble, siglip_of_transformers, write_tokenizer
from torch.nn.functional import normalize

from air_plugin.clip.backbone import Backbone
from air_plugin.clip.loading import load_backbone
from air_plugin.clip.prompts import PromptLearner

pytestmark = pytest.mark.slow

ARCHITECTURES = ("RN50", "RN101", "ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-B-16-SigLIP", "ViT-B-16-SigLIP2")
NAMES = ["dog", "annual crop land"]
TEXTS = [f"a photo of a {name}." for name in NAMES]


def random_backbone(folder: Path, architecture: str, *, quick: bool) -> Backbone:
    """A full-size backbone of random weights, saved and loaded as a person's folder is."""
    import open_clip

    config = open_clip.get_model_config(architecture) | ({"quick_gelu": True} if quick else {})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.create_model(architecture, force_quick_gelu=quick)
    scramble(model)
    folder.mkdir()
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    if "SigLIP" in architecture:  # the tokens of the small one; there is room for 32,000
        write_tokenizer(folder, "siglip2" if architecture.endswith("2") else "siglip")
    return load_backbone(str(folder))


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param
    gc.collect()


def other_model(backbone: Backbone, architecture: str) -> Any:
    """The same weights in transformers: (images, texts, token embedding, the model)."""
    model = backbone.model
    if "SigLIP" in architecture:
        act = "gelu_pytorch_tanh" if architecture.endswith("2") else "gelu"
        return siglip_of_transformers(model, text_act=act)
    if architecture.startswith("RN"):
        return None
    return clip_of_transformers(model)


def image_tower_of_timm(model: Any, architecture: str) -> Any:
    """timm's CLIP ResNet with the weights of an open_clip one; only the names differ."""
    import timm
    from timm.models.byobnet import checkpoint_filter_fn

    tower = timm.create_model({"RN50": "resnet50_clip", "RN101": "resnet101_clip"}[architecture], pretrained=False)
    tower.load_state_dict(checkpoint_filter_fn(dict(model.state_dict()), tower))
    return tower.eval()


@torch.no_grad()
def test_full_size_features_are_the_originals(architecture: str, tmp_path: Path):
    clip = "SigLIP" not in architecture
    backbone = random_backbone(tmp_path / "model", architecture, quick=clip)
    assert backbone.image_size == 224 and backbone.context_length == (77 if clip else 64)
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    images, texts = backbone.encode_images(pixels), backbone.encode_texts(TEXTS)
    assert torch.allclose(images, backbone.model.encode_image(pixels, normalize=True), atol=1e-4)
    tokens = backbone.tokenize(TEXTS)
    assert torch.allclose(texts, backbone.model.encode_text(tokens, normalize=True), atol=1e-4)
    assert (images[0] - images[1]).abs().max() > 1e-3 and (texts[0] - texts[1]).abs().max() > 1e-3
    other = other_model(backbone, architecture)
    if other is None:
        theirs = normalize(image_tower_of_timm(backbone.model, architecture)(pixels), dim=1)
        assert torch.allclose(images, theirs, atol=1e-4)
    else:
        outputs = other(pixel_values=pixels, input_ids=tokens)
        assert torch.allclose(images, outputs.image_embeds, atol=1e-4)
        assert torch.allclose(texts, outputs.text_embeds, atol=1e-4)

    learner = PromptLearner(backbone, NAMES, n_ctx=16, generator=torch.Generator().manual_seed(0))
    ours = normalize(backbone.text_encoder(*learner()), dim=1)
    text = getattr(backbone.model, "text", backbone.model)
    encoders = [(backbone.model.encode_text, text.token_embedding)]
    if other is not None:
        embedding = other.text_model.embeddings.token_embedding
        encoders.append((lambda ids: other.get_text_features(input_ids=ids).pooler_output, embedding))
    for encode, embedding in encoders:
        for name, feature in zip(NAMES, ours, strict=True):
            prompt = f"{' '.join(['of'] * 16)} {name}."
            theirs = own_forward(backbone, learner.ctx, prompt, encode=encode, embedding=embedding)
            assert torch.allclose(feature, normalize(theirs, dim=0), atol=1e-4)


def test_gradients_reach_the_context_only(architecture: str, tmp_path: Path):
    backbone = random_backbone(tmp_path / "model", architecture, quick="SigLIP" not in architecture)
    learner = PromptLearner(backbone, NAMES, n_ctx=16, generator=torch.Generator().manual_seed(0))
    normalize(backbone.text_encoder(*learner()), dim=1)[:, :8].sum().backward()
    assert learner.ctx.grad.norm(dim=1).min() > 0
    assert all(value.grad is None and not value.requires_grad for value in backbone.model.parameters())
