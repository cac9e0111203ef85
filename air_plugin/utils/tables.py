"""Tables on disk that are larger than memory: safetensors files, read by rows, memory-mapped, or written part by part.

safetensors' own functions read a file whole, or map it in a way that Linux refuses for files larger than its memory.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from air_plugin.utils.errors import UserError
from air_plugin.utils.files import to_json, written_atomically

LARGE = 4 * 2**30  # bytes; the tensors of larger files are memory-mapped where they are opened
LARGEST_HEADER = 10**8  # bytes, as in safetensors
NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "U8": "uint8"}


@dataclass(frozen=True)
class Table:
    """A tensor in a safetensors file. It holds the place only, so it is small when it is pickled.

    path: of the file, which every reader must see at the same place.
    shape: of the tensor, (N, ...).
    dtype: float64, float32, float16 or uint8.
    offset: bytes before the tensor.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: str
    offset: int

    @classmethod
    def open(cls, path: Path, name: str) -> Table:
        """The tensor `name` of a file.

        Raises:
            UserError: the file is missing or damaged, or has no such tensor of one of these types.
        """
        header, begins = _header(path)
        try:
            found = header[name]
            (begin, end), shape = found["data_offsets"], tuple(found["shape"])
            dtype = np.dtype(NAMES[found["dtype"]])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} has no table '{name}' of floating numbers or bytes") from error
        if path.stat().st_size < begins + end or end - begin != math.prod(shape) * dtype.itemsize:
            raise UserError(f"{path} is damaged: it is shorter than its header says")
        return cls(path, shape, dtype.name, begins + begin)

    def __len__(self) -> int:
        return self.shape[0]

    def rows(self, start: int, stop: int) -> np.ndarray:
        """(stop - start, ...) rows, memory-mapped and read-only: what is used of them is read, and freed with them."""
        row = math.prod(self.shape[1:]) * np.dtype(self.dtype).itemsize
        shape = (stop - start, *self.shape[1:])
        return np.memmap(self.path, self.dtype, "r", offset=self.offset + start * row, shape=shape)

    def mapped(self) -> Tensor:
        """The whole tensor, memory-mapped: the system reads what is used, and drops it where memory is short.

        It is read-only: writing to it ends the process.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(self.rows(0, len(self)))


def map_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, each as `Table.mapped`.

    Raises:
        UserError: the file is missing or damaged, or has tensors of other types.
    """
    return {name: Table.open(path, name).mapped() for name in _header(path)[0] if name != "__metadata__"}


def write_table(path: Path, name: str, parts: Iterable[Tensor], *, shape: Sequence[int], dtype: torch.dtype) -> None:
    """Write a tensor as a safetensors file from parts of its rows; completely or not at all, and the disk has it then.

    The file is, byte by byte, that of `save_tensors`, which needs the whole tensor in memory.

    Args:
        path: of the file.
        name: of the tensor.
        parts: (n, ...) in the order of the rows.
        shape: (N, ...) of all.
        dtype: of all: float64, float32, float16 or uint8.

    Raises:
        ValueError: the parts are more or fewer rows than N, or of another type.
    """
    numbers = str(dtype).removeprefix("torch.")
    kind = next(kind for kind, found in NAMES.items() if found == numbers)
    size = math.prod(shape) * np.dtype(numbers).itemsize
    entry = {"dtype": kind, "shape": list(shape), "data_offsets": [0, size]}
    header = to_json({name: entry}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with written_atomically(path, durable=True) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        rows = 0
        for part in parts:
            if part.dtype != dtype or part.shape[1:] != torch.Size(shape[1:]):
                raise ValueError(f"a part of {name} is {part.dtype} {tuple(part.shape)}, not of {shape} {dtype}")
            file.write(part.detach().cpu().contiguous().numpy().data)
            rows += len(part)
        if rows != shape[0]:
            raise ValueError(f"the parts of {name} have {rows} rows, not {shape[0]}")


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and how many bytes stand before the first tensor."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, LARGEST_HEADER)))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is no safetensors file, or is damaged") from error
    if not isinstance(header, dict):
        raise UserError(f"{path} is no safetensors file, or is damaged")
    return header, 8 + length
