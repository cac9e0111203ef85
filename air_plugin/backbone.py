"""Vision-language backbones: one name in the config picks one, and trainers see nothing of where it came from."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from air_plugin.errors import UserError, unknown
from air_plugin.prompts import PromptEncoder
from air_plugin.store import tensor_digest

OPENAI_NAMES = ("RN50", "RN101", "RN50x4", "RN50x16", "ViT-B/32", "ViT-B/16", "ViT-L/14")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class Backbone:
    """A frozen CLIP with what is needed to use it.

    name: as in the config.
    model: an open_clip model, in evaluation mode.
    preprocess: PIL image to a (3, H, W) tensor.
    tokenizer: texts to (T, L) token ids, padded with zeros.
    """

    name: str
    model: Any
    preprocess: Callable[[Any], Tensor]
    tokenizer: Callable[..., Tensor]
    image_size: int
    context_length: int

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def logit_scale(self) -> float:
        """s, the factor of the cosine in the logits."""
        return float(self.model.logit_scale.exp())

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the weights: the same model under two names has the same one."""
        return tensor_digest(dict(self.model.state_dict()))

    @functools.cached_property
    def prompt_encoder(self) -> PromptEncoder:
        return PromptEncoder(self.model)

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) preprocessed pixels to (N, D) unit features in float32."""
        weights = list(self.model.visual.parameters())
        # In half precision open_clip leaves embeddings and norms in fp32; the convolution that reads the pixels is not.
        dtype = next((weight.dtype for weight in weights if weight.ndim == 4), weights[0].dtype)
        features = self.model.encode_image(pixels.to(weights[0].device, dtype))
        return nn.functional.normalize(features.float(), dim=1)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Texts to (T, L) token ids.

        Raises:
            UserError: a text is longer than the context; it is never cut in silence.
        """
        tokens = self.tokenizer(list(texts), context_length=self.context_length)
        longer = self.tokenizer(list(texts), context_length=2 * self.context_length)
        for text, ids in zip(texts, longer, strict=True):
            if (ids[self.context_length :] != ids[-1]).any():  # anything but padding
                raise UserError(f"text '{text}' is longer than the {self.context_length} tokens of {self.name}")
        return tokens

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts to (T, D) unit features in float32."""
        tokens = self.tokenize(texts).to(self.device)
        return nn.functional.normalize(self.prompt_encoder.encode_tokens(tokens).float(), dim=1)

    def text_probs(self, features: Tensor, text_features: Tensor) -> Tensor:
        """(N, D) image and (C, D) text features to (N, C) softmax(s f t): zero-shot CLIP."""
        return (self.logit_scale * features @ text_features.T).softmax(dim=1)


def load_backbone(name: str, *, precision: str = "fp32", device: str | torch.device = "cpu") -> Backbone:
    """Load a backbone.

    Args:
        name: `mini` (the embedded default); an OpenAI name ("ViT-B/32"); an open_clip architecture with its pretrained
            tag ("ViT-B-16:laion2b_s34b_b88k") or a local weight file ("ViT-B-32-quickgelu:weights.safetensors"); or
            a folder that open_clip or the hub saved (open_clip_config.json, open_clip_model.safetensors).
        precision: fp32, fp16 or bf16.
        device: where the model lies.

    Raises:
        UserError: the name is not known, or a file is missing or not one of safetensors.
    """
    if precision not in DTYPES:
        raise unknown("precision", precision, DTYPES)
    backbone = _load_mini() if name == "mini" else _load_open_clip(name, precision)
    backbone.model.to(device).eval().requires_grad_(False)
    if precision != "fp32" and name == "mini":
        backbone.model.to(DTYPES[precision])
    return backbone


def _load_mini() -> Backbone:
    import open_clip

    from air_plugin import mini

    preprocess = open_clip.image_transform(mini.IMAGE_SIZE, is_train=False, mean=mini.MEAN, std=mini.STD)
    model, tokenizer = mini.load_clip(), mini.tokenizer()
    return Backbone("mini", model, preprocess, tokenizer, mini.IMAGE_SIZE, model.context_length)


def _load_open_clip(name: str, precision: str) -> Backbone:
    import open_clip

    if Path(name).is_dir():
        architecture, tag, options = _folder(Path(name))
    else:
        architecture, tag, options = _resolve(name)
    try:
        model, preprocess = open_clip.create_model_from_pretrained(
            architecture, pretrained=tag, precision=precision, **options
        )
        tokenizer = open_clip.get_tokenizer(architecture)
    except (RuntimeError, ValueError, OSError, AssertionError, KeyError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"backbone '{name}' cannot be loaded: {first_line}") from error
    size = model.visual.image_size
    length = getattr(model, "context_length", None) or model.text.context_length
    return Backbone(name, model, preprocess, tokenizer, size[0] if isinstance(size, tuple) else size, length)


def _folder(path: Path) -> tuple[str, None, dict[str, Any]]:
    """A local folder as open_clip's loader takes it."""
    _require_safetensors(path / "open_clip_model.safetensors")
    return f"local-dir:{path}", None, {}


def _resolve(name: str) -> tuple[str, str | None, dict[str, Any]]:
    """A name to open_clip's architecture, its tag or file, and options."""
    import open_clip

    architecture, _, source = name.partition(":")
    if architecture in OPENAI_NAMES and not source:
        source = "openai"
    architecture = architecture.replace("/", "-")
    if architecture not in open_clip.list_models():
        error = unknown("backbone", name, ["mini", *OPENAI_NAMES, *open_clip.list_models()])
        if "did you mean" not in str(error) and ("/" in name or Path(name).suffix):
            raise UserError(f"backbone '{name}' is no folder and no ARCHITECTURE:FILE; see load_backbone for the forms")
        raise error
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if source in tags:
        # OpenAI's weights want QuickGELU; the plain architecture would load them without a word and be wrong.
        quick = bool(open_clip.get_pretrained_cfg(architecture, source).get("quick_gelu"))
        return architecture, source, {"force_quick_gelu": quick}
    if not source or not (source.endswith(".safetensors") or Path(source).exists()):
        raise UserError(f"backbone '{name}' names no weights; write {architecture}:TAG, TAG one of: {', '.join(tags)}")
    _require_safetensors(Path(source))
    return architecture, source, {}


def _require_safetensors(path: Path) -> None:
    if path.suffix != ".safetensors":
        raise UserError(f"{path} is not a .safetensors file; weights in pickles are not loaded, convert them first")
    if not path.is_file():
        raise UserError(f"backbone weights {path} are missing")
