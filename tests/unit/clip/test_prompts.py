"""The text tower and the prompts, against the model's own encoder and straightforward concatenation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from openai_towers import host_model
from small_backbones import FAMILIES, clip_of_transformers, own_forward, siglip_of_transformers, small_backbone
from small_models import make_backbone, make_clip
from torch import Tensor, nn
from torch.nn.functional import normalize

from air_plugin.clip.backbone import Backbone
from air_plugin.clip.prompts import PromptLearner
from air_plugin.clip.text_encoder import TextEncoder
from air_plugin.utils.errors import UserError

TEXTS = ["a photo of a dog.", "cat", "a satellite photo of annual crop land with trees and a river in the north"]
NAMES = ["dog", "annual crop land", "sea_or_lake"]


class CountingEncoder(TextEncoder):
    """Notes how long the sequences are that the tower reads."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.lengths: list[int] = []
        self.ln_final.register_forward_hook(lambda module, inputs, output: self.lengths.append(output.shape[1]))


# TextEncoder


def test_encoder_equals_the_models_own(tiny_backbone: Backbone):
    tokens = tiny_backbone.tokenize(TEXTS)
    ours = TextEncoder(tiny_backbone.model).encode_tokens(tokens)
    theirs = tiny_backbone.model.encode_text(tokens)
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert (theirs[0] - theirs[1]).abs().max() > 0.1  # the small model tells texts apart


def test_encoder_reads_no_further_than_the_longest_prompt():
    backbone = make_backbone()
    encoder = CountingEncoder(backbone.model)
    tokens = backbone.tokenize(TEXTS)
    end = tokens.argmax(dim=1)
    short = encoder(encoder.token_embedding(tokens), end)
    assert encoder.lengths == [int(end.max()) + 1]
    lengthened = torch.cat([tokens, tokens[:1] * 0 + 1])  # one more prompt, whose end is the context's
    lengthened[-1, -1] = 49407
    whole = encoder(encoder.token_embedding(lengthened), lengthened.argmax(dim=1))[:-1]
    assert encoder.lengths[-1] == 77
    assert torch.allclose(short, whole, atol=1e-5)


def test_truncation_keeps_the_gradient(tiny_backbone: Backbone):
    encoder, tokens = TextEncoder(tiny_backbone.model), tiny_backbone.tokenize(TEXTS)
    end = tokens.argmax(dim=1)
    short = tiny_backbone.model.token_embedding(tokens).requires_grad_()
    encoder(short, end)[:, 0].sum().backward()
    whole = short.detach().clone().requires_grad_()
    x = tiny_backbone.model.transformer(
        whole + tiny_backbone.model.positional_embedding, attn_mask=tiny_backbone.model.attn_mask
    )
    x = tiny_backbone.model.ln_final(x)[torch.arange(3), end] @ tiny_backbone.model.text_projection
    x[:, 0].sum().backward()
    assert torch.allclose(short.grad, whole.grad, atol=1e-5)
    assert short.grad.abs().max() > 1e-3


def test_host_model_gives_the_same_features_and_gradients(tiny_backbone: Backbone):
    host, tokens = host_model(tiny_backbone.model), tiny_backbone.tokenize(TEXTS)
    assert torch.allclose(host.encode_text(tokens), tiny_backbone.model.encode_text(tokens), atol=1e-5)
    results = []
    for model in (tiny_backbone.model, host):
        embeddings = model.token_embedding(tokens).requires_grad_()
        features = TextEncoder(model)(embeddings, tokens.argmax(dim=1))
        normalize(features, dim=1)[:, :3].sum().backward()
        results.append((features.detach(), embeddings.grad))
    (features, gradient), (host_features, host_gradient) = results
    assert torch.allclose(host_features, features, atol=1e-5)
    assert torch.allclose(host_gradient, gradient, atol=1e-5) and gradient.abs().max() > 1e-3


