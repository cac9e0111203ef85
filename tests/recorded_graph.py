"""A CUDA graph for the CPU: operations are recorded with the memory that they use, and replayed on the same memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def tensors_in(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


class Recorder(TorchDispatchMode):
    """Records every operation below autograd, and what it changes in tensors that existed before."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.changed: dict[int, tuple[Tensor, Tensor]] = {}
        self.made: set[int] = set()

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        named = named or {}
        if operation is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")  # CUDA's words
        used = {t.untyped_storage()._cdata: t for t in tensors_in((arguments, named))}
        if operation._schema.is_mutable:
            for storage, value in used.items():
                if storage not in self.made and storage not in self.changed:
                    whole = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())
                    self.changed[storage] = (whole, whole.clone())
        result = operation(*arguments, **named)
        self.made |= {t.untyped_storage()._cdata for t in tensors_in(result)} - used.keys()
        self.calls.append((operation, arguments, named, result))  # keeps the tensors, and so their memory, alive
        return result


class RecordedGraph:
    """Behaves as a CUDA graph does: a capture changes nothing, and a replay knows only memory and constants.

    log: "warm up", "capture" and "replay", in the order of the calls. fails: the capture raises, half way.
    """

    def __init__(self, *, fails: bool = False) -> None:
        self.log: list[str] = []
        self.fails = fails
        self._calls: list[tuple[Any, Any, Any, Any]] = []

    def warm_up(self, call: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        self.log.append("warm up")
        return call()

    def capture(self, call: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        self.log.append("capture")
        recorder = Recorder()
        try:
            with recorder:
                outputs = call()
            if self.fails:
                raise RuntimeError("CUDA error: out of luck\nCompile with TORCH_USE_CUDA_DSA")
        finally:
            with torch.no_grad():
                for value, before in recorder.changed.values():
                    value.copy_(before)
        self._calls = recorder.calls
        for _, _, _, result in self._calls:  # nothing was computed yet: who reads this sees that it is wrong
            for value in tensors_in(result):
                if value.untyped_storage()._cdata in recorder.made and value.is_floating_point():
                    value.detach().fill_(float("nan"))
        return outputs

    @torch.no_grad()
    def replay(self) -> None:
        self.log.append("replay")
        for operation, arguments, named, result in self._calls:
            for old, new in zip(tensors_in(result), tensors_in(operation(*arguments, **named)), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.detach().copy_(new)
