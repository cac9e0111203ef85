"""torch.compile for generation: only where the number of images pays for it, and never a reason to stop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from air_plugin.utils.errors import first_line, is_out_of_memory

log = logging.getLogger(__name__)

# Measured on an H100 (SD 1.5, 256 px, batch 64): U-Net and decoding alone make 32.3 images/s, and 45.7 after 44 s of
# compilation: 44 / (1 / 32.3 - 1 / 45.7) = 4,850 images.
PAYS_FROM = 5000


def is_worth_compiling(setting: bool | None, device: torch.device, images: int) -> bool:
    """Whether the U-Net is compiled for a number of images.

    Args:
        setting: AIR.COMPILE; None is auto: on a GPU, from `PAYS_FROM` images on.
        device: of the U-Net.
        images: still to be generated.
    """
    return device.type == "cuda" and images >= PAYS_FROM if setting is None else setting


@contextmanager
def compiled(unet: torch.nn.Module) -> Iterator[Callable[[], None]]:
    """Context in which a U-Net is compiled, with its weights in the memory format `channels_last`.

    It is compiled at its first call and for the batch size of that call; other sizes are computed as without
    compilation, since each would take as long again. Where torch cannot compile, a warning says so once, and
    everything is computed without. Yields a function that does nothing: no values are kept between batches.
    """
    unet.to(memory_format=torch.channels_last)
    unet.forward = _Compiled(unet)
    try:
        yield lambda: None
    finally:
        del unet.forward
        unet.to(memory_format=torch.contiguous_format)


class _Compiled:
    """The forward of a U-Net: compiled for one batch size."""

    def __init__(self, unet: torch.nn.Module) -> None:
        self.unet, self.plain = unet, unet.forward
        self.fast: Callable[..., Any] | None = None
        self.batch: int | None = None
        self.fails = False

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        sample = arguments[0] if arguments else named["hidden_states"]  # U-Net, transformer
        if self.fails or self.batch not in (None, len(sample)):
            return self.plain(*arguments, **named)
        try:
            self.fast = self.fast or torch.compile(self.plain, dynamic=False)
            result = self.fast(*arguments, **named)
        except Exception as error:
            if is_out_of_memory(error):  # the next batch is smaller
                self.batch = None
                raise
            reason = f"{type(error).__name__}: {first_line(error)}"
        else:
            self.batch = len(sample)
            return result
        log.warning("AIR.COMPILE: torch.compile fails here (%s); images are generated without it", reason)
        self.fails, self.fast = True, None
        self.unet.to(memory_format=torch.contiguous_format)
        return self.plain(*arguments, **named)
