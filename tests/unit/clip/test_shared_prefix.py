"""Prompts with a common beginning: the same features and gradients as the whole tower, from fewer tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from openai_towers import host_model
from small_backbones import small_backbone
from small_models import make_backbone, make_clip
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from air_plugin.clip import shared_prefix
from air_plugin.clip.backbone import Backbone
from air_plugin.clip.prompts import PromptedCLIP, PromptEnsemble, PromptLearner
from air_plugin.clip.text_encoder import TextEncoder

# 1 to 8 tokens each
NAMES = [
    "dog",
    "annual crop land",
    "sea_or_lake",
    "river",
    "one two three four five six seven dogs",
    "cat",
    "bird of sea",
]
TEXTS = [f"a photo of a {name.replace('_', ' ')}." for name in NAMES]


def whole_tower(model: Any, embeddings: Tensor, end: Tensor) -> Tensor:
    """All 77 tokens of every prompt through the model's own blocks, as in CoOp."""
    x = embeddings.to(model.transformer.resblocks[0].mlp.c_fc.weight.dtype)
    x = x + model.positional_embedding.to(x.dtype)
    if hasattr(model.transformer.resblocks[0], "attn_mask"):  # OpenAI's
        x = model.transformer.resblocks(x.transpose(0, 1)).transpose(0, 1)
    else:
        x = model.transformer(x, attn_mask=model.attn_mask)
    return model.ln_final(x)[torch.arange(len(x)), end] @ model.text_projection


def learner(backbone: Backbone, seed: int = 0, **options: Any) -> PromptLearner:
    prompts = PromptLearner(backbone, NAMES, n_ctx=5, generator=torch.Generator().manual_seed(seed), **options)
    with torch.no_grad():  # classes differ, too, where each has its own
        prompts.ctx.add_(0.3 * torch.randn(prompts.ctx.shape, generator=torch.Generator().manual_seed(seed + 50)))
    return prompts


def loss_and_gradients(features: Tensor, prompts: nn.Module) -> tuple[Tensor, list[Tensor]]:
    """Of (E * C, D) features and ten random images for each member."""
    text = normalize(features.float(), dim=1).unflatten(0, (-1, len(NAMES)))
    images = torch.randn(10, text.shape[2], generator=torch.Generator().manual_seed(7))
    target = torch.arange(10) % len(NAMES)
    loss = sum((cross_entropy(5 * images @ one.T, target) for one in text), torch.zeros(()))
    return loss.detach(), list(torch.autograd.grad(loss, list(prompts.parameters())))


def require_equal(prompted: PromptedCLIP, model: Any, *, tolerance: float = 1e-4) -> None:
    """Loss and gradient of every context are those of the whole tower, relative to their largest entry."""
    prompts = prompted.prompt_learner
    loss, gradients = loss_and_gradients(prompted.text_features().flatten(0, 1), prompts)
    expected, expected_gradients = loss_and_gradients(whole_tower(model, *prompts()), prompts)
    assert abs(loss - expected) < tolerance * expected
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert theirs.abs().max() > 1e-3
        assert (ours - theirs).abs().max() < tolerance * theirs.abs().max()


def with_model(model: Any) -> Backbone:
    return dataclasses.replace(make_backbone(), model=model)


def scaled_clip() -> Any:
    """A CLIP whose blocks have LayerScale."""
    import open_clip

    vision = open_clip.CLIPVisionCfg(layers=1, width=32, head_width=16, patch_size=8, image_size=16)
    text = open_clip.CLIPTextCfg(width=32, heads=2, layers=2, ls_init_value=0.4)
    torch.manual_seed(0)
    model = open_clip.CLIP(24, vision, text)
    nn.init.normal_(model.token_embedding.weight, std=0.5)
    return model.eval().requires_grad_(False)


@pytest.fixture(params=[128, 12], ids=["one row", "several rows"])
def row(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(shared_prefix, "ROW", request.param)
    return request.param


# Equality


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("class_specific", [False, True])
@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_loss_and_gradient_are_the_whole_towers(
    tiny_backbone: Backbone, row: int, position: Any, class_specific: bool, members: int
):
    several = [
        learner(tiny_backbone, seed, position=position, class_specific=class_specific) for seed in range(members)
    ]
    prompts = PromptEnsemble(several) if members > 1 else several[0]
    shares = position != "front" and not class_specific
    assert (prompts.layout is not None) == shares
    if shares:
        assert prompts.layout.prefix == {"end": 6, "middle": 3}[position]
        assert (prompts.layout.rows > 1) == (row == 12)
    require_equal(PromptedCLIP(tiny_backbone, prompts), tiny_backbone.model)


@pytest.mark.parametrize("kind", ["openai", "layer scale"])
def test_other_causal_towers_share_the_prefix(row: int, kind: str):
    model = host_model(make_clip()) if kind == "openai" else scaled_clip()
    backbone = with_model(model)
    prompts = learner(backbone)
    assert prompts.layout is not None
    require_equal(PromptedCLIP(backbone, prompts), model)


def test_the_embedded_tower_shares_the_prefix():
    from air_plugin.clip.loading import load_backbone

    backbone = load_backbone("mini")
    prompts = learner(backbone)
    assert prompts.layout is not None
    require_equal(PromptedCLIP(backbone, prompts), backbone.model)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 0.01), ("bf16", 0.08)])
