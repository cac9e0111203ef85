"""OpenAI's own files (ViT-B-16.pt): TorchScript archives, of which only the published ones are read."""

from __future__ import annotations

import functools
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from air_plugin.utils.files import digest
from air_plugin.utils.tensors import save_tensors

NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size")  # numbers that stand among the tensors


def is_published(path: Path) -> bool:
    """Whether a file is one of OpenAI's archives, by its SHA-256, which is part of the address that open_clip lists.

    A TorchScript archive holds a program, so that no other one is opened.
    """
    if path.suffix != ".pt" or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        if not any(name.endswith("/constants.pkl") for name in archive.namelist()):
            return False  # tensors alone
    status = path.stat()
    return _digest(path, status.st_size, status.st_mtime_ns) in _published()


@functools.lru_cache(maxsize=4)
def _digest(path: Path, size: int, mtime_ns: int) -> str:
    """SHA-256 of a file of that size and time: a load asks twice, and the file is large."""
    return digest(path.read_bytes())


def _published() -> set[str]:
    """SHA-256 of OpenAI's files."""
    from open_clip.pretrained import get_pretrained_url, list_pretrained_models_by_tag

    urls = [get_pretrained_url(name, "openai") for name in list_pretrained_models_by_tag("openai")]
    return {url.split("/")[-2] for url in urls if url}


@contextmanager
def as_safetensors(path: Path) -> Iterator[Path]:
    """The weights of a published archive in a temporary file, which the usual loader reads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces the end of TorchScript
        tensors = torch.jit.load(str(path), map_location="cpu").state_dict()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights.safetensors"
        save_tensors(file, {name: value.clone() for name, value in tensors.items() if name not in NO_WEIGHTS})
        yield file
