"""Small random backbones of every family in open_clip's on-disk layout, and the same weights in other libraries.

A folder of these is what a person has on disk; `load_backbone` takes it. `clip_of_transformers` and
`siglip_of_transformers` build transformers' own models of the same weights, whatever the size.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from air_plugin.clip.backbone import Backbone
from air_plugin.clip.loading import load_backbone

FAMILIES = ("vit", "resnet", "openclip", "siglip", "siglip2")
SIDE = 32
OPENAI = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}
SIGLIP = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
WORDS = ("a", "photo", "of", "dog", "cat", "sea", "or", "lake", "crop", "land", "annual", "bird")


def model_config(family: str) -> dict[str, Any]:
    """The settings of a small model, as the family's own JSON in open_clip has them."""
    text: dict[str, Any] = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    vision: dict[str, Any] = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": SIDE}
    if family == "resnet":
        vision = {"layers": [1, 1, 1, 1], "width": 8, "head_width": 32, "image_size": SIDE}
    if family in ("vit", "resnet", "openclip"):
        return {"embed_dim": 24, "quick_gelu": family != "openclip", "vision_cfg": vision, "text_cfg": text}
    text |= {
        "context_length": 24,
        "vocab_size": 64,
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
        "norm_kwargs": {"eps": 1e-6},
        "hf_tokenizer_name": "none/of-the-hub",
        "tokenizer_kwargs": {"clean": "canonicalize"},
    }
    if family == "siglip2":
        text["act_kwargs"] = {"approximate": "tanh"}
    register_small_siglip()
    trunk = "small_siglip_of_the_tests"
    vision = {"image_size": SIDE, "timm_model_name": trunk, "timm_pool": "map", "timm_proj": "none"}
    return {"embed_dim": 32, "init_logit_bias": -10, "custom_text": True, "vision_cfg": vision, "text_cfg": text}


def register_small_siglip() -> None:
    """Let timm know an image tower like `vit_base_patch16_siglip_224`, only small."""
    import timm
    from timm.models.vision_transformer import VisionTransformer

    def small_siglip_of_the_tests(pretrained: bool = False, **options: Any) -> nn.Module:
        return VisionTransformer(
            img_size=SIDE,
            patch_size=8,
            embed_dim=32,
            depth=2,
            num_heads=2,
            class_token=False,
            global_pool=options["global_pool"],
            num_classes=options["num_classes"],
        )

    if not timm.is_model("small_siglip_of_the_tests"):
        timm.models.register_model(small_siglip_of_the_tests)