def test_host_model_still_works_afterwards(tiny_backbone: Backbone):
    host, tokens = host_model(tiny_backbone.model), tiny_backbone.tokenize(TEXTS)
    before = host.encode_text(tokens)
    TextEncoder(host).encode_tokens(tokens)
    assert torch.equal(host.encode_text(tokens), before)
    assert all(block.attn_mask.shape == (77, 77) for block in host.transformer.resblocks)


@pytest.mark.parametrize("projection", ["matrix", "linear", None])
def test_every_kind_of_projection(projection: str | None):
    model = make_clip()
    if projection == "linear":
        linear = nn.Linear(32, 24, bias=False).requires_grad_(False)
        linear.weight.copy_(model.text_projection.T)
        del model.text_projection
        model.text_projection = linear
    elif projection is None:
        model.text_projection = None
    tokens = torch.tensor([[49406, 320, 49407, 0], [49406, 1929, 269, 49407]])
    tokens = nn.functional.pad(tokens, (0, 73))
    assert torch.allclose(TextEncoder(model).encode_tokens(tokens), model.encode_text(tokens), atol=1e-5)


def test_model_with_a_text_tower_of_its_own():
    import open_clip

    vision = open_clip.CLIPVisionCfg(layers=1, width=32, head_width=16, patch_size=8, image_size=16)
    text = open_clip.CLIPTextCfg(context_length=20, vocab_size=50, width=32, heads=2, layers=1)
    torch.manual_seed(0)
    model = open_clip.CustomTextCLIP(24, vision, text).eval()
    tokens = torch.tensor([[48, 3, 49, 0, 0, 0], [48, 7, 8, 9, 49, 0]])
    tokens = nn.functional.pad(tokens, (0, 14))
    assert torch.allclose(TextEncoder(model).encode_tokens(tokens), model.encode_text(tokens), atol=1e-5)


def test_tower_without_a_mask_that_pools_the_last_token():
    """As SigLIP's: every token sees every other, so nothing may be cut."""
    import open_clip

    vision = open_clip.CLIPVisionCfg(layers=1, width=32, head_width=16, patch_size=8, image_size=16)
    text = open_clip.CLIPTextCfg(
        context_length=20, vocab_size=50, width=32, heads=2, layers=1, no_causal_mask=True, pool_type="last"
    )
    torch.manual_seed(0)
    model = open_clip.CustomTextCLIP(24, vision, text).eval()
    tokens = nn.functional.pad(torch.tensor([[3, 4, 5], [6, 7, 8]]), (0, 17), value=1)
    assert torch.allclose(TextEncoder(model).encode_tokens(tokens), model.encode_text(tokens), atol=1e-5)


def test_tower_that_pools_the_first_end_token():
    import open_clip

    vision = open_clip.CLIPVisionCfg(layers=1, width=32, head_width=16, patch_size=8, image_size=16)
    text = open_clip.CLIPTextCfg(
        context_length=20, vocab_size=50, width=32, heads=2, layers=1, pool_type="eos", eos_id=4
    )
    torch.manual_seed(0)
    model = open_clip.CustomTextCLIP(24, vision, text).eval()
    tokens = torch.tensor([[48, 49, 4, 0, 0, 0], [48, 7, 8, 9, 4, 0]])  # the end is not the largest id
    tokens = nn.functional.pad(tokens, (0, 14))
    assert torch.allclose(TextEncoder(model).encode_tokens(tokens), model.encode_text(tokens), atol=1e-5)


def test_towers_of_another_kind_are_refused():
    import open_clip

    vision = open_clip.CLIPVisionCfg(layers=1, width=32, head_width=16, patch_size=8, image_size=16)
    text = open_clip.CLIPTextCfg(context_length=20, vocab_size=50, width=32, heads=2, layers=1, embed_cls=True)
    with pytest.raises(UserError, match="not supported"):
        TextEncoder(open_clip.CustomTextCLIP(24, vision, text))
    model = nn.Module()
    model.text = nn.Linear(2, 2)  # as open_clip's wrapper of transformers' text models: no embeddings of ours
    with pytest.raises(UserError, match="Linear"):
        TextEncoder(model)


