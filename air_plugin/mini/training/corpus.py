"""The corpus: rendered letters and digits with captions that name what can be seen.

Every face renders each of 62 characters once, as a 64 x 64 mask. Batches of masks are then varied with torch: place,
slant, warp, weight, blur, resolution, colour. So every picture of a run is new.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from air_plugin.mini.training.captions import COLOUR_NAMES, COLOURS, Look
from air_plugin.mini.training.fonts import CHARACTERS, Face, face_weights

MASK_SIZE = 64
IMAGE_SIZE = 32
DIGIT_SHARE = 0.5  # of the pictures; the other half are letters

# -- masks


def render_mask(font: ImageFont.FreeTypeFont, character: str) -> np.ndarray:
    """One glyph, centred by its box, (64, 64) uint8; digits are brought to one height."""
    box = [round(edge) for edge in font.getbbox(character)]
    width, height = max(box[2] - box[0], 1), max(box[3] - box[1], 1)
    image = Image.new("L", (width + 2, height + 2))
    ImageDraw.Draw(image).text((1 - box[0], 1 - box[1]), character, font=font, fill=255)
    scale = 38 / height if character.isdigit() else 1.0
    scale = min(scale, 50 / max(width, 1), 50 / height)
    if abs(scale - 1) > 0.03:
        size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
        image = image.resize(size, Image.Resampling.BICUBIC)
    canvas = Image.new("L", (MASK_SIZE, MASK_SIZE))
    canvas.paste(image, ((MASK_SIZE - image.width) // 2, (MASK_SIZE - image.height) // 2))
    return np.asarray(canvas)


def render_face(face: Face) -> np.ndarray:
    """All characters of a face, capitals 38 pixels high: (62, 64, 64) uint8."""
    probe = ImageFont.truetype(str(face.path), 100).getbbox("H")
    font = ImageFont.truetype(str(face.path), max(round(38 * 100 / max(probe[3] - probe[1], 1)), 8))
    return np.stack([render_mask(font, character) for character in CHARACTERS])


def render_masks(faces: Sequence[Face], cache: Path | None = None) -> Tensor:
    """Masks of all faces: (faces, 62, 64, 64) uint8; kept in `cache` (a .npy file) where one is given."""
    if cache is not None and cache.exists():
        return torch.from_numpy(np.load(cache))
    masks = np.stack([render_face(face) for face in faces])
    if cache is not None:
        np.save(cache, masks)
    return torch.from_numpy(masks)


# -- pictures


class Corpus:
    """Samples batches of pictures with what they show.

    Args:
        faces: the faces, as found.
        masks: (faces, 62, 64, 64) uint8.
    """

    def __init__(self, faces: Sequence[Face], masks: Tensor) -> None:
        self.faces = list(faces)
        self.masks = masks
        self.weights = torch.from_numpy(face_weights(self.faces)).float()

    def sample(self, count: int, generator: torch.Generator, *, digits_only: bool = False) -> tuple[Tensor, list[Look]]:
        """`count` pictures (count, 3, 32, 32) in [0, 1], and their looks."""
        faces = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        digits = torch.randint(10, (count,), generator=generator)
        letters = torch.randint(10, len(CHARACTERS), (count,), generator=generator)
        share = 1.0 if digits_only else DIGIT_SHARE
        characters = torch.where(torch.rand(count, generator=generator) < share, digits, letters)
        masks = self.masks[faces, characters].float().div(255).unsqueeze(1)  # (count, 1, 64, 64)
        shapes, weight, slant = deform(masks, generator)
        inks, grounds = sample_colours(count, generator)
        images = degrade(paint(shapes, inks, grounds, generator), generator)
        looks = []
        for index in range(count):
            face, character = self.faces[int(faces[index])], CHARACTERS[int(characters[index])]
            looks.append(
                Look(
                    character=character,
                    kind="digit" if character.isdigit() else "letter",
                    ink=COLOUR_NAMES[int(inks[index])],
                    ground=COLOUR_NAMES[int(grounds[index])],
                    # What can be seen counts, not the name of the file: a thinned bold face is not bold.
                    bold=float(weight[index]) > 0.75 or (face.bold and float(weight[index]) > -0.2),
                    italic=float(slant[index]) > 0.22 or (face.italic and float(slant[index]) > -0.08),
                )
            )
        return images, looks


def uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """(count,) uniform in [low, high)."""
    return torch.rand(count, generator=generator) * (high - low) + low


def deform(masks: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, place, size, slant and mild elastic warp.

    Args:
        masks: (N, 1, 64, 64) in [0, 1].

    Returns:
        shapes (N, 1, 32, 32) in [0, 1]; weight (N,), < 0 thinner, > 0 thicker; slant (N,), > 0 leans right.
    """
    count = len(masks)
    weight = uniform(count, -0.7, 1.6, generator)
    weight = torch.where(torch.rand(count, generator=generator) < 0.3, torch.zeros(()), weight)
    masks = change_weight(masks, weight)
    slant = torch.randn(count, generator=generator) * 0.13
    grid = affine_grid(slant, generator) + elastic_field(count, generator)
    warped = F.grid_sample(masks, grid, align_corners=False, padding_mode="zeros")
    return F.avg_pool2d(warped, MASK_SIZE // IMAGE_SIZE), weight, slant


def change_weight(masks: Tensor, weight: Tensor) -> Tensor:
    """Thinner (down to one pixel off each side, of 64) or thicker (up to 1.6 x two pixels on each side)."""
    thicker = F.max_pool2d(masks, 3, 1, 1)
    thickest = F.max_pool2d(thicker, 3, 1, 1)
    thinner = -F.max_pool2d(-masks, 3, 1, 1)
    weight = weight.view(-1, 1, 1, 1)
    up, more, down = weight.clamp(0, 1), (weight - 1).clamp(0, 1), (-weight).clamp(0, 1)
    return masks + up * (thicker - masks) + more * (thickest - thicker) - down * (masks - thinner)


def affine_grid(slant: Tensor, generator: torch.Generator) -> Tensor:
    """Sampling grids (N, 64, 64, 2) for size, proportions, slant, a little rotation and shift."""
    count = len(slant)
    size = 1 / uniform(count, 0.85, 1.6, generator)  # capitals 16 to 30 pixels high, of 32
    stretch = uniform(count, 0.85, 1.25, generator)
    angle = torch.randn(count, generator=generator) * 0.09
    rows = torch.zeros(count, 2, 3)
    rows[:, 0, 0], rows[:, 1, 1] = size * stretch, size
    rows[:, 0, 1] = size * (slant + angle)
    rows[:, 1, 0] = -size * angle
    rows[:, 0, 2] = uniform(count, -0.12, 0.12, generator) * size
    rows[:, 1, 2] = uniform(count, -0.08, 0.08, generator) * size
    return F.affine_grid(rows, [count, 1, MASK_SIZE, MASK_SIZE], align_corners=False)


def elastic_field(count: int, generator: torch.Generator) -> Tensor:
    """Smooth displacements (N, 64, 64, 2); strength differs from picture to picture, a third get none."""
    strength = uniform(count, -0.045, 0.09, generator).clamp(min=0).view(-1, 1, 1, 1)
    coarse = torch.randn(count, 2, 5, 5, generator=generator) * strength
    field = F.interpolate(coarse, size=MASK_SIZE, mode="bilinear", align_corners=True)
    return field.permute(0, 2, 3, 1)


def sample_colours(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Indices (N,) of ink and ground, never alike; a fifth each are white on black and black on white."""
    palette = torch.tensor(list(COLOURS.values())).float() / 255
    inks = torch.randint(len(palette), (count,), generator=generator)
    grounds = torch.randint(len(palette), (count,), generator=generator)
    black, white = COLOUR_NAMES.index("black"), COLOUR_NAMES.index("white")
    for _ in range(20):  # a pair that is too similar is sampled again
        close = (palette[inks] - palette[grounds]).norm(dim=1) < 0.45
        again = torch.randint(len(palette), (count,), generator=generator)
        grounds = torch.where(close, again, grounds)
    close = (palette[inks] - palette[grounds]).norm(dim=1) < 0.45
    kind = torch.rand(count, generator=generator)
    inks = torch.where((kind < 0.2) | close, white, torch.where(kind > 0.8, black, inks))
    grounds = torch.where((kind < 0.2) | close, black, torch.where(kind > 0.8, white, grounds))
    return inks, grounds


def paint(shapes: Tensor, inks: Tensor, grounds: Tensor, generator: torch.Generator) -> Tensor:
    """(N, 3, 32, 32) in [0, 1]: ink over ground, either a shade off its name."""
    palette = torch.tensor(list(COLOURS.values())).float() / 255
    count = len(shapes)
    ink = palette[inks] + torch.randn(count, 3, generator=generator) * 0.03
    ground = palette[grounds] + torch.randn(count, 3, generator=generator) * 0.03
    ink, ground = ink.clamp(0, 1).view(-1, 3, 1, 1), ground.clamp(0, 1).view(-1, 3, 1, 1)
    return ground + shapes * (ink - ground)


def degrade(images: Tensor, generator: torch.Generator) -> Tensor:
    """Blur (half of the pictures) and loss of resolution (two fifths: 8 to 16 pixels and back), in [0, 1]."""
    count = len(images)
    sigma = uniform(count, -1.2, 1.2, generator).clamp(min=0.01)
    images = blur(images, sigma)
    kind = torch.rand(count, generator=generator)
    for low, high, size in ((0.0, 0.15, 8), (0.15, 0.3, 10), (0.3, 0.4, 16)):
        chosen = (kind >= low) & (kind < high)
        if bool(chosen.any()):
            small = F.interpolate(images[chosen], size=size, mode="area")
            images[chosen] = F.interpolate(small, size=IMAGE_SIZE, mode="bicubic", align_corners=False)
    return images.clamp(0, 1)


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur, one sigma (N,) a picture, 7 x 7 kernel, edges repeated."""
    count = len(images)
    axis = torch.arange(-3, 4).float()
    kernel = torch.exp(-0.5 * (axis / sigma.view(-1, 1)) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, 0)  # (3N, 7)
    flat = F.pad(images, (3, 3, 3, 3), mode="replicate").reshape(1, count * 3, IMAGE_SIZE + 6, IMAGE_SIZE + 6)
    flat = F.conv2d(flat, kernel.view(-1, 1, 7, 1), groups=count * 3)
    flat = F.conv2d(flat, kernel.view(-1, 1, 1, 7), groups=count * 3)
    return flat.view(count, 3, IMAGE_SIZE, IMAGE_SIZE)
