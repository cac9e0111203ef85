"""Backbones of transformers: any dual encoder with `get_image_features` and `get_text_features`, hub or folder.

The models themselves are not taken apart: their text tower runs as it is, and a learned prompt takes the place of what
its token embedding gives. So every text tower serves prompt learning, causal or not. BLIP-2's image-text model is made
such a dual encoder in `clip.blip2`, and SigLIP 2 NaFlex in `clip.naflex`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from air_plugin.clip.backbone import Backbone
from air_plugin.clip.blip2 import ARCHITECTURE, BLIP2DualEncoder, require_contrastive_head
from air_plugin.clip.naflex import NaFlexDualEncoder, side_of
from air_plugin.clip.text_encoder import end_positions
from air_plugin.utils.class_names import listed
from air_plugin.utils.downloads import HUB_NAME
from air_plugin.utils.errors import UserError
from air_plugin.utils.hub import is_unreachable, refusal
from air_plugin.utils.offline import is_offline

PREFIX = "hf:"
LONGEST = 77  # tokens of a text where the tower would take more, as CLIP has
INTERPOLATIONS = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # PIL's numbers, in the words of open_clip


def load_huggingface(name: str) -> Backbone:
    """Load `hf:OWNER/MODEL` or `hf:FOLDER`; weights as safetensors only, and no code of a repository is run.

    Raises:
        UserError: there is no such model, it is no dual encoder, or it cannot be used here.
    """
    source = name.removeprefix(PREFIX)
    if not source:
        raise UserError(f"backbone '{name}' names no model; write hf:OWNER/MODEL or hf:FOLDER")
    if not Path(source).is_dir() and not re.fullmatch(HUB_NAME, source):
        if Path(source).exists():
            raise UserError(f"backbone '{name}' names a file; give the folder that transformers saved")
        raise UserError(f"backbone '{name}' names the folder {source}, which does not exist")
    with _explained(name, source):
        model, tokenizer, processor = _read(name, source)
    own = _OpenClipFace(name, model, tokenizer)
    preprocess, size = _preparation(name, processor)
    length = min(LONGEST, own.text_encoder.longest)
    return Backbone(name, own, preprocess, _Tokenizer(tokenizer, own.text_encoder.end_id), size, length)


def _read(name: str, source: str) -> tuple[Any, Any, Any]:
    """Model, tokenizer and image processor; the configuration is read first, which tells what cannot be used."""
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

    options = {"local_files_only": is_offline() or Path(source).is_dir()}
    kind = _model_class(name, AutoConfig.from_pretrained(source, **options))
    model, loaded = kind.from_pretrained(
        source, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    # transformers gives random values to all of these.
    random = {key if isinstance(key, str) else key[0] for key in (*loaded["missing_keys"], *loaded["mismatched_keys"])}
    random = {key for key in random if not key.endswith("position_ids")}
    if random:
        raise UserError(
            f"backbone '{name}': its files lack weights of its configuration, or have them in other shapes: "
            f"{listed(sorted(random), first=3)}"
        )
    dual = {ARCHITECTURE: BLIP2DualEncoder, "Siglip2Model": NaFlexDualEncoder}.get(kind.__name__, lambda own: own)
    return (
        dual(model.float()),
        AutoTokenizer.from_pretrained(source, **options),
        AutoImageProcessor.from_pretrained(source, **options),
    )


def _model_class(name: str, config: Any) -> Any:
    """transformers' class of a model.

    Raises:
        UserError: it is no dual encoder.
    """
    from transformers import AutoModel

    if config.model_type == "blip-2":
        from transformers import Blip2ForImageTextRetrieval

        require_contrastive_head(name, config)
        return Blip2ForImageTextRetrieval
    kind: Any = AutoModel._model_mapping.get(type(config), None)
    kind = kind[0] if isinstance(kind, tuple) else kind
    if not (hasattr(kind, "get_image_features") and hasattr(kind, "get_text_features")):
        raise UserError(
            f"backbone '{name}' is a model of type {config.model_type}, which is no dual encoder of images and texts; "
            "take for instance a CLIP, SigLIP, AltCLIP, MetaCLIP or BLIP-2's image-text model"
        )
    if not hasattr(config, "text_config") or config.model_type == "blip":
        raise UserError(
            f"backbone '{name}' is a model of type {config.model_type}, whose features are no plain vectors"
        )
    return kind


@contextmanager
def _explained(name: str, source: str) -> Any:
    """Errors of transformers as one line; its notes about files and speed do not reach the terminal."""
    from safetensors import SafetensorError
    from transformers.utils import logging as notes

    verbosity, shows_bars = notes.get_verbosity(), notes.is_progress_bar_enabled()
    notes.set_verbosity_error()
    if Path(source).is_dir():  # else they also show a download
        notes.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UserError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        refused = refusal(error, source)
        if refused:
            raise UserError(f"backbone '{name}' cannot be fetched: {refused}") from error
        if is_unreachable(error) or (is_offline() and not Path(source).exists()):
            raise UserError(
                f"backbone '{name}' is not on this machine, and the network is off or does not answer; with a network: "
                f"hf download {source}"
            ) from error
        if "trust_remote_code" in str(error):
            raise UserError(f"backbone '{name}' needs the code of its repository, which is never run here") from error
        message = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"backbone '{name}' cannot be loaded: {message[:300]}") from error
    finally:
        notes.set_verbosity(verbosity)
        if shows_bars:
            notes.enable_progress_bar()


def _preparation(name: str, processor: Any) -> tuple[Callable[[Any], Tensor], int]:
    """How images are prepared, as open_clip's steps, so that bundles and ONNX files can describe it; and their side."""
    import open_clip

    naflex = hasattr(processor, "max_num_patches")
    size = {"height": side_of(processor), "width": side_of(processor)} if naflex else dict(processor.size)
    crops = bool(getattr(processor, "do_center_crop", False))
    crop = dict(getattr(processor, "crop_size", None) or size) if crops else size
    side = crop.get("height", size.get("shortest_edge"))
    if not side or crop.get("width", side) != side or size.get("shortest_edge", side) != side:
        raise UserError(f"backbone '{name}' prepares images as {size} and {crop}; only one square size is supported")
    interpolation = INTERPOLATIONS.get(int(getattr(processor, "resample", 3) or 0))
    if interpolation is None:
        raise UserError(f"backbone '{name}' resizes images in a way that is not supported: {processor.resample}")
    steps = open_clip.image_transform(
        side,
        is_train=False,
        mean=tuple(processor.image_mean),
        std=tuple(processor.image_std),
        interpolation=interpolation,
        resize_mode="shortest" if "shortest_edge" in size else "squash",
    )
    return steps, side


