"""Vision-language backbones: trainers use every CLIP through one class, whatever library or file it comes from."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from air_plugin.clip.text_encoder import TextEncoder, end_positions
from air_plugin.functional.similarity import cosines
from air_plugin.utils.errors import UserError
from air_plugin.utils.tensors import tensor_digest, unit_rows


@dataclass(frozen=True)
class Backbone:
    """A frozen CLIP with its image preparation and tokenizer. Made by `load_backbone`.

    name: as in the config.
    model: an open_clip model, or one of transformers behind the same names, in evaluation mode.
    preprocess: PIL image to a (3, H, W) tensor.
    tokenizer: texts to (T, L) token ids: each text, an end-of-text token, then padding.
    image_size: side of the images in pixels.
    context_length: L, the largest number of tokens of a text.
    autocast: type in which the image tower computes what torch's autocast lists, its weights staying as they are; None:
        in the type of the weights. `load_backbone` sets it on a GPU. The text tower never uses it.
    precision: `load_backbone`'s argument, so that workers of an engine can load the same backbone; None where `model`
        is another one.

    Example:
        >>> backbone = load_backbone("ViT-B/32")
        >>> text = backbone.encode_texts(["a photo of a dog.", "a photo of a cat."])  # (2, D)
        >>> image = backbone.encode_images(backbone.preprocess(load_rgb("dog.jpg"))[None])  # (1, D)
        >>> backbone.text_probs(image, text)  # (1, 2)
    """

    name: str
    model: Any
    preprocess: Callable[[Any], Tensor]
    tokenizer: Callable[..., Tensor]
    image_size: int
    context_length: int
    autocast: torch.dtype | None = None
    precision: str | None = None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def logit_scale(self) -> float:
        """s, the factor of the cosine in the logits: softmax(s f t)."""
        return float(self.model.logit_scale.exp())

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the weights; it does not depend on the name."""
        return tensor_digest(dict(self.model.state_dict()))

    @property
    def computation(self) -> dict[str, str]:
        """What the key of an artifact made of image features has besides the weights; empty without autocast."""
        return {} if self.autocast is None else {"autocast": str(self.autocast)}

    @functools.cached_property
    def text_encoder(self) -> TextEncoder:
        """The text tower, from token embeddings to text features."""
        own = getattr(self.model, "text_encoder", None)  # of transformers' models
        return TextEncoder(self.model) if own is None else own

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) preprocessed pixels to (N, D) unit features in float32.

        Of a model with Q vectors an image (BLIP-2) a row is Q times as long as a text's; see `functional.similarity`.
        """
        weights = list(self.model.visual.parameters())
        # In half precision open_clip leaves embeddings and norms in fp32; the convolution that reads the pixels is not.
        dtype = next((weight.dtype for weight in weights if weight.ndim == 4), weights[0].dtype)
        device = weights[0].device
        half = nullcontext() if self.autocast is None else torch.autocast(device.type, self.autocast)
        with half:
            features = self.model.encode_image(pixels.to(device, dtype))
        return nn.functional.normalize(features.float(), dim=1)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Texts to (T, L) token ids.

        Raises:
            UserError: a text is longer than the context; texts are never truncated.
        """
        tokens = self.tokenizer(list(texts), context_length=self.context_length)
        ends = self.ends(self.tokenizer(list(texts), context_length=2 * self.context_length))
        for text, end in zip(texts, ends.tolist(), strict=True):
            if end >= self.context_length:
                raise UserError(f"text '{text}' is longer than the {self.context_length} tokens of {self.name}")
        return tokens

    @functools.cached_property
    def end_token(self) -> int | None:
        """The id that ends every text; None where the tokenizer does not name it: then the largest id of a text."""
        hub = getattr(self.tokenizer, "tokenizer", None)  # transformers', inside open_clip's
        candidates = (
            getattr(self.tokenizer, "eot_token_id", None),
            getattr(hub, "eos_token_id", None),
            getattr(hub, "pad_token_id", None),  # a tokenizer without an end: its padding follows the text
        )
        return next((token for token in candidates if token is not None), None)

    def ends(self, tokens: Tensor) -> Tensor:
        """(T, L) token ids to the (T,) positions of their end-of-text tokens; L where there is none.

        SigLIP's padding is the same token as its end, so the first one counts.
        """
        if self.end_token is None:
            return tokens.argmax(dim=1)
        return end_positions(tokens, self.end_token, missing=tokens.shape[1])

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts to (T, D) unit features in float32."""
        tokens = self.tokenize(texts).to(self.device)
        return nn.functional.normalize(self.text_encoder.encode_tokens(tokens).float(), dim=1)

    def text_probs(self, features: Tensor, text_features: Tensor) -> Tensor:
        """Zero-shot CLIP: (N, D) image and (C, D) text features to (N, C) probabilities softmax(s cosines).

        Features that are not of unit length are normalised, with a warning; see `unit_rows`.
        """
        features, text_features = unit_rows(features, "images"), unit_rows(text_features, "texts")
        return cosines(self.logit_scale * features, text_features).softmax(dim=1)
