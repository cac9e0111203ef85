"""Tables on disk: the file, its rows, memory maps larger than memory, and damage."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from air_plugin.utils.errors import UserError
from air_plugin.utils.tables import Table, map_tensors, write_table
from air_plugin.utils.tensors import save_tensors


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.uint8])
@pytest.mark.parametrize("shape", [(7, 3), (5, 2, 3), (1, 1)])
def test_a_table_written_in_parts_is_the_file_of_the_whole(tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype):
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    save_tensors(tmp_path / "whole", {"x": whole})
    write_table(tmp_path / "parts", "x", whole.split(2), shape=shape, dtype=dtype)
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "whole"]


def test_views_of_larger_tensors_are_written_by_value(tmp_path: Path):
    whole = torch.arange(24.0).reshape(4, 6)
    write_table(tmp_path / "x", "x", [whole[:, ::2]], shape=(4, 3), dtype=torch.float32)
    assert torch.equal(Table.open(tmp_path / "x", "x").mapped(), whole[:, ::2])


@pytest.mark.parametrize(
    "parts", [[torch.zeros(2, 3)], [torch.zeros(4, 3)], [torch.zeros(3, 2)], [torch.zeros(3, 3, dtype=torch.float64)]]
)
def test_parts_that_are_not_the_table_leave_no_file(tmp_path: Path, parts: list[torch.Tensor]):
    with pytest.raises(ValueError, match="part"):
        write_table(tmp_path / "x", "x", parts, shape=(3, 3), dtype=torch.float32)
    assert not list(tmp_path.iterdir())


def test_rows_and_maps_are_those_of_the_file(tmp_path: Path):
    one = torch.randn(9, 2, 3, generator=torch.Generator().manual_seed(0))
    two = torch.randn(4, generator=torch.Generator().manual_seed(1)).double()
    save_tensors(tmp_path / "x", {"one": one, "two": two}, metadata={"author": "nobody"})
    table = Table.open(tmp_path / "x", "one")
    assert len(table) == 9 and table.shape == (9, 2, 3)
    for start, stop in ((0, 9), (3, 4), (5, 9)):
        assert np.array_equal(table.rows(start, stop), one[start:stop].numpy())
    mapped = map_tensors(tmp_path / "x")
    assert mapped.keys() == {"one", "two"}
    assert torch.equal(mapped["one"], one) and torch.equal(mapped["two"], two)
    assert mapped["one"].dtype == torch.float32 and mapped["two"].dtype == torch.float64


@pytest.mark.skipif(sys.platform != "linux", reason="needs files with holes, and the size of the memory")
def test_a_table_larger_than_memory_is_mapped(tmp_path: Path):
    """safetensors' own map of such a file is refused by Linux."""
    rows = int(1.5 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) // (512 * 4)
    size = rows * 512 * 4
    header = json.dumps({"x": {"dtype": "F32", "shape": [rows, 512], "data_offsets": [0, size]}}).encode()
    with open(tmp_path / "x", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)  # a hole: it takes no place
        file.seek(-512 * 4, os.SEEK_END)
        file.write(np.arange(512, dtype=np.float32).tobytes())
    assert torch.equal(Table.open(tmp_path / "x", "x").mapped()[-1], torch.arange(512.0))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read .*No such file"),
        (b"", "is no safetensors file"),
        (b"\xff" * 100, "is no safetensors file"),
        (b"\x02" + bytes(7) + b"[]", "is no safetensors file"),
        (b"\x02" + bytes(7) + b"{}", "has no table 'x' of floating numbers"),
    ],
)
def test_damage_is_named(tmp_path: Path, content: bytes | None, message: str):
    if content is not None:
        (tmp_path / "x").write_bytes(content)
    with pytest.raises(UserError, match=message):
        Table.open(tmp_path / "x", "x")


def test_other_types_and_short_files_are_refused(tmp_path: Path):
    save_tensors(tmp_path / "x", {"x": torch.arange(3)})
    with pytest.raises(UserError, match=r"no table .* of floating numbers"):
        Table.open(tmp_path / "x", "x")
    save_tensors(tmp_path / "x", {"x": torch.zeros(3)})
    data = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(data[:-1])
    with pytest.raises(UserError, match="shorter than its header says"):
        Table.open(tmp_path / "x", "x")
