"""Tensors as safetensors on disk, their checksums, names of their types, and rows of unit length."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from air_plugin.utils.errors import UserError
from air_plugin.utils.files import digest, write_atomically

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SLACK = 2.5e-3  # of a unit row's length: what rounding to bfloat16 changes

log = logging.getLogger(__name__)
_warned: set[str] = set()


def save_tensors(path: Path, tensors: Mapping[str, Tensor], *, metadata: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors, completely or not at all."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, save_safetensors(plain, metadata=metadata), durable=True)


def load_tensors(path: Path) -> dict[str, Tensor] | None:
    """Read a file of `save_tensors`; None where it is missing or incomplete."""
    try:
        return load_safetensors(path.read_bytes())
    except (FileNotFoundError, SafetensorError):
        return None


def tensor_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over named tensors: their names, types, shapes and values."""
    parts = []
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        head = f"{name} {tensor.dtype} {tuple(tensor.shape)}"
        parts.append(digest(head.encode() + tensor.reshape(-1).view(torch.uint8).numpy().tobytes()))
    return digest("".join(parts).encode())


def unit_rows(features: Tensor, what: str) -> Tensor:
    """Features of unit length: those that are longer or shorter are normalised, with one warning in a process.

    Rows that are unit except for rounding stay bit by bit; a row of zeros stays zero. In a graph that torch exports or
    compiles nothing is checked.

    Args:
        features: (..., D).
        what: they are features of, for the warning: "images".

    Raises:
        UserError: features are not finite.
    """
    if torch.compiler.is_compiling():
        return features
    exact = features.detach().to(torch.promote_types(features.dtype, torch.float32))
    lengths = torch.linalg.vector_norm(exact, dim=-1)
    unit = (lengths - 1).abs() <= SLACK
    if bool(unit.all()):
        return features
    wrong = lengths[~unit]
    if not bool(wrong.isfinite().all()):
        raise UserError(f"{int((~wrong.isfinite()).sum())} of {lengths.numel()} features of {what} are not finite")
    if what not in _warned:
        _warned.add(what)
        log.warning("features of %s are not of unit length (one is %.3g long); they are normalised", what, wrong[0])
    normalised = torch.nn.functional.normalize(features.to(exact.dtype), dim=-1).to(features.dtype)
    return torch.where(unit[..., None], features, normalised)