def test_unknown_pooling_is_refused():
    model = make_clip()
    model.text_pool_type = "first"
    with pytest.raises(UserError, match="first"):
        TextEncoder(model)


# PromptLearner


def concatenate(backbone: Backbone, learner: PromptLearner, *, position: str) -> tuple[list[Tensor], list[int]]:
    """Each prompt's embeddings up to its end-of-text token, and where that is: the obvious way."""
    embedding = backbone.model.token_embedding
    prompts = []
    for number, name in enumerate(NAMES):
        context = learner.ctx[number] if learner.ctx.ndim == 3 else learner.ctx
        ids = backbone.tokenizer.encode(name.replace("_", " "))
        half = len(context) // 2
        before = {"end": context, "middle": context[:half], "front": context[:0]}[position]
        after = {"end": context[:0], "middle": context[half:], "front": context}[position]
        start, stop, end = (embedding(torch.tensor([i])) for i in (49406, backbone.tokenizer.encode(".")[0], 49407))
        prompts.append(torch.cat([start, before, embedding(torch.tensor(ids)), after, stop, end]))
    return prompts, [len(prompt) - 1 for prompt in prompts]


@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize("class_specific", [False, True])
@pytest.mark.parametrize("n_ctx", [1, 4, 5])
def test_prompts_equal_concatenation(tiny_backbone: Backbone, position: Any, class_specific: bool, n_ctx: int):
    learner = PromptLearner(
        tiny_backbone,
        NAMES,
        n_ctx=n_ctx,
        class_specific=class_specific,
        position=position,
        generator=torch.Generator().manual_seed(0),
    )
    with torch.no_grad():  # classes differ, too, where each has its own
        learner.ctx.add_(torch.randn(learner.ctx.shape, generator=torch.Generator().manual_seed(1)))
    assert learner.ctx.shape == ((3, n_ctx, 32) if class_specific else (n_ctx, 32))
    embeddings, end = learner()
    expected, ends = concatenate(tiny_backbone, learner, position=position)
    assert end.tolist() == ends and embeddings.shape == (3, 77, 32)
    for row, prompt in zip(embeddings, expected, strict=True):
        assert torch.equal(row[: len(prompt)], prompt)


def test_only_the_context_is_learned_and_every_class_moves_it(tiny_backbone: Backbone):
    learner = PromptLearner(tiny_backbone, NAMES, n_ctx=4)
    assert [name for name, _ in learner.named_parameters()] == ["ctx"]
    features = TextEncoder(tiny_backbone.model)(*learner())
    for row in features:
        (gradient,) = torch.autograd.grad(row.sum(), learner.ctx, retain_graph=True)
        assert gradient.abs().sum(dim=1).min() > 0  # every context token matters to every class


def test_class_specific_contexts_do_not_touch_each_other(tiny_backbone: Backbone):
    learner = PromptLearner(tiny_backbone, NAMES, n_ctx=4, class_specific=True)
    TextEncoder(tiny_backbone.model)(*learner())[1].sum().backward()
    assert learner.ctx.grad[1].abs().min() > 0
    assert learner.ctx.grad[[0, 2]].abs().max() == 0


@pytest.mark.parametrize("class_specific", [False, True])
def test_context_of_a_templates_words_gives_the_templates_features(tiny_backbone: Backbone, class_specific: bool):
    learner = PromptLearner(tiny_backbone, NAMES, n_ctx=16, ctx_init="a_photo of a", class_specific=class_specific)
    assert learner.ctx.shape[-2] == 4  # n_ctx is not looked at
    features = TextEncoder(tiny_backbone.model)(*learner())
    texts = [f"a photo of a {name.replace('_', ' ')}." for name in NAMES]
    assert torch.allclose(normalize(features, dim=1), tiny_backbone.encode_texts(texts), atol=1e-6)


