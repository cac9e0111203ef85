"""SigLIP 2 NaFlex with square images, as the names of transformers' other dual encoders have it.

NaFlex takes an image as a sequence of patches, of any shape of image (Tschannen et al., "SigLIP 2", 2025, section 2.4).
Here every image is resized to one square, as for the SigLIP 2 models of a fixed size, so that a batch is one tensor.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


def side_of(processor: Any) -> int:
    """Pixels of the largest square whose patches are no more than the image processor allows."""
    return int(processor.patch_size) * math.isqrt(int(processor.max_num_patches))


class NaFlexDualEncoder(nn.Module):
    """transformers' Siglip2Model as a dual encoder of square images; sides are a multiple of the patch size."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.config = model.config
        model.vision_model.embeddings.resize_positional_embeddings = square_positions  # of this model alone

    @property
    def logit_scale(self) -> nn.Parameter:
        return self.model.logit_scale

    @property
    def vision_model(self) -> nn.Module:
        return self.model.vision_model

    @property
    def text_model(self) -> Any:
        return self.model.text_model

    def get_image_features(self, *, pixel_values: Tensor) -> Any:
        """Of (N, 3, H, W) pixels."""
        patches = to_patches(pixel_values, self.config.vision_config.patch_size)
        rows, columns = (size // self.config.vision_config.patch_size for size in pixel_values.shape[2:])
        return self.model.get_image_features(
            pixel_values=patches,
            pixel_attention_mask=torch.ones(patches.shape[:2], dtype=torch.long, device=patches.device),
            spatial_shapes=torch.tensor([[rows, columns]], device=patches.device).expand(patches.shape[0], -1),
        )

    def get_text_features(self, **inputs: Any) -> Any:
        return self.model.get_text_features(**inputs)


def square_positions(positions: Tensor, shapes: Tensor, max_length: int) -> Tensor:
    """What transformers' `resize_positional_embeddings` is for squares: its checks of shapes have no ONNX operator.

    Args:
        positions: (S, S, W) position embeddings.
        shapes: (N, 2), rows and columns of patches, all sqrt(L).
        max_length: L, the number of patches.

    Returns:
        (N, L, W).
    """
    side = math.isqrt(max_length)
    if len(positions) != side:
        grid = positions.movedim(2, 0)[None].float()
        grid = nn.functional.interpolate(grid, size=(side, side), mode="bilinear", antialias=True)
        positions = grid[0].movedim(0, 2).to(positions.dtype)
    return positions.flatten(0, 1).expand(shapes.shape[0], -1, -1)


def to_patches(pixels: Tensor, size: int) -> Tensor:
    """(N, 3, H, W) to (N, H/P * W/P, P * P * 3): patches row by row, in each the pixels row by row."""
    images, channels, height, width = pixels.shape
    blocks = pixels.view(images, channels, height // size, size, width // size, size)
    return blocks.permute(0, 2, 4, 3, 5, 1).reshape(images, -1, size * size * channels)
