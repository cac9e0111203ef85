"""Images that are decoded and prepared once and kept as bytes, for trainings in which the image tower runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from air_plugin.clip.preparation import describe
from air_plugin.clip.views import Transform, Views, choose_views
from air_plugin.utils.digests import content_digest
from air_plugin.utils.errors import UserError
from air_plugin.utils.progress import Progress
from air_plugin.utils.store import Entry, Store
from air_plugin.utils.tables import Table, write_table
from air_plugin.utils.workers import batched, map_in_processes

if TYPE_CHECKING:
    from air_plugin.clip.backbone import Backbone

CHUNK = 1024  # images a file


@dataclass(frozen=True)
class ImageTable:
    """N prepared images in V views, as `FeatureTable` has features.

    files: memory-mapped (n, V, H, W, 3) uint8, `CHUNK` images each but the last. View 0 is the image as it is
        evaluated; the others are augmented.
    pinned: whether batches are made in memory from which a GPU copies them while it computes.
    """

    files: Sequence[Tensor]
    pinned: bool = False

    def __len__(self) -> int:
        return sum(map(len, self.files))

    @property
    def views(self) -> int:
        """V."""
        return self.files[0].shape[1]

    @property
    def plain(self) -> PreparedImages:
        """View 0 of all images; nothing is read yet."""
        return PreparedImages(self, torch.arange(len(self)))

    def read(self, index: Tensor, views: Tensor) -> Tensor:
        """(B,) images in (B,) views: (B, H, W, 3) uint8 on the CPU."""
        size = len(self.files[0])
        rows = zip(index.tolist(), views.tolist(), strict=True)
        batch = torch.stack([self.files[image // size][image % size, view] for image, view in rows])
        return batch.pin_memory() if self.pinned else batch

    def sample(self, index: Tensor, *, generator: torch.Generator, count: int = 1) -> Tensor:
        """Sample views of some images: as `FeatureTable.sample`, but (count, B, H, W, 3) uint8 on the CPU."""
        index = index.cpu()
        if self.views == 1:
            return self.read(index, torch.zeros_like(index)).expand(count, -1, -1, -1, -1)
        chosen = choose_views(len(index), self.views, count=count, generator=generator)
        return torch.stack([self.read(index, chosen[:, number]) for number in range(count)])


@dataclass(frozen=True)
class PreparedImages:
    """Some images of a table, each in the view that is not augmented. `images[index]` are some of them."""

    table: ImageTable
    index: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: Tensor) -> PreparedImages:
        return PreparedImages(self.table, self.index[index.cpu()])

    def read(self) -> Tensor:
        """(n, H, W, 3) uint8 on the CPU: all of them."""
        return self.table.read(self.index, torch.zeros_like(self.index))

    def batches(self, size: int) -> Iterator[Tensor]:
        """(n, H, W, 3) uint8 on the CPU, n at most `size`."""
        for part in self.index.split(size):
            yield self.table.read(part, torch.zeros_like(part))


def prepare_images(
    backbone: Backbone,
    paths: Sequence[str | Path],
    *,
    store: Store,
    views: int = 1,
    augment: Transform | None = None,
    seed: int = 0,
    workers: int = 0,
    title: str = "images",
) -> tuple[ImageTable, bool]:
    """Decode and prepare images up to the last steps, ToTensor and Normalize, or take them from the store.

    Args:
        backbone: its preprocessing makes view 0.
        paths: N image files.
        store: keeps the images, one byte a number: N * V * H * W * 3 bytes. A killed run loses at most `CHUNK` images.
        views: V >= 1, view 0 included.
        augment: PIL image to (3, H, W), needed where views > 1; it ends with the same Normalize as the preprocessing.
        seed: of the augmentation.
        workers: processes that read images.
        title: on the progress bar.

    Returns:
        The table, and whether it was in the store.

    Raises:
        UserError: images are unreadable, and the message names them, or a worker was killed (run again, finished work
            is kept), or a preparation has no such end.
    """
    files = [str(path) for path in paths]
    if not files:
        raise UserError(f"{title}: there are no images")
    prepared = Views(backbone.preprocess, augment, views=views, seed=seed)
    if prepared.tail is None:
        raise UserError(
            f"{title}: prepared images are kept as bytes, so INPUT.TRANSFORMS must end with normalize; leave out what "
            "follows it, or set TRAINER.PROMPT.IMAGE_VIEWS 1"
        )
    settings = {
        "recipe": 1,
        "images": content_digest(files, cache=store.digests),
        "plain": describe(prepared.plain),
        "augment": describe(prepared.augment) if views > 1 else None,
        "views": views,
        "seed": seed if views > 1 else None,
    }
    names = [f"images-{start:09d}.safetensors" for start in range(0, len(files), CHUNK)]
    with store.open("prepared", settings) as entry:
        cached = entry.complete
        if not cached:
            _fill(prepared, files, entry, names, workers=workers, title=title)
        mapped = [Table.open(entry.path / name, "images").mapped() for name in names]
    return ImageTable(mapped, pinned=backbone.device.type == "cuda"), cached


def _fill(views: Views, files: Sequence[str], entry: Entry, names: Sequence[str], *, workers: int, title: str) -> None:
    """Make the files of an artifact that are not there yet."""
    chunks = [range(start, min(start + CHUNK, len(files))) for start in range(0, len(files), CHUNK)]
    missing = [(name, chunk) for name, chunk in zip(names, chunks, strict=True) if not (entry.path / name).is_file()]
    places = [(index, files[index]) for _, chunk in missing for index in chunk]
    unreadable: list[str] = []
    with (
        Progress(len(files), title=title, unit="images") as progress,
        closing(map_in_processes(views.read, places, workers=workers)) as read,
        closing(batched(read, CHUNK)) as batches,
    ):
        progress.skip(len(files) - len(places))
        for (name, _), items in zip(missing, batches, strict=True):
            errors = [item for item in items if isinstance(item, str)]
            unreadable += errors
            if not errors:
                parts = [torch.from_numpy(item)[None] for item in items]
                shape = (len(parts), *parts[0].shape[1:])
                write_table(entry.path / name, "images", parts, shape=shape, dtype=torch.uint8)
            progress.update(len(items))
    if unreadable:
        more = f" (and {len(unreadable) - 1} more: {'; '.join(unreadable[1:4])})" if len(unreadable) > 1 else ""
        raise UserError(f"{unreadable[0]}{more}; repair or remove it")
    entry.finish(list(names))
