"""Batches to a GPU and results from it, while it computes. On the CPU nothing is copied."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Upload:
    """Copies tensors to a device; to a GPU from pinned memory and in a stream of its own.

    It may be called in a thread: it returns when the copy is complete, and what another stream computes goes on
    meanwhile. Where the tensor is used, call `borrow` first.

    Example:
        >>> upload = Upload(torch.device("cuda"))
        >>> pixels = upload(torch.zeros(100, 3, 224, 224))
        >>> upload.borrow(pixels)
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def overlaps(self) -> bool:
        """Whether the device copies and computes while this process goes on."""
        return self.stream is not None

    def __call__(self, tensor: Tensor) -> Tensor:
        if self.stream is None:
            return tensor.to(self.device)
        with torch.cuda.stream(self.stream):  # of this thread; the device becomes the stream's
            copy = tensor.pin_memory().to(self.device, non_blocking=True)
        self.stream.synchronize()
        return copy

    def borrow(self, tensor: Tensor) -> None:
        """Keep the memory of a copy until what the current stream does with it is done."""
        if self.stream is not None:
            tensor.record_stream(torch.cuda.current_stream(self.device))


def begin_download(tensor: Tensor) -> Callable[[], Tensor]:
    """Begin to copy a tensor to the CPU; the returned function waits for the copy and returns it."""
    if tensor.device.type != "cuda":
        return tensor.cpu
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(tensor.device))

    def wait() -> Tensor:
        copied.synchronize()
        return copy.clone()  # pinned memory is scarce

    return wait