def test_random_context_has_its_spread_and_depends_on_the_generator_alone(tiny_backbone: Backbone):
    def context(seed: int) -> Tensor:
        return PromptLearner(tiny_backbone, NAMES, n_ctx=60, generator=torch.Generator().manual_seed(seed)).ctx.detach()

    first = context(1)
    torch.manual_seed(7)
    assert torch.equal(context(1), first) and not torch.equal(context(2), first)
    assert first.std().item() == pytest.approx(0.02, rel=0.1)


def test_overlong_prompts_are_errors_that_name_the_class(tiny_backbone: Backbone):
    with pytest.raises(UserError, match="annual crop land"):
        PromptLearner(tiny_backbone, NAMES, n_ctx=72)  # start, 72, annual crop land, full stop, end: 78
    fitting = PromptLearner(tiny_backbone, NAMES, n_ctx=71)
    assert fitting.end.max() == 76
    with pytest.raises(UserError, match="very"):
        PromptLearner(tiny_backbone, ["dog", "very " * 80 + "long"], n_ctx=1)


def test_checkpoint_round_trip(tiny_backbone: Backbone):
    first = PromptLearner(tiny_backbone, NAMES, n_ctx=4, generator=torch.Generator().manual_seed(0))
    second = PromptLearner(tiny_backbone, NAMES, n_ctx=4, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(first.ctx, second.ctx)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.ctx, second.ctx)


def test_checkpoint_holds_only_tensors_that_can_be_read_safely(tiny_backbone: Backbone, tmp_path):
    learner = PromptLearner(tiny_backbone, NAMES, n_ctx=4)
    torch.save(learner.state_dict(), tmp_path / "prompts.pt")
    state = torch.load(tmp_path / "prompts.pt", weights_only=True)
    assert set(state) == {"ctx", "_extra_state"}
    learner.load_state_dict(state)


@pytest.mark.parametrize("class_specific", [False, True])
@pytest.mark.parametrize("others", [["dog", "cat", "fish"], NAMES[:2], NAMES[::-1]])
def test_checkpoint_of_other_classes_is_refused(tiny_backbone: Backbone, others: list[str], class_specific: bool):
    learner = PromptLearner(tiny_backbone, NAMES, n_ctx=4, class_specific=class_specific)
    other = PromptLearner(tiny_backbone, others, n_ctx=4, class_specific=class_specific)
    with pytest.raises(UserError, match="other classes"):
        learner.load_state_dict(other.state_dict())


def test_checkpoint_of_another_backbone_is_refused(tiny_backbone: Backbone):
    learner = PromptLearner(tiny_backbone, NAMES, n_ctx=4)
    other = PromptLearner(make_backbone(seed=1), NAMES, n_ctx=4)
    with pytest.raises(UserError, match="another backbone"):
        learner.load_state_dict(other.state_dict())


# Every family of backbones, learned prompts against the original architecture's own forward

SHAPES = {"end": "{0} {1} {2}.", "middle": "{0} {2} {1}.", "front": "{2} {0} {1}."}
KNOWN = ["dog", "annual crop land", "sea_or_lake"]  # classes whose words every small tokenizer has


