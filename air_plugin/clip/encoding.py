"""Images to features: readers, uploads, the image tower and downloads, side by side."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from air_plugin.clip.views import Views
from air_plugin.utils.errors import UserError
from air_plugin.utils.images import READERS
from air_plugin.utils.tensors import save_tensors
from air_plugin.utils.transfer import Upload, begin_download
from air_plugin.utils.workers import batched, behind, map_in_processes, one_ahead

if TYPE_CHECKING:
    from air_plugin.clip.backbone import Backbone


@dataclass(frozen=True)
class Chunk:
    """Images of a feature table that are encoded together: whole batches, but for the last chunk.

    start: index of the first image.
    paths: the image files.
    file: of their features, which is written whole or not at all.
    """

    start: int
    paths: Sequence[str]
    file: Path

    def __len__(self) -> int:
        return len(self.paths)


def encode_chunks(
    backbone: Backbone,
    views: Views,
    chunks: Sequence[Chunk],
    *,
    batch_size: int,
    workers: int | None,
    update: Callable[[int], None] = lambda images: None,
) -> list[str]:
    """Write the files of some chunks, one after another; that of a chunk with unreadable images is not written.

    Args:
        backbone: its image encoder.
        views: prepare the images.
        chunks: of one table, in its order.
        batch_size: images of a forward pass.
        workers: processes that read images; see `extract_features`.
        update: is called after each batch with its number of images.

    Returns:
        The errors of unreadable images.

    Raises:
        UserError: a worker was killed, or the image tower overflows.
    """
    workers = _default_workers(backbone.device) if workers is None else workers
    unreadable: list[str] = []
    with closing(_encode(backbone, views, chunks, batch_size=batch_size, workers=workers)) as encoded:
        for chunk in chunks:
            features, errors = _collect(backbone, encoded, len(chunk), update)
            unreadable += errors
            if not errors:
                save_tensors(chunk.file, {"features": features})
    return unreadable


def _default_workers(device: torch.device) -> int:
    """Processes that keep a GPU busy; none for the CPU, which has its cores' work in the encoder."""
    return READERS if device.type == "cuda" and sys.platform == "linux" else 0


def _collect(
    backbone: Backbone, encoded: Iterator[_Encoded], count: int, update: Callable[[int], None]
) -> tuple[Tensor, list[str]]:
    """(count, V, D) features of the next images, and the errors of those that cannot be read."""
    features: list[Tensor] = []
    errors: list[str] = []
    while count > 0:
        batch = next(encoded)
        if batch.features is not None:
            features.append(_require_finite(batch.features(), backbone))
        errors += batch.errors
        count -= batch.images
        update(batch.images)
    return torch.cat(features) if features else torch.empty(0), errors


def _require_finite(features: Tensor, backbone: Backbone) -> Tensor:
    """The features; a UserError where a tower that computes by autocast overflows."""
    if backbone.autocast is not None and not torch.isfinite(features).all():
        kind = str(backbone.autocast).removeprefix("torch.")
        raise UserError(
            f"the image tower of {backbone.name} overflows in {kind}; compute in fp32: TRAINER.PROMPT.AUTOCAST False "
            "(load_backbone: autocast=False)"
        )
    return features


@dataclass(frozen=True)
class _Encoded:
    """A batch whose encoding was begun.

    images: how many. errors: of those that cannot be read.
    features: waits for their (n, V, D) features; None where an image of their chunk cannot be read.
    """

    images: int
    errors: list[str]
    features: Callable[[], Tensor] | None


def _encode(
    backbone: Backbone, views: Views, chunks: Sequence[Chunk], *, batch_size: int, workers: int
) -> Generator[_Encoded, None, None]:
    """Encode chunks of images.

    While a batch is encoded, the workers read the images after it, and a thread copies the next batch to the device.
    """
    upload = Upload(backbone.device)

    def prepare(items: list[np.ndarray | str]) -> tuple[int, list[str], Tensor | None]:
        errors = [item for item in items if isinstance(item, str)]
        pixels = [item for item in items if not isinstance(item, str)]
        return len(items), errors, upload(views.collate(pixels)) if pixels else None

    def encode(batch: Tensor) -> Callable[[], Tensor]:
        upload.borrow(batch)
        return begin_download(backbone.encode_images(views.finish(batch)).unflatten(0, (-1, views.views)))

    places = [place for chunk in chunks for place in enumerate(chunk.paths, chunk.start)]
    with (
        closing(map_in_processes(views.read, places, workers=workers)) as read,
        closing(batched(read, batch_size)) as plain,
        closing(one_ahead(map(prepare, plain)) if workers else (prepare(items) for items in plain)) as batches,
        closing(behind(_begun(batches, chunks, batch_size, encode), by=int(upload.overlaps))) as encoded,
    ):
        yield from encoded


def _begun(
    batches: Iterator[tuple[int, list[str], Tensor | None]],
    chunks: Sequence[Chunk],
    batch_size: int,
    encode: Callable[[Tensor], Callable[[], Tensor]],
) -> Generator[_Encoded, None, None]:
    """Begin to encode the batches. Where an image cannot be read, no more of its chunk is encoded: it is not kept."""
    for chunk in chunks:
        broken = False
        for _ in range(0, len(chunk), batch_size):
            images, errors, pixels = next(batches)
            broken = broken or bool(errors)
            yield _Encoded(images, errors, None if broken or pixels is None else encode(pixels))