def test_half_precision_differs_by_rounding_only(row: int, precision: str, tolerance: float):
    backbone = small_backbone("vit", precision)
    prompts = learner(backbone)
    prompted = PromptedCLIP(backbone, prompts)
    assert prompts.layout is not None and backbone.text_encoder.dtype != torch.float32
    require_equal(prompted, backbone.model, tolerance=tolerance)
    exact = PromptedCLIP(small_backbone("vit"), learner(small_backbone("vit")))
    assert torch.allclose(prompted.text_features(), exact.text_features(), atol=0.03)
    assert not torch.equal(prompted.text_features(), exact.text_features())


@pytest.mark.parametrize(
    "texts",
    [TEXTS, TEXTS[:1], [TEXTS[0]] * 3, ["dog", "a cat"], ["a dog", "a dog and a cat"], ["", "dog"]],
    ids=["template", "one", "equal", "only the start token", "one begins with another", "empty"],
)
def test_texts_keep_their_features(tiny_backbone: Backbone, row: int, texts: list[str]):
    encoder, tokens = tiny_backbone.text_encoder, tiny_backbone.tokenize(texts)
    ours = tiny_backbone.encode_texts(texts)
    plain = normalize(encoder(encoder.token_embedding(tokens), tokens.argmax(dim=1)), dim=1)
    whole = normalize(tiny_backbone.model.encode_text(tokens), dim=1)
    assert torch.allclose(ours, plain, atol=1e-6) and torch.allclose(ours, whole, atol=1e-6)


def test_members_with_different_names_or_contexts_do_without(tiny_backbone: Backbone):
    long = PromptLearner(tiny_backbone, NAMES, n_ctx=7, generator=torch.Generator().manual_seed(3))
    for other in (long, learner(tiny_backbone, position="middle")):
        prompts = PromptEnsemble([learner(tiny_backbone), other])
        assert prompts.layout is None
        require_equal(PromptedCLIP(tiny_backbone, prompts), tiny_backbone.model)


# Which towers


def test_siglip_and_strange_towers_take_the_plain_path(tiny_backbone: Backbone):
    assert PromptLearner(small_backbone("siglip"), ["dog"], n_ctx=4).layout is None
    ends, encoder = [9, 11], tiny_backbone.text_encoder
    assert encoder.layout(ends, prefix=6) is not None
    assert encoder.layout(ends, prefix=0) is None

    def layout(change: Any) -> Any:
        model = make_clip()
        change(model)
        return TextEncoder(model).layout(ends, prefix=6)

    def block(model: Any) -> Any:
        return model.transformer.resblocks[1]

    class Adapted(type(block(tiny_backbone.model))):  # type: ignore[misc]
        pass

    assert layout(lambda model: None) is not None
    changes = {
        "mask": lambda model: model.attn_mask[3, 5].zero_(),
        "checkpointing": lambda model: setattr(model.transformer, "grad_checkpointing", True),
        "dropout": lambda model: setattr(block(model).attn, "dropout", 0.1),
        "another part": lambda model: block(model).add_module("adapter", nn.Linear(2, 2)),
        "another class": lambda model: setattr(block(model), "__class__", Adapted),
        "another attention": lambda model: setattr(block(model), "attn", nn.Linear(2, 2)),
        "hook of a block": lambda model: block(model).register_forward_hook(print),
        "hook of attention": lambda model: block(model).attn.register_forward_pre_hook(print),
        "hook of the tower": lambda model: model.transformer.register_forward_hook(print),
    }
    for name, change in changes.items():
        assert layout(change) is None, name


# Cost


def test_each_token_is_computed_once_and_the_last_block_computes_the_end_only():
    backbone = make_backbone()
    prompts = learner(backbone)
    counts: list[int] = []
    for block in backbone.model.transformer.resblocks:
        block.mlp.register_forward_hook(lambda module, inputs, output: counts.append(output[..., 0].numel()))
    prompted = PromptedCLIP(backbone, prompts)
    prompted.text_features()
    own = int((prompts.end + 1 - 6).sum())
    assert counts == [6 + own, len(NAMES)]
    counts.clear()
    backbone.encode_texts(TEXTS)  # "a photo of a" and the start are 5 tokens
    assert counts == [5 + own, len(NAMES)]


def test_rows_are_almost_without_padding(tiny_backbone: Backbone):
    ends = [6 + number % 8 + 2 for number in range(1000)]
    layout = tiny_backbone.text_encoder.layout(ends, prefix=6)
    own = sum(end + 1 - 6 for end in ends)
    assert own <= len(layout.source) - 6 < 1.02 * own


def test_a_thousand_classes_take_less_memory_than_one_by_one(tiny_backbone: Backbone):
    names = [f"{name} {number}" for number in range(150) for name in NAMES]
    prompts = PromptLearner(tiny_backbone, names, n_ctx=16)
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    saved = []
    for compute in (
        lambda: PromptedCLIP(tiny_backbone, prompts).text_features(),
        lambda: tiny_backbone.text_encoder(*prompts()),
    ):
        sizes.clear()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            features = compute()
        assert features.requires_grad
        saved.append(sum(sizes.values()))
    assert saved[0] < saved[1] / 2
