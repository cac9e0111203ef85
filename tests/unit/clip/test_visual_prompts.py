"""Prompts in the image tower, of one kind (VPT) and of both kinds (UPT), against slow forward passes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from small_backbones import make_model, small_backbone
from small_models import make_backbone, write_pictures
from torch import Tensor, nn

from air_plugin.clip.backbone import Backbone
from air_plugin.clip.joint_prompts import WIDTH, JointPrompts
from air_plugin.clip.loading import load_backbone
from air_plugin.clip.prepared_images import ImageTable
from air_plugin.clip.prompts import PromptLearner
from air_plugin.clip.views import split_tail
from air_plugin.clip.visual_prompts import (
    PromptedTower,
    VisuallyPromptedCLIP,
    VisualPrompts,
    has_vision_transformer,
    require_vision_transformer,
)
from air_plugin.utils.errors import UserError
from air_plugin.utils.images import load_rgb

NAMES = ["dog", "sea or lake", "cat"]


def numbers(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pixels(backbone: Backbone, count: int = 3) -> Tensor:
    return numbers(count, 3, backbone.image_size, backbone.image_size)


def joint(backbone: Backbone, *, seed: int = 5, classes: list[str] = NAMES) -> JointPrompts:
    generator = torch.Generator().manual_seed(seed)
    text = PromptLearner(backbone, classes, n_ctx=4, generator=generator)
    return JointPrompts(text, VisualPrompts(backbone, classes, count=3, bound=0.3, generator=generator), seed=seed)


def visual(backbone: Backbone, *, seed: int = 5, count: int = 4, classes: list[str] = NAMES) -> VisualPrompts:
    return VisualPrompts(backbone, classes, count=count, generator=torch.Generator().manual_seed(seed))


def prompted(backbone: Backbone, learner: nn.Module) -> VisuallyPromptedCLIP:
    template = backbone.encode_texts([f"a {name}." for name in NAMES]) if isinstance(learner, VisualPrompts) else None
    return VisuallyPromptedCLIP(backbone, learner, template=template)


# Slow references: one image, one head, one token at a time


def slow_norm(norm: Any, token: Tensor) -> Tensor:
    mean, variance = token.mean(), token.var(unbiased=False)
    return (token - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias


def slow_attention(tokens: list[Tensor], heads: int, weight: Tensor, bias: Tensor) -> list[Tensor]:
    """Every token sees all tokens; without the output projection."""
    width = len(tokens[0])
    size = width // heads
    projected = [weight @ token + bias for token in tokens]
    outputs = []
    for one in projected:
        parts = []
        for head in range(heads):
            at = slice(head * size, (head + 1) * size)
            scores = torch.stack(
                [one[:width][at] @ other[width : 2 * width][at] / math.sqrt(size) for other in projected]
            )
            shares = scores.exp() / scores.exp().sum()
            parts.append(sum(s * other[2 * width :][at] for s, other in zip(shares, projected, strict=True)))
        outputs.append(torch.cat(parts))
    return outputs


def slow_tower(tower: Any, image: Tensor, learned: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """(3, H, W) pixels and (P, W) tokens to the (D,) feature, with nothing but the weights of the tower."""
    side = tower.conv1.kernel_size[0]
    tokens = [tower.class_embedding + tower.positional_embedding[0]]
    tokens += list(learned)
    place = 1
    for top in range(0, image.shape[1], side):
        for left in range(0, image.shape[2], side):
            patch = image[:, top : top + side, left : left + side].reshape(-1)
            embedded = tower.conv1.weight.reshape(len(tower.class_embedding), -1) @ patch
            tokens.append(embedded + tower.positional_embedding[place])
            place += 1
    tokens = [slow_norm(tower.ln_pre, token) for token in tokens]
    for block in tower.transformer.resblocks:
        normed = [slow_norm(block.ln_1, token) for token in tokens]
        attn = block.attn
        seen = slow_attention(normed, attn.num_heads, attn.in_proj_weight, attn.in_proj_bias)
        tokens = [t + attn.out_proj.weight @ s + attn.out_proj.bias for t, s in zip(tokens, seen, strict=True)]
        for number, token in enumerate(tokens):
            inner = block.mlp.c_fc.weight @ slow_norm(block.ln_2, token) + block.mlp.c_fc.bias
            tokens[number] = token + block.mlp.c_proj.weight @ activation(inner) + block.mlp.c_proj.bias
    return tower.proj.T @ slow_norm(tower.ln_post, tokens[0])


def slow_contexts(prompts: JointPrompts) -> tuple[Tensor, Tensor]:
    """The text and the visual tokens that the network makes."""

    def linear(layer: nn.Linear, token: Tensor) -> Tensor:
        return layer.weight @ token + layer.bias

    mixer = prompts.mixer
    tokens = [linear(prompts.text_in, token) for token in prompts.text.ctx]
    tokens += [linear(prompts.visual_in, token) for token in prompts.visual.tokens]
    normed = [slow_norm(mixer.norm_1, token) for token in tokens]
    seen = slow_attention(normed, 1, mixer.qkv.weight, mixer.qkv.bias)
    tokens = [token + linear(mixer.out, other) for token, other in zip(tokens, seen, strict=True)]
    for number, token in enumerate(tokens):
        inner = linear(mixer.mlp[0], slow_norm(mixer.norm_2, token))
        gelu = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        tokens[number] = token + linear(mixer.mlp[2], gelu)
    count = len(prompts.text.ctx)
    return (
        torch.stack([linear(prompts.text_out, token) for token in tokens[:count]]),
        torch.stack([linear(prompts.visual_out, token) for token in tokens[count:]]),
    )


ACTIVATIONS = {"vit": lambda x: x * torch.sigmoid(1.702 * x), "openclip": nn.functional.gelu}


@pytest.mark.parametrize("family", ACTIVATIONS)
@torch.no_grad()
def test_the_prompted_tower_is_a_plain_loop_over_its_tokens(family: str):
    backbone = small_backbone(family)
    tower, images, learned = backbone.model.visual, pixels(backbone), numbers(4, 32, seed=2)
    expected = torch.stack([slow_tower(tower, image, learned, ACTIVATIONS[family]) for image in images])
    found = PromptedTower(tower)(images, learned)
    assert torch.allclose(found, expected, atol=2e-4 * float(expected.abs().max()))
    without = torch.stack([slow_tower(tower, image, learned[:0], ACTIVATIONS[family]) for image in images])
    assert not torch.allclose(without, expected, atol=1e-2 * float(expected.abs().max()))  # the tokens matter


@torch.no_grad()
def test_the_joint_prompts_are_a_plain_loop_over_both_kinds_of_tokens():
    backbone = small_backbone("vit")
    model = prompted(backbone, joint(backbone))
    text, learned = slow_contexts(model.prompt_learner)
    found = model.prompt_learner.contexts()
    assert torch.allclose(found[0], text, atol=1e-5) and torch.allclose(found[1], learned, atol=1e-5)
    images = pixels(backbone)
    slow = torch.stack([slow_tower(backbone.model.visual, one, learned, ACTIVATIONS["vit"]) for one in images])
    assert torch.allclose(model.encode_pixels(images), nn.functional.normalize(slow, dim=1), atol=1e-4)
    alone = PromptLearner(backbone, NAMES, n_ctx=4)
    alone.ctx.copy_(text)
    embeddings, end = alone()
    expected = nn.functional.normalize(backbone.text_encoder(embeddings, end), dim=1)[None]
    assert torch.allclose(model.text_features(), expected, atol=1e-5)


@pytest.mark.parametrize("family", ACTIVATIONS)
def test_without_tokens_the_features_are_those_of_the_frozen_tower(family: str):
    backbone = small_backbone(family)
    images = pixels(backbone, 5)
    found = PromptedTower(backbone.model.visual).encode(images, torch.empty(0, 32))
    assert torch.allclose(found, backbone.encode_images(images), atol=1e-6)


@pytest.mark.parametrize("make", [visual, joint])
def test_gradient_reaches_the_prompts_only(make: Callable[..., nn.Module]):
    backbone = replace(make_backbone(), model=make_model("vit"), image_size=32)
    model = prompted(backbone, make(backbone))
    images = torch.randint(256, (4, 32, 32, 3), dtype=torch.uint8)
    batch = model.encode_batch({"img": images, "target": torch.tensor([0, 1, 2, 0])})
    nn.functional.cross_entropy(model.logits(batch["img"], model.text_features()), batch["target"]).backward()
    parameters = dict(model.prompt_learner.named_parameters())
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in parameters.values())
    trained = {id(parameter) for parameter in parameters.values()}
    frozen = [p for p in [*model.parameters(), *backbone.model.parameters()] if id(p) not in trained]
    assert frozen and all(p.grad is None and not p.requires_grad for p in frozen)


def test_activation_checkpointing_changes_no_gradient():
    backbone = small_backbone("vit")
    tower = PromptedTower(backbone.model.visual)
    gradients = []
    for tower.checkpointing in (False, True):
        tokens = nn.Parameter(numbers(4, 32))
        tower.encode(pixels(backbone), tokens).sum().backward()
        gradients.append(tokens.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast_gives_nearly_the_same_features_and_gradients_in_single_precision(half: torch.dtype):
    backbone = small_backbone("vit")
    found = []
    for autocast in (None, half):
        tokens = nn.Parameter(numbers(4, 32))
        features = PromptedTower(backbone.model.visual, autocast=autocast).encode(pixels(backbone), tokens)
        (features @ numbers(24, seed=3)).sum().backward()
        assert features.dtype == tokens.grad.dtype == torch.float32
        found.append((features.detach(), tokens.grad))
    for one, other in zip(*found, strict=True):
        cosine = nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0)
        assert not torch.equal(one, other) and float(cosine) > 0.995
    model = prompted(replace(backbone, autocast=half), visual(backbone))
    assert model.loss_scale == (1024 if half == torch.float16 else 1)
    assert prompted(backbone, visual(backbone)).loss_scale == 1


# Images


def test_prepared_images_become_the_pixels_of_the_backbone(tmp_path: Any):
    """Bit by bit; only images in a batch are replaced, each by its own features, and features stay."""
    backbone = small_backbone("vit")
    pictures = [load_rgb(path) for path in write_pictures(tmp_path, 5)]
    head, _ = split_tail(backbone.preprocess)
    prepared = torch.stack([torch.from_numpy(np.array(head(one))) for one in pictures])
    expected = torch.stack([backbone.preprocess(picture) for picture in pictures])
    model = prompted(backbone, visual(backbone))
    assert torch.equal(model.normalise(prepared), expected)
    target, others = torch.zeros(2, 3, dtype=torch.uint8), numbers(5, 24)
    batch = {"img": prepared[:2], "target": target, "features": others, "labelled": prepared[2:]}
    with torch.no_grad():
        found, features = model.encode_batch(batch), model.encode_pixels(expected)
        assert torch.allclose(found["img"], features[:2], atol=1e-6)
        assert torch.allclose(found["labelled"], features[2:], atol=1e-6)
    assert found["target"] is target and found["features"] is others and batch["img"].dtype == torch.uint8
    assert model.encode_batch({"features": others})["features"] is others
    table = ImageTable([prepared[:, None]])
    assert torch.allclose(model.encode(table.plain), features, atol=1e-6) and model.encode(others) is others
    assert torch.allclose(model(table.plain[torch.tensor([3, 0])]), model(features[[3, 0]]), atol=1e-4)
    assert not model.encode(table.plain).requires_grad


def test_many_images_are_encoded_some_at_a_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("air_plugin.clip.visual_prompts.CHUNK", 2)
    backbone = small_backbone("vit")
    model = prompted(backbone, visual(backbone))
    images = torch.randint(256, (5, 1, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    sizes: list[int] = []
    model.tower.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    features = model.encode(ImageTable([images]).plain)
    assert sizes == [2, 2, 1]
    whole = model.encode_batch({"img": images[:, 0]})["img"]
    assert torch.allclose(features, whole, atol=1e-6)


# Initial values and checkpoints


def test_initial_values_are_as_published_and_follow_from_the_seed_alone():
    backbone = small_backbone("vit")
    many = visual(backbone, count=2000).tokens.detach()
    assert float(many.std()) == pytest.approx(32**-0.5, rel=0.02) and abs(float(many.mean())) < 0.01
    uniform = VisualPrompts(backbone, NAMES, count=2000, bound=0.3, generator=torch.Generator().manual_seed(0)).tokens
    assert 0.29 < float(uniform.detach().abs().max()) <= 0.3
    assert float(uniform.detach().std()) == pytest.approx(0.3 / 3**0.5, rel=0.02)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = joint(backbone)
    assert torch.equal(before, torch.get_rng_state())
    assert tuple(one.text_in.weight.shape) == (WIDTH, 32) and WIDTH == 128
    torch.manual_seed(2)
    same, other = joint(backbone), joint(backbone, seed=6)
    for name, value in one.named_parameters():
        assert torch.equal(value, dict(same.named_parameters())[name]), name
    assert not torch.equal(one.mixer.qkv.weight, other.mixer.qkv.weight)


@pytest.mark.parametrize("make", [visual, joint])
def test_a_checkpoint_serves_other_classes_only_where_that_is_asked_for(make: Callable[..., nn.Module]):
    backbone = small_backbone("vit")
    state = make(backbone, seed=1).state_dict()
    others = make(backbone, classes=["sea", "land"])
    with pytest.raises(UserError, match="other classes"):
        others.load_state_dict(state)
    for part in others.modules():
        if hasattr(part, "other_names_allowed"):
            part.other_names_allowed = True
    others.load_state_dict(state)
    assert torch.equal(others.visual_tokens(), make(backbone, seed=1).visual_tokens())
    with pytest.raises(UserError, match="another backbone"):
        make(replace(backbone, model=make_model("vit", seed=1))).load_state_dict(state)


# Towers without a place for prompts


@pytest.mark.parametrize("family", ["resnet", "siglip"])
def test_other_towers_are_refused_in_one_line(family: str):
    with pytest.raises(UserError) as caught:
        visual(small_backbone(family))
    message = str(caught.value)
    assert "class token" in message and "ViT-B/32" in message and "MODALITY text" in message and "\n" not in message


@pytest.mark.parametrize("options", [{"pool_type": "avg"}, {"attentional_pool": True, "attn_pooler_heads": 2}])
def test_vision_transformers_without_a_pooled_class_token_are_refused(options: dict[str, Any]):
    vision = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16, **options}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    model = open_clip.CLIP(24, vision, text).requires_grad_(False).eval()
    with pytest.raises(UserError, match="class token"):
        visual(replace(make_backbone(), model=model))


def test_a_preparation_that_ends_otherwise_is_refused():
    backbone = replace(small_backbone("vit"), preprocess=lambda image: torch.zeros(3, 32, 32))
    with pytest.raises(UserError, match="ToTensor and Normalize"):
        prompted(backbone, visual(small_backbone("vit")))


@pytest.mark.parametrize(
    ("name", "takes"),
    [
        ("mini", False),
        ("mini_vit", True),
        ("RN50", False),
        ("ViT-B/32", True),
        ("ViT-B-16:laion2b_s34b_b88k", True),
        ("ViT-B-16-SigLIP:webli", False),
        ("coca_ViT-B-32:laion2b_s13b_b90k", False),
        ("convnext_base:laion400m_s13b_b51k", False),
    ],
)
def test_the_name_of_a_backbone_tells_whether_it_takes_visual_prompts(name: str, takes: bool) -> None:
    assert has_vision_transformer(name) is takes
    if name.startswith("mini"):
        tower = load_backbone(name).model.visual
    else:
        with torch.device("meta"):  # no weights
            tower = open_clip.create_model(
                name.partition(":")[0].replace("/", "-"), load_weights=False, device="meta"
            ).visual
    backbone: Any = SimpleNamespace(name=name, model=SimpleNamespace(visual=tower))
    if takes:
        assert require_vision_transformer(backbone) is tower
    else:
        with pytest.raises(UserError, match="need an image tower that is a vision transformer"):
            require_vision_transformer(backbone)


def test_of_an_unknown_backbone_loading_tells(tmp_path: Path) -> None:
    assert has_vision_transformer("ViT-B-33:openai") and has_vision_transformer("ViT-B/32:/no/such/file.pt")
    assert not has_vision_transformer("hf:google/siglip2-base-patch16-224")
    config = {"embed_dim": 8, "vision_cfg": {"layers": [1, 1, 1, 1]}, "text_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    assert not has_vision_transformer(str(tmp_path))
    (tmp_path / "open_clip_config.json").write_text("{")
    assert has_vision_transformer(str(tmp_path))
    (tmp_path / "open_clip_config.json").unlink()
    assert has_vision_transformer(str(tmp_path))