def text_with_context(name: str, n_ctx: int, position: str) -> str:
    """A prompt with the word "of" where the context goes: the half of it before the name where that is in between."""
    first, second = ["of"] * (n_ctx // 2), ["of"] * (n_ctx - n_ctx // 2)
    return SHAPES[position].format(" ".join(first), " ".join(second), name.replace("_", " ")).strip()


def own_encoder(model: Any, *, transformers: bool) -> tuple[Any, nn.Module]:
    """The original's own text encoder and token embedding: open_clip's, or transformers' with the same weights."""
    text = getattr(model, "text", model)
    if not transformers:
        return model.encode_text, text.token_embedding
    if text is model:
        other = clip_of_transformers(model)
    else:
        tanh = "approximate='tanh'" in repr(text.transformer.resblocks[0].mlp)
        other = siglip_of_transformers(model, text_act="gelu_pytorch_tanh" if tanh else "gelu")
    return lambda ids: other.get_text_features(input_ids=ids).pooler_output, other.text_model.embeddings.token_embedding


@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize("n_ctx", [1, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_learned_prompts_and_their_gradients_are_the_models_own(family: str, n_ctx: int, position: Any):
    backbone = small_backbone(family)
    learner = PromptLearner(backbone, KNOWN, n_ctx=n_ctx, position=position, generator=torch.Generator().manual_seed(0))
    ours = backbone.text_encoder(*learner())
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((ours * weights).sum(), learner.ctx)
    assert gradient.norm(dim=1).min() > 0
    assert not any(value.requires_grad for value in backbone.model.parameters())
    for transformers in (False, True):
        if transformers and family == "resnet":
            continue  # its text tower is the same as vit's
        encode, embedding = own_encoder(backbone.model, transformers=transformers)
        context = learner.ctx.detach().clone().requires_grad_()
        texts = [text_with_context(name, n_ctx, position) for name in KNOWN]
        theirs = torch.stack(
            [own_forward(backbone, context, text, encode=encode, embedding=embedding) for text in texts]
        )
        assert torch.allclose(ours, theirs, atol=1e-4)
        (their_gradient,) = torch.autograd.grad((theirs * weights).sum(), context)
        assert torch.allclose(gradient, their_gradient, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_words_as_context_give_the_templates_features_in_every_family(family: str):
    """Gemma's tokens of a word differ at the beginning of a text, and SigLIP drops the full stop."""
    backbone = small_backbone(family)
    learner = PromptLearner(backbone, KNOWN, ctx_init="a photo of a")
    features = normalize(backbone.text_encoder(*learner()), dim=1)
    texts = [f"a photo of a {name.replace('_', ' ')}." for name in KNOWN]
    assert torch.allclose(features, backbone.encode_texts(texts), atol=1e-6)
    other = backbone.encode_texts([text.replace("dog", "cat").replace("lake", "land") for text in texts])
    assert (features - other)[[0, 2]].abs().max() > 1e-3  # the small models tell classes apart


@pytest.mark.parametrize("family", ["siglip", "siglip2"])
def test_siglips_prompts_fill_the_whole_context_and_keep_their_padding(family: str):
    backbone = small_backbone(family)
    learner = PromptLearner(backbone, KNOWN, n_ctx=20)
    embeddings, end = learner()
    assert embeddings.shape == (3, 24, 32) and end.tolist() == [21, 23, 23]
    padding = backbone.text_encoder.token_embedding.weight[1 if family == "siglip" else 0]
    assert torch.equal(embeddings[0, 22:], padding.expand(2, -1))
    with pytest.raises(UserError, match="annual crop land"):
        PromptLearner(backbone, KNOWN, n_ctx=21)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_learn_in_half_precision(family: str, precision: str):
    exact, half = small_backbone(family), small_backbone(family, precision)
    rows = []
    for backbone in (exact, half):
        learner = PromptLearner(backbone, KNOWN, n_ctx=4, generator=torch.Generator().manual_seed(0))
        features = normalize(backbone.text_encoder(*learner()).float(), dim=1)
        features[:, :3].sum().backward()
        rows.append((features.detach(), learner.ctx.grad))
    (features, gradient), (half_features, half_gradient) = rows
    assert learner.ctx.dtype == torch.float32
    assert torch.allclose(half_features, features, atol=0.03) and not torch.equal(half_features, features)
    assert torch.cosine_similarity(half_gradient.flatten(), gradient.flatten(), dim=0) > 0.98
