"""Tensors as safetensors on disk, their checksums, and names of their types."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from air_plugin.utils.files import digest, write_atomically

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


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