class _Tokenizer:
    """transformers' tokenizer as open_clip's are called: texts to (T, L) ids, padded behind.

    eot_token_id: ends every text.
    """

    def __init__(self, tokenizer: Any, end_id: int) -> None:
        self.tokenizer, self.eot_token_id = tokenizer, end_id
        tokenizer.padding_side = "right"

    def __call__(self, texts: str | Sequence[str], context_length: int) -> Tensor:
        texts = [texts] if isinstance(texts, str) else list(texts)
        found = self.tokenizer(
            texts, max_length=context_length, padding="max_length", truncation=True, return_tensors="pt"
        )
        return found["input_ids"]


class _OpenClipFace(nn.Module):
    """A dual encoder of transformers with the names that open_clip's models have."""

    text_encoder: _TextEncoder

    def __init__(self, name: str, model: Any, tokenizer: Any) -> None:
        super().__init__()
        self.model = model
        self.visual = model.vision_model
        self.logit_scale = model.logit_scale
        # Not a part of this module: its weights are the model's.
        object.__setattr__(self, "text_encoder", _TextEncoder(name, model, tokenizer))

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, D), not normalised."""
        return self.image_tower(pixels)

    @property
    def image_tower(self) -> nn.Module:
        """Pixels to features as one module, for ONNX; `visual` alone gives no features."""
        return _ImageTower(self.model)


class _ImageTower(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return _vectors(self.model.get_image_features(pixel_values=pixels))


class _TextEncoder(nn.Module):
    """What `clip.text_encoder.TextEncoder` is for open_clip's models, for any text tower of transformers.

    longest: number of tokens that the tower takes.
    """

    def __init__(self, name: str, model: Any, tokenizer: Any) -> None:
        super().__init__()
        self.model = model
        self.token_embedding: nn.Embedding = model.text_model.get_input_embeddings()
        config = model.config.text_config
        if set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):
            # what transformers makes where the tokenizer's files are missing
            raise UserError(f"backbone '{name}' has a tokenizer that knows no words; its files are missing or damaged")
        names = getattr(tokenizer, "model_input_names", [])
        # SigLIP's tower was trained without a mask, and pools the last position, whatever its tokenizer gives.
        self.is_masked = "attention_mask" in names and "siglip" not in config.model_type
        candidates = [tokenizer.eos_token_id, tokenizer.sep_token_id]
        end_id = next((i for i in candidates if i in tokenizer("a")["input_ids"]), None)
        if end_id is None and not self.is_masked:
            end_id = tokenizer.pad_token_id  # its padding follows the text
        if end_id is None or tokenizer.pad_token_id is None:
            raise UserError(f"backbone '{name}' has a tokenizer without a token that ends a text or fills it up")
        self.end_id, self.pad_id = int(end_id), int(tokenizer.pad_token_id)
        # Stands for every learned or fixed token: towers look at ids only for where a text ends and what is padding.
        self.other_id = next(i for i in range(3) if i not in (self.end_id, self.pad_id))
        offset = self.pad_id + 1 if config.model_type in ("xlm-roberta", "roberta", "altclip_text_model") else 0
        self.longest = int(config.max_position_embeddings) - offset

    @property
    def dtype(self) -> torch.dtype:
        """Type of the tower's computations."""
        return self.token_embedding.weight.dtype

    def layout(self, ends: Sequence[int], *, prefix: int) -> None:
        """None: tokens with which all prompts begin are computed once a prompt."""

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """(T, L) token ids to (T, D) features, not normalised."""
        return self._features(tokens, end_positions(tokens, self.end_id, missing=tokens.shape[1] - 1))

    def forward(self, embeddings: Tensor, end: Tensor, *, length: int | None = None) -> Tensor:
        """Encode prompts.

        Args:
            embeddings: (T, L, W) token embeddings, without positions.
            end: (T,) position of each prompt's end-of-text token.
            length: of the longest prompt; by default it is read from `end`.

        Returns:
            (T, D) text features, not normalised.
        """
        if self.is_masked:  # tokens behind the longest prompt are seen by none
            embeddings = embeddings[:, : length or int(end.max()) + 1]
        place = torch.arange(embeddings.shape[1], device=embeddings.device)
        tokens = torch.full(embeddings.shape[:2], self.pad_id, device=embeddings.device)
        tokens = tokens.masked_fill(place < end[:, None], self.other_id).masked_fill(place == end[:, None], self.end_id)
        hook = self.token_embedding.register_forward_hook(lambda *_: embeddings.to(self.dtype))
        try:
            return self._features(tokens, end)
        finally:
            hook.remove()

    def _features(self, tokens: Tensor, end: Tensor) -> Tensor:
        mask = (torch.arange(tokens.shape[1], device=tokens.device) <= end[:, None]).long() if self.is_masked else None
        return _vectors(self.model.get_text_features(input_ids=tokens, attention_mask=mask))


def _vectors(found: Any) -> Tensor:
    """The features of a tower, which transformers 4 returns themselves and 5 as a part of an object."""
    return found if isinstance(found, Tensor) else found.pooler_output
