"""Learned tokens in the image tower: visual prompts (VPT), and the model that trainers use with them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from air_plugin import mini
from air_plugin.clip.huggingface import PREFIX
from air_plugin.clip.prepared_images import PreparedImages
from air_plugin.clip.prompts import PromptedCLIP, SavedPrompts
from air_plugin.clip.shared_prefix import attention, is_plain, residuals
from air_plugin.clip.views import split_tail
from air_plugin.utils.errors import UserError

if TYPE_CHECKING:
    from air_plugin.clip.backbone import Backbone

CHUNK = 256  # images that are encoded at once where nothing is trained


class TokenSource(Protocol):
    """Learned prompts with tokens for the image tower: `VisualPrompts` or `JointPrompts`."""

    def visual_tokens(self) -> Tensor:
        """(P, W) tokens, W the width of the image tower."""


def require_vision_transformer(backbone: Backbone) -> Any:
    """The image tower of a backbone, where visual prompts can be learned in it.

    Raises:
        UserError: it is no vision transformer of open_clip with a class token; the message names some that are.
    """
    tower = backbone.model.visual
    has_class_token = getattr(tower, "class_embedding", None) is not None and getattr(tower, "attn_pool", None) is None
    if not has_class_token or not hasattr(tower, "ln_pre") or getattr(tower, "pool_type", "tok") != "tok":
        raise UserError(
            "TRAINER.PROMPT.MODALITY visual and multimodal need an image tower that is a vision transformer with a "
            f"class token, and that of {backbone.name} ({type(tower).__name__}) is none; use a ViT CLIP, for instance "
            "ViT-B/32 or ViT-B/16, or MODALITY text"
        )
    return tower


def has_vision_transformer(name: str) -> bool:
    """Whether visual prompts can be learned in a backbone, by its name: no weights are read or fetched.

    Args:
        name: as `load_backbone` takes it. Of an unknown one it is True: the error is `load_backbone`'s.
    """
    if name in mini.BACKBONES or name.startswith(PREFIX):
        return name == "mini_vit"
    import open_clip

    is_folder = Path(name, "open_clip_config.json").is_file()
    architecture = f"local-dir:{name}" if is_folder else name.partition(":")[0].replace("/", "-")
    try:
        tower = open_clip.get_model_config(architecture)["vision_cfg"]
    except (TypeError, KeyError, ValueError):  # no such architecture, or a damaged file
        return True
    is_other = isinstance(tower.get("layers"), list) or "timm_model_name" in tower  # a ResNet, or timm's
    return not is_other and not tower.get("attentional_pool") and tower.get("pool_type", "tok") == "tok"


class PromptedTower(nn.Module):
    """A frozen vision transformer with learned tokens between the class token and the patches (VPT-shallow).

    The tokens are added behind the positional embedding and in front of `ln_pre`; the feature is that of the class
    token (Jia et al., ECCV 2022, arXiv 2203.12119). With no tokens it is the frozen tower.

    tower: open_clip's, frozen. autocast: type of its computations where that is not the weights' (`Backbone`).
    checkpointing: whether a block's activations are computed again in the backward pass: less memory, more time.
    """

    def __init__(self, tower: Any, *, autocast: torch.dtype | None = None, checkpointing: bool = False) -> None:
        super().__init__()
        self.tower, self.autocast, self.checkpointing = tower, autocast, checkpointing

    @property
    def dtype(self) -> torch.dtype:
        """Of the pixels."""
        return self.tower.conv1.weight.dtype

    @torch.no_grad()
    def embed(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) pixels to (B, 1 + N, W): class token and patches with their positions. No prompt changes it."""
        x = self.tower.conv1(pixels).flatten(2).transpose(1, 2)  # (B, N, W)
        x = torch.cat([self.tower.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1), x], dim=1)
        return x + self.tower.positional_embedding.to(x.dtype)

    def forward(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        """Encode images.

        Args:
            pixels: (B, 3, H, W), normalised.
            tokens: (P, W).

        Returns:
            (B, D) features, not normalised.
        """
        x = self.embed(pixels)
        x = torch.cat([x[:, :1], tokens.to(x.dtype).expand(x.shape[0], -1, -1), x[:, 1:]], dim=1)
        pooled = self.tower.ln_post(self._blocks(self.tower.ln_pre(x)))  # a norm is of each token alone
        return pooled if self.tower.proj is None else pooled @ self.tower.proj

    def encode(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        """As `forward`, from pixels of any floating type on any device to (B, D) unit features in float32."""
        pixels = pixels.to(tokens.device, self.dtype)
        half = nullcontext() if self.autocast is None else torch.autocast(tokens.device.type, self.autocast)
        with half:
            features = self(pixels, tokens)
        return nn.functional.normalize(features.float(), dim=1)

    def _blocks(self, x: Tensor) -> Tensor:
        """(B, L, W) tokens to the (B, W) class tokens behind the last block; this one computes no others."""
        *blocks, last = self.tower.transformer.resblocks
        first = getattr(self.tower.transformer, "batch_first", True)
        x = x if first else x.transpose(0, 1)
        for block in blocks:
            if self.checkpointing and torch.is_grad_enabled():
                # Nothing is random in it, and a CUDA graph cannot capture the state of a generator.
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x)
        if not is_plain(last):
            x = last(x)
            return x[:, 0] if first else x[0]
        x = x if first else x.transpose(0, 1)
        normed, width = last.ln_1(x), x.shape[2]
        weight, bias = last.attn.in_proj_weight, last.attn.in_proj_bias
        keys = linear(normed, weight[width:], None if bias is None else bias[width:])
        queries = linear(normed[:, :1], weight[:width], None if bias is None else bias[:width])
        return residuals(last, x[:, :1], attention(last.attn, keys, None, queries))[:, 0]


class VisualPrompts(SavedPrompts):
    """Learned tokens for the image tower.

    tokens: (P, W), the only parameter; initial values W^-0.5 N(0, 1), or uniform in [-bound, bound].
    """

    def __init__(
        self,
        backbone: Backbone,
        classnames: Sequence[str],
        *,
        count: int = 16,
        bound: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Make the prompts.

        Args:
            backbone: whose image tower gets the tokens.
            classnames: that they are trained with, for the checkpoint.
            count: P.
            bound: of uniform initial values; None: normal ones.
            generator: of the initial values.

        Raises:
            UserError: the tower is no vision transformer with a class token.
        """
        super().__init__(backbone, classnames)
        width = require_vision_transformer(backbone).positional_embedding.shape[1]
        if bound is None:
            tokens = torch.empty(count, width).normal_(std=width**-0.5, generator=generator)
        else:
            tokens = torch.empty(count, width).uniform_(-bound, bound, generator=generator)
        self.tokens = nn.Parameter(tokens.to(backbone.device))

    def visual_tokens(self) -> Tensor:
        """(P, W)."""
        return self.tokens


class Normalise(nn.Module):
    """(B, H, W, 3) prepared images, uint8, to the (B, 3, H, W) pixels that the preparation of a backbone gives.

    Raises:
        UserError: the preparation does not end with ToTensor and Normalize.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        _, tail = split_tail(backbone.preprocess)
        if tail is None:
            raise UserError(
                f"{backbone.name} prepares images in a way that does not end with ToTensor and Normalize, and images "
                "are kept as they are before these; use another backbone, or TRAINER.PROMPT.MODALITY text"
            )
        dtype, self.steps = torch.get_default_dtype(), len(tail) - 1
        for number, step in enumerate(tail[1:]):
            for name, values in (("mean", step.mean), ("std", step.std)):
                numbers = torch.as_tensor(values, dtype=dtype).view(-1, 1, 1).to(backbone.device)
                self.register_buffer(f"{name}{number}", numbers, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        pixels = images.permute(0, 3, 1, 2).contiguous().to(torch.get_default_dtype()).div_(255)  # as ToTensor
        for number in range(self.steps):
            pixels.sub_(self.get_buffer(f"mean{number}")).div_(self.get_buffer(f"std{number}"))
        return pixels


class VisuallyPromptedCLIP(PromptedCLIP):
    """A frozen backbone with prompts in its image tower, applied to images; the text features may be learned, too.

    `prompt_learner` gives the tokens. It also gives the text features where `template` is None (`JointPrompts`).
    """

    template: Tensor | None

    def __init__(
        self,
        backbone: Backbone,
        prompt_learner: nn.Module,
        *,
        template: Tensor | None = None,
        checkpointing: bool = False,
    ) -> None:
        """Put prompts into a backbone.

        Args:
            backbone: stays as it is.
            prompt_learner: `VisualPrompts` or `JointPrompts`.
            template: (C, D) unit text features of `VisualPrompts`, which learn none.
            checkpointing: on a GPU, trade time for memory in training; see `PromptedTower`.
        """
        super().__init__(backbone, prompt_learner)
        tower = require_vision_transformer(backbone)
        checkpointing = checkpointing and backbone.device.type == "cuda"
        self.tower = PromptedTower(tower, autocast=backbone.autocast, checkpointing=checkpointing)
        self.normalise = Normalise(backbone)
        self.register_buffer("template", None if template is None else template[None], persistent=False)

    @property
    def loss_scale(self) -> float:
        """What a loss is multiplied with, and gradients are divided by: in fp16 small gradients would become 0."""
        return 1024.0 if torch.float16 in (self.tower.autocast, self.tower.dtype) else 1.0

    def text_features(self) -> Tensor:
        """(1, C, D) unit features of the template, or of the current text prompts."""
        return super().text_features() if self.template is None else self.template

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) normalised pixels to (B, D) unit features in float32."""
        source: TokenSource = self.prompt_learner  # type: ignore[assignment]
        return self.tower.encode(pixels, source.visual_tokens())

    def encode_batch(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch with unit features (B, D) in place of prepared images (B, H, W, 3): one pass for all of them."""
        names = [name for name, value in batch.items() if value.dtype == torch.uint8 and value.ndim == 4]
        if not names:
            return batch
        features = self.encode_pixels(self.normalise(torch.cat([batch[name] for name in names])))
        parts = features.split([len(batch[name]) for name in names])
        return {**batch, **dict(zip(names, parts, strict=True))}

    @torch.no_grad()
    def encode(self, images: PreparedImages | Tensor) -> Tensor:
        """Images to (N, D) unit features, some at a time and without gradient; features stay as they are."""
        if isinstance(images, Tensor):
            return images
        device = next(self.prompt_learner.parameters()).device
        parts = [self.encode_pixels(self.normalise(part.to(device))) for part in images.batches(CHUNK)]
        return torch.cat(parts)
