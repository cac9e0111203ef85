"""Small random dual encoders as transformers saves them: weights, tokenizer and image processor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from small_backbones import WORDS, clip_of_transformers, make_model, scramble, siglip_of_transformers, write_tokenizer

KINDS = ("clip", "siglip", "siglip2", "siglip2_naflex", "altclip", "blip2")


def write_clip_tokenizer(folder: Path) -> None:
    """OpenAI's byte-pair encoding, from open_clip's file, as transformers has it."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer

    own = SimpleTokenizer()
    vocabulary = dict(own.encoder)
    vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"] = own.sot_token_id, own.eot_token_id
    vocabulary = {token: n for token, n in vocabulary.items() if token not in ("<start_of_text>", "<end_of_text>")}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    merges = "\n".join(" ".join(pair) for pair in own.bpe_ranks)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    CLIPTokenizer.from_pretrained(folder).save_pretrained(folder)


def small_altclip() -> Any:
    """A dual encoder whose text tower is bidirectional, numbers positions behind the padding, and pools the start."""
    from transformers import AltCLIPConfig, AltCLIPModel

    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AltCLIPConfig(
        text_config={
            **tower,
            "vocab_size": 80,
            "max_position_embeddings": 40,
            "project_dim": 24,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": None,
        },
        vision_config={**tower, "image_size": 32, "patch_size": 8},
        projection_dim=24,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AltCLIPModel(config)
    with torch.no_grad():
        model.text_model.get_input_embeddings().weight.normal_(std=0.5, generator=torch.Generator().manual_seed(1))
    return model.eval()


def write_siglip2_tokenizer(folder: Path) -> None:
    """Gemma's byte pairs in transformers' class for SigLIP 2: lower case, no token ends a text."""
    from transformers import Siglip2Tokenizer

    letters = ["\u2581", ".", *"abcdefghijklmnopqrstuvwxyz"]
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *letters, "do", "dog", "ca", "cat", "of", "\u2581of"]
    merges = [("d", "o"), ("do", "g"), ("c", "a"), ("ca", "t"), ("o", "f"), ("\u2581", "of")]
    vocabulary = {piece: n for n, piece in enumerate(pieces)}
    Siglip2Tokenizer(vocab=vocabulary, merges=merges, padding_side="right").save_pretrained(folder)


def small_naflex(*, positions: int = 16) -> Any:
    """SigLIP 2 NaFlex, which takes images as sequences of patches, with so many position embeddings."""
    from transformers import Siglip2Config, Siglip2Model

    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Siglip2Config(
        text_config={**tower, "vocab_size": 80, "max_position_embeddings": 24, "projection_size": 32},
        vision_config={**tower, "patch_size": 8, "num_patches": positions},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Siglip2Model(config)
    scramble(model)
    return model.eval()


def write_bert_tokenizer(folder: Path) -> None:
    """BERT's word pieces with a token [DEC], as BLIP-2 has them; a text is [CLS] .. [SEP]."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = [*special, ".", *letters, *(f"##{letter}" for letter in letters), *WORDS[1:]]
    vocabulary = {piece: n for n, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="[DEC]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)


def small_blip2(*, queries: int = 5) -> Any:
    """BLIP-2's image-text model, whose images have several vectors."""
    from transformers import Blip2Config, Blip2ForImageTextRetrieval, Blip2QFormerConfig, Blip2VisionConfig

    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**tower, image_size=32, patch_size=8).to_dict(),
        qformer_config=Blip2QFormerConfig(
            **tower, vocab_size=80, max_position_embeddings=40, encoder_hidden_size=32, use_qformer_text_input=True
        ).to_dict(),
        num_query_tokens=queries,
        image_text_hidden_size=24,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Blip2ForImageTextRetrieval(config)
    scramble(model)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model.query_tokens.normal_(generator=rng)
        for weight in model.parameters():
            if weight.ndim == 2:  # so that what an image or a text shows decides which vector is the nearest
                weight.normal_(std=2 * weight.shape[1] ** -0.5, generator=rng)
        model.vision_projection.bias.zero_()
        model.text_projection.bias.zero_()
    return model.eval()


def write_folder(folder: Path, kind: str) -> Any:
    """A small random model as transformers saves it; returns the model."""
    from transformers import BlipImageProcessor, CLIPImageProcessor, Siglip2ImageProcessor, SiglipImageProcessor

    folder.mkdir()
    if kind in ("siglip", "siglip2"):
        model = siglip_of_transformers(make_model("siglip2"), text_act="gelu_pytorch_tanh")
        if kind == "siglip2":
            write_siglip2_tokenizer(folder)
        else:
            write_tokenizer(folder, "siglip2")
            config = json.loads((folder / "tokenizer_config.json").read_text())
            (folder / "tokenizer_config.json").write_text(json.dumps({**config, "model_input_names": ["input_ids"]}))
        SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    elif kind == "siglip2_naflex":
        model = small_naflex()
        write_siglip2_tokenizer(folder)
        Siglip2ImageProcessor(patch_size=8, max_num_patches=16).save_pretrained(folder)
    elif kind == "blip2":
        model = small_blip2()
        write_bert_tokenizer(folder)
        BlipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    else:
        model = clip_of_transformers(make_model("vit")) if kind == "clip" else small_altclip()
        write_clip_tokenizer(folder) if kind == "clip" else write_tokenizer(folder, "siglip2")
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    model.save_pretrained(folder)
    return model.eval()
