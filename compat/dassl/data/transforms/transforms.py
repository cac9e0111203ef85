"""Image transforms by name; torchvision is imported when one is built."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from ..._left_out import left_out

if TYPE_CHECKING:
    from PIL.Image import Image
    from yacs.config import CfgNode

AVAI_CHOICES = [
    "random_flip",
    "random_resized_crop",
    "normalize",
    "random_crop",
    "random_translation",
    "center_crop",  # always done in testing; naming it changes nothing
    "colorjitter",
    "randomgrayscale",
    "gaussian_blur",
]


@cache
def _interpolation_modes() -> dict[str, Any]:
    from torchvision.transforms import InterpolationMode

    return {name: InterpolationMode(name) for name in ("bilinear", "bicubic", "nearest")}


def _interpolation(cfg: CfgNode) -> Any:
    modes, name = _interpolation_modes(), cfg.INPUT.INTERPOLATION
    if name not in modes:
        raise ValueError(f"INPUT.INTERPOLATION must be one of {list(modes)}, not {name!r}")
    return modes[name]


def __getattr__(name: str) -> Any:
    """INTERPOLATION_MODES: the names that cfg.INPUT.INTERPOLATION may have -> torchvision's modes."""
    if name == "INTERPOLATION_MODES":
        return _interpolation_modes()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class Random2DTranslation:
    """With probability p, enlarge to 9/8 of the size and cut out a random piece of it; else just resize."""

    def __init__(self, height: int, width: int, p: float = 0.5, interpolation: Any = None) -> None:
        self.height = height
        self.width = width
        self.p = p
        self.interpolation = interpolation or _interpolation_modes()["bilinear"]

    def __call__(self, img: Image) -> Image:
        from torchvision.transforms import functional as F

        if random.uniform(0, 1) > self.p:
            return F.resize(img, [self.height, self.width], self.interpolation)
        height, width = round(self.height * 1.125), round(self.width * 1.125)
        enlarged = F.resize(img, [height, width], self.interpolation)
        left = round(random.uniform(0, width - self.width))
        top = round(random.uniform(0, height - self.height))
        return F.crop(enlarged, top, left, self.height, self.width)


def build_transform(
    cfg: CfgNode, is_train: bool = True, choices: Sequence[str] | None = None
) -> Callable[[Image], Any] | None:
    """Image -> what a batch holds of it: a (3, H, W) tensor.

    Args:
        cfg: cfg.INPUT describes the transforms.
        is_train: for training, or for testing (resize, central crop, normalisation).
        choices: names of transforms instead of cfg.INPUT.TRANSFORMS.

    Returns:
        None where cfg.INPUT.NO_TRANSFORM.
    """
    if cfg.INPUT.NO_TRANSFORM:
        print("Note: no transform is applied!")
        return None

    choices = cfg.INPUT.TRANSFORMS if choices is None else choices
    for choice in choices:
        if choice not in AVAI_CHOICES:
            raise ValueError(
                f"INPUT.TRANSFORMS takes {AVAI_CHOICES}, not {choice!r}; " + left_out("any other transform")
            )
    if is_train:
        return _compose("train", _train_steps(cfg, choices))
    return _compose("test", _test_steps(cfg, choices))


Steps = list[tuple[str, Any]]  # (what is printed, transform)


def _compose(purpose: str, steps: Steps) -> Callable[[Image], Any]:
    from torchvision.transforms import Compose

    print(f"Building transform_{purpose}")
    for description, _ in steps:
        print(f"+ {description}")
    return Compose([step for _, step in steps])


def _train_steps(cfg: CfgNode, choices: Sequence[str]) -> Steps:
    return [*_geometry_steps(cfg, choices), *_colour_steps(cfg, choices), *_tensor_steps(cfg, choices)]


def _geometry_steps(cfg: CfgNode, choices: Sequence[str]) -> Steps:
    from torchvision import transforms as T

    size, mode, steps = cfg.INPUT.SIZE, _interpolation(cfg), []
    if "random_crop" not in choices and "random_resized_crop" not in choices:
        steps.append((f"resize to {size[0]}x{size[1]}", T.Resize(size, interpolation=mode)))
    if "random_translation" in choices:
        steps.append(("random translation", Random2DTranslation(size[0], size[1])))
    if "random_crop" in choices:
        padding = cfg.INPUT.CROP_PADDING
        steps.append((f"random crop (padding = {padding})", T.RandomCrop(size, padding=padding)))
    if "random_resized_crop" in choices:
        scale = cfg.INPUT.RRCROP_SCALE
        crop = T.RandomResizedCrop(size, scale=scale, interpolation=mode)
        steps.append((f"random resized crop (size={size}, scale={scale})", crop))
    if "random_flip" in choices:
        steps.append(("random flip", T.RandomHorizontalFlip()))
    return steps


def _colour_steps(cfg: CfgNode, choices: Sequence[str]) -> Steps:
    from torchvision import transforms as T

    given, steps = cfg.INPUT, []
    if "colorjitter" in choices:
        names = ("brightness", "contrast", "saturation", "hue")
        values = (given.COLORJITTER_B, given.COLORJITTER_C, given.COLORJITTER_S, given.COLORJITTER_H)
        shown = ", ".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
        steps.append((f"color jitter ({shown})", T.ColorJitter(*values)))
    if "randomgrayscale" in choices:
        steps.append(("random gray scale", T.RandomGrayscale(p=given.RGS_P)))
    if "gaussian_blur" in choices:
        blur = T.RandomApply([T.GaussianBlur(given.GB_K)], p=given.GB_P)
        steps.append((f"gaussian blur (kernel={given.GB_K})", blur))
    return steps


def _tensor_steps(cfg: CfgNode, choices: Sequence[str]) -> Steps:
    from torchvision import transforms as T

    mean, std = cfg.INPUT.PIXEL_MEAN, cfg.INPUT.PIXEL_STD
    steps: Steps = [("to torch tensor of range [0, 1]", T.ToTensor())]
    if "normalize" in choices:
        steps.append((f"normalization (mean={mean}, std={std})", T.Normalize(mean=mean, std=std)))
    return steps


def _test_steps(cfg: CfgNode, choices: Sequence[str]) -> Steps:
    from torchvision import transforms as T

    size, mode = cfg.INPUT.SIZE, _interpolation(cfg)
    return [
        (f"resize the smaller edge to {max(size)}", T.Resize(max(size), interpolation=mode)),
        (f"{size[0]}x{size[1]} center crop", T.CenterCrop(size)),
        *_tensor_steps(cfg, choices),
    ]


def plain_transform(cfg: CfgNode) -> Callable[[Image], Any]:
    """Resize to INPUT.SIZE, and the normalisation if INPUT.TRANSFORMS has it: no augmentation."""
    from torchvision import transforms as T

    resize = T.Resize(cfg.INPUT.SIZE, interpolation=_interpolation(cfg))
    return T.Compose([resize, *(step for _, step in _tensor_steps(cfg, cfg.INPUT.TRANSFORMS))])
