"""Feature extraction by the workers of an engine: each of them holds the backbone, and encodes chunk after chunk."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from air_plugin.clip.encoding import Chunk, encode_chunks
from air_plugin.clip.loading import load_backbone
from air_plugin.clip.views import Views
from air_plugin.engine import chosen, number_of_workers
from air_plugin.utils.errors import UserError
from air_plugin.utils.progress import Event, report
from air_plugin.utils.tensors import load_tensors

if TYPE_CHECKING:
    from air_plugin.clip.backbone import Backbone

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """What a worker needs to encode images.

    name, precision: `load_backbone`'s arguments.
    fingerprint: of the backbone that the driver has.
    autocast: as the driver's backbone, whatever the worker's device: the key of the features names it.
    device: cuda or cpu.
    views: prepare the images.
    batch_size: images of a forward pass.
    readers: processes that read images, for each worker; see `extract_features`.
    """

    name: str
    precision: str
    fingerprint: str
    autocast: torch.dtype | None
    device: str
    views: Views
    batch_size: int
    readers: int | None


@dataclass(frozen=True)
class Place:
    """What a worker holds."""

    recipe: Recipe
    backbone: Backbone


def encode_with_engine(
    backbone: Backbone,
    views: Views,
    chunks: Sequence[Chunk],
    *,
    batch_size: int,
    workers: int | None,
    update: Callable[[int], None],
) -> list[str]:
    """`encode_chunks` by the workers of the engine that the environment names: the same files, bit by bit.

    This process does it where there are no other workers or not two chunks, and where workers cannot make the same
    backbone (it does not come from `load_backbone`) or the same transforms (they cannot be pickled).
    """
    alone = partial(encode_chunks, backbone, views, chunks, batch_size=batch_size, workers=workers, update=update)
    if len(chunks) < 2:
        return alone()
    engine = chosen()
    gpus = 1.0 if engine.gpus() or backbone.device.type == "cuda" else 0.0
    count = number_of_workers(engine, gpus=gpus)
    if count == 1 and engine.name == "local":
        return alone()
    if backbone.precision is None or not can_be_pickled(views):
        log.info("images are encoded by this process alone: workers cannot make its backbone or its transforms")
        return alone()
    recipe = Recipe(
        name=backbone.name,
        precision=backbone.precision,
        fingerprint=backbone.fingerprint,
        autocast=backbone.autocast,
        device="cuda" if gpus else "cpu",
        views=views,
        batch_size=batch_size,
        readers=workers,
    )
    meter = Meter(chunks, update)
    unreadable: dict[int, list[str]] = {}
    for index, unreadable[index] in engine.map(
        partial(set_up, recipe),
        encode_chunk,
        chunks,
        workers=count,
        gpus=gpus,
        title="chunk of images",
        folders=[chunks[0].file.parent.absolute()],
        progress=meter.move,
    ):
        meter.finish(index)
    return [error for index in sorted(unreadable) for error in unreadable[index]]


class Meter:
    """Adds up the progress of chunks; one that was lost with its worker, and is done again, is counted once."""

    def __init__(self, chunks: Sequence[Chunk], update: Callable[[int], None]) -> None:
        self.chunks, self.update = chunks, update
        self.done: dict[int, int] = {}

    def move(self, index: int, event: Event) -> None:
        new = event.done - self.done.get(index, 0)
        if new > 0:
            self.done[index] = event.done
            self.update(new)

    def finish(self, index: int) -> None:
        self.update(len(self.chunks[index]) - self.done.pop(index, 0))


def can_be_pickled(views: Views) -> bool:
    try:
        pickle.dumps(views)
    except (pickle.PicklingError, AttributeError, TypeError):  # a function within a function, for instance
        return False
    return True


def set_up(recipe: Recipe) -> Place:
    """Load the backbone in a worker.

    Raises:
        UserError: it cannot be loaded, or has other weights than the driver's.
    """
    backbone = load_backbone(recipe.name, precision=recipe.precision, autocast=False, device=recipe.device)
    if backbone.fingerprint != recipe.fingerprint:
        raise UserError(f"backbone '{recipe.name}' has other weights on a worker's machine than on this one")
    return Place(recipe, replace(backbone, autocast=recipe.autocast))


def encode_chunk(place: Place, chunk: Chunk) -> list[str]:
    """Write the file of a chunk, unless a worker that was lost has written it; returns errors of unreadable images."""
    if load_tensors(chunk.file) is not None:
        return []
    done = 0

    def update(images: int) -> None:
        nonlocal done
        done += images
        report("features", done, len(chunk))

    recipe = place.recipe
    return encode_chunks(
        place.backbone, recipe.views, [chunk], batch_size=recipe.batch_size, workers=recipe.readers, update=update
    )
