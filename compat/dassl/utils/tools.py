"""Small helpers: files, seeds, the environment, choices."""

from __future__ import annotations

import json
import os
import os.path as osp
import random
import warnings
from collections.abc import Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from .._left_out import UPSTREAM, refuse_names

if TYPE_CHECKING:
    from PIL.Image import Image

__getattr__ = refuse_names(__name__, "download_url", "get_most_similar_str_to_a_from_b")


def mkdir_if_missing(dirname: str) -> None:
    """Make the directory and its parents, where they are not there yet."""
    os.makedirs(dirname or ".", exist_ok=True)


def check_isfile(fpath: str) -> bool:
    """Whether there is such a file; warns where there is none."""
    found = osp.isfile(fpath)
    if not found:
        warnings.warn(f'No file found at "{fpath}"', stacklevel=2)
    return found


def read_json(fpath: str) -> Any:
    """The content of a JSON file."""
    with open(fpath, encoding="utf-8") as file:
        return json.load(file)


def write_json(obj: Any, fpath: str) -> None:
    """Write a JSON file, and make its directory where that is missing."""
    mkdir_if_missing(osp.dirname(fpath))
    with open(fpath, "w", encoding="utf-8") as file:
        json.dump(obj, file, indent=4, separators=(",", ": "))


def set_random_seed(seed: int) -> None:
    """Seed the generators of random, numpy and torch (all devices)."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def read_image(path: str) -> Image:
    """The image as RGB."""
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("RGB")


def collect_env_info() -> str:
    """Several lines about torch, CUDA, the system and Pillow; takes seconds."""
    import PIL
    from torch.utils.collect_env import get_pretty_env_info

    return f"{get_pretty_env_info()}\n        Pillow ({PIL.__version__})"


def listdir_nohidden(path: str, sort: bool = False) -> list[str]:
    """The names in a directory that do not begin with a dot."""
    names = [name for name in os.listdir(path) if not name.startswith(".")]
    return sorted(names) if sort else names


def check_availability(requested: str, available: Sequence[str]) -> None:
    """Refuse a name that is not among the available ones."""
    if requested in available:
        return
    similar = get_close_matches(requested, available, n=1, cutoff=0.4)
    hint = f" Did you mean {similar[0]!r}?" if similar else ""
    raise ValueError(
        f"{requested!r} is not registered; available: {sorted(available)}.{hint} "
        f"(If it is one of Dassl's own, install Dassl.pytorch: {UPSTREAM})"
    )


def tolist_if_not(x: Any) -> list[Any]:
    """x itself if it is a list, [x] otherwise."""
    return x if isinstance(x, list) else [x]