def scramble(model: nn.Module, *, seed: int = 0) -> None:
    """Random weights that leave nothing out: norms, biases and statistics of batches, too, and larger embeddings."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith("running_var") or (name.endswith("weight") and value.ndim == 1):
                value.uniform_(0.5, 1.5, generator=rng)
            elif value.is_floating_point() and value.ndim == 1:  # biases, running means
                value.add_(torch.randn(value.shape, generator=rng) * 0.1)
            elif name.endswith(("token_embedding.weight", "positional_embedding")) or "attnpool" in name:
                value.normal_(std=0.5, generator=rng)
            elif value.ndim == 4:  # so that what a picture shows is not lost on the way through a residual network
                value.normal_(std=(2 / value[0].numel()) ** 0.5, generator=rng)


def make_model(family: str, *, seed: int = 0) -> Any:
    import open_clip

    config = model_config(family)
    custom = config.pop("custom_text", False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**config)
    scramble(model, seed=seed)
    return model.eval().requires_grad_(False)


def write_tokenizer(folder: Path, family: str) -> None:
    """A tokenizer as SigLIP's (T5: a text begins with a space, end and padding are one token) or SigLIP2's (Gemma)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    gemma = family == "siglip2"
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = ["<pad>", "</s>", "<unk>", "▁", *letters, *(f"▁{word}" for word in WORDS), *WORDS[1:]]
    scores = [0.0, 0.0, 0.0, -9.0, *[-9.0] * 26, *[-1.0] * len(WORDS), *[-1.0] * (len(WORDS) - 1)]
    scheme = "never" if gemma else "always"
    tokenizer = Tokenizer(models.Unigram(list(zip(pieces, scores, strict=True)), unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>" if gemma else "</s>",
        padding_side="right",
    ).save_pretrained(folder)


def write_backbone(folder: Path, family: str, *, seed: int = 0) -> Path:
    """A small model as open_clip saves it: settings, weights and, for SigLIP, the tokenizer."""
    folder.mkdir(parents=True)
    config = {"model_cfg": model_config(family), "preprocess_cfg": SIGLIP if "siglip" in family else OPENAI}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(make_model(family, seed=seed).state_dict(), folder / "open_clip_model.safetensors")
    if "siglip" in family:
        write_tokenizer(folder, family)
    return folder


@functools.cache
def small_backbone(family: str, precision: str = "fp32") -> Backbone:
    """A small backbone, loaded from its folder. Everybody has the same one: do not change it."""
    with tempfile.TemporaryDirectory() as folder:
        return load_backbone(str(write_backbone(Path(folder) / family, family)), precision=precision)


def own_forward(
    backbone: Backbone, context: Tensor, text: str, *, encode: Callable[[Tensor], Tensor], embedding: nn.Module
) -> Tensor:
    """What a model's own forward, whose code is not ours, makes of a text with a learned context.

    Args:
        backbone: gives the tokens.
        context: (n, W).
        text: has n times the word "of" where the context goes.
        encode: (1, L) token ids to (1, D) features, not normalised.
        embedding: of the tokens, inside of `encode`.

    Returns:
        (D,) features, not normalised.
    """
    ids = backbone.tokenize([text])
    inner = int(backbone.ends(backbone.tokenize(["a"]))) - 1  # the last word's position
    spellings = [int(backbone.tokenize(["of"])[0, inner]), int(backbone.tokenize(["a of"])[0, inner + 1])]
    places = torch.isin(ids[0], torch.tensor(spellings)).nonzero()[:, 0]
    assert len(places) == len(context)

    def put(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output.index_copy(1, places, context[None].to(output))

    hook = embedding.register_forward_hook(put)
    try:
        return encode(ids)[0]
    finally:
        hook.remove()


def clip_of_transformers(model: Any) -> Any:
    """transformers' CLIPModel with the weights of an open_clip ViT CLIP."""
    from transformers import CLIPConfig, CLIPModel

    act = "quick_gelu" if "QuickGELU" in repr(model.transformer.resblocks[0].mlp) else "gelu"

    def tower(transformer: Any) -> dict[str, Any]:
        block = transformer.resblocks[0]
        width = block.mlp.c_proj.out_features
        return {
            "hidden_size": width,
            "intermediate_size": block.mlp.c_fc.out_features,
            "hidden_act": act,
            "num_hidden_layers": len(transformer.resblocks),
            "num_attention_heads": block.attn.num_heads,
        }

    size, patch = model.visual.image_size[0], model.visual.patch_size[0]
    config = CLIPConfig(
        text_config={
            **tower(model.transformer),
            "max_position_embeddings": model.context_length,
            "vocab_size": 49408,
            "bos_token_id": 49406,
            "eos_token_id": 49407,
        },
        vision_config={**tower(model.visual.transformer), "image_size": size, "patch_size": patch},
        projection_dim=model.text_projection.shape[1],
    )
    theirs, ours = CLIPModel(config), model.state_dict()
    weights = {
        "logit_scale": ours["logit_scale"],
        "text_model.embeddings.token_embedding.weight": ours["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": ours["positional_embedding"],
        "text_projection.weight": ours["text_projection"].T,
        "vision_model.embeddings.class_embedding": ours["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": ours["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": ours["visual.positional_embedding"],
        "visual_projection.weight": ours["visual.proj"].T,
    }
    for one, other in (
        ("text_model.final_layer_norm", "ln_final"),
        ("vision_model.pre_layrnorm", "visual.ln_pre"),
        ("vision_model.post_layernorm", "visual.ln_post"),
    ):
        weights |= _pair(one, ours, other)
    for tower_name, prefix in (("text_model", ""), ("vision_model", "visual.")):
        weights |= _blocks(f"{tower_name}.encoder.layers", ours, f"{prefix}transformer.resblocks")
    return _loaded(theirs, weights)


def siglip_of_transformers(model: Any, *, text_act: str, image_act: str = "gelu") -> Any:
    """transformers' SiglipModel with the weights of an open_clip SigLIP, whose image tower is timm's."""
    from transformers import SiglipConfig, SiglipModel

    trunk, text, ours = model.visual.trunk, model.text, model.state_dict()
    block = text.transformer.resblocks[0]
    config = SiglipConfig(
        text_config={
            "hidden_size": text.width,
            "intermediate_size": block.mlp.c_fc.out_features,
            "hidden_act": text_act,
            "num_hidden_layers": len(text.transformer.resblocks),
            "num_attention_heads": text.heads,
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.context_length,
            "projection_size": text.output_dim,
            "bos_token_id": None,
            "eos_token_id": 1,
            "pad_token_id": 1,
        },
        vision_config={
            "hidden_size": trunk.embed_dim,
            "intermediate_size": trunk.blocks[0].mlp.fc1.out_features,
            "num_hidden_layers": len(trunk.blocks),
            "num_attention_heads": trunk.blocks[0].attn.num_heads,
            "image_size": trunk.patch_embed.img_size[0],
            "patch_size": trunk.patch_embed.patch_size[0],
            "hidden_act": image_act,
        },
    )
    weights = {
        "logit_scale": ours["logit_scale"].reshape(1),
        "logit_bias": ours["logit_bias"].reshape(1),
        "text_model.embeddings.token_embedding.weight": ours["text.token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": ours["text.positional_embedding"],
        "vision_model.embeddings.position_embedding.weight": ours["visual.trunk.pos_embed"][0],
        "vision_model.head.probe": ours["visual.trunk.attn_pool.latent"],
    }
    pool, head = "visual.trunk.attn_pool", "vision_model.head"
    for one, other in (
        ("text_model.final_layer_norm", "text.ln_final"),
        ("text_model.head", "text.text_projection"),
        ("vision_model.embeddings.patch_embedding", "visual.trunk.patch_embed.proj"),
        ("vision_model.post_layernorm", "visual.trunk.norm"),
        (f"{head}.layernorm", f"{pool}.norm"),
        (f"{head}.attention.out_proj", f"{pool}.proj"),
        (f"{head}.mlp.fc1", f"{pool}.mlp.fc1"),
        (f"{head}.mlp.fc2", f"{pool}.mlp.fc2"),
    ):
        weights |= _pair(one, ours, other)
    for kind in ("weight", "bias"):
        weights[f"{head}.attention.in_proj_{kind}"] = torch.cat([ours[f"{pool}.q.{kind}"], ours[f"{pool}.kv.{kind}"]])
    weights |= _blocks("text_model.encoder.layers", ours, "text.transformer.resblocks")
    weights |= _blocks("vision_model.encoder.layers", ours, "visual.trunk.blocks", timm=True)
    return _loaded(SiglipModel(config), weights)


def _pair(one: str, ours: dict[str, Tensor], other: str) -> dict[str, Tensor]:
    return {f"{one}.{kind}": ours[f"{other}.{kind}"] for kind in ("weight", "bias")}


def _blocks(one: str, ours: dict[str, Tensor], other: str, *, timm: bool = False) -> dict[str, Tensor]:
    """The weights of all blocks of a transformer; transformers' has three projections where the others have one."""
    weights: dict[str, Tensor] = {}
    count = len({name.removeprefix(f"{other}.").split(".")[0] for name in ours if name.startswith(f"{other}.")})
    for number in range(count):
        to, of = f"{one}.{number}", f"{other}.{number}"
        joint = "attn.qkv." if timm else "attn.in_proj_"
        for kind in ("weight", "bias"):
            parts = zip("qkv", ours[f"{of}.{joint}{kind}"].chunk(3), strict=True)
            weights |= {f"{to}.self_attn.{part}_proj.{kind}": value for part, value in parts}
        names = (
            {
                "layer_norm1": "norm1",
                "layer_norm2": "norm2",
                "self_attn.out_proj": "attn.proj",
                "mlp.fc1": "mlp.fc1",
                "mlp.fc2": "mlp.fc2",
            }
            if timm
            else {
                "layer_norm1": "ln_1",
                "layer_norm2": "ln_2",
                "self_attn.out_proj": "attn.out_proj",
                "mlp.fc1": "mlp.c_fc",
                "mlp.fc2": "mlp.c_proj",
            }
        )
        for name, source in names.items():
            weights |= _pair(f"{to}.{name}", ours, f"{of}.{source}")
    return weights


def _loaded(theirs: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """The model with exactly these weights: none missing, none too many."""
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    missing = [name for name in missing if not name.endswith("position_ids")]
    assert not missing and not unexpected, (missing, unexpected)
    return theirs.eval().requires_grad_(False)
