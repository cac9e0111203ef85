"""Image features. They are extracted once, so that no image encoder runs in training."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from air_plugin.clip.preparation import describe
from air_plugin.clip.views import Transform, Views
from air_plugin.utils.digests import content_digest
from air_plugin.utils.errors import UserError
from air_plugin.utils.images import READERS
from air_plugin.utils.progress import Progress
from air_plugin.utils.seeding import member_seed, stable_seed
from air_plugin.utils.store import Entry, Store
from air_plugin.utils.tables import write_table
from air_plugin.utils.tensors import load_tensors, save_tensors
from air_plugin.utils.transfer import Upload, begin_download
from air_plugin.utils.workers import batched, behind, map_in_processes, one_ahead

if TYPE_CHECKING:
    from air_plugin.clip.backbone import Backbone

CHUNK = 4096  # images between two files of unfinished work


@dataclass(frozen=True)
class FeatureTable:
    """Unit image features of N images in V views.

    features: (N, V, D) float32, read-only. View 0 is the image as it is evaluated; the others are augmented.
    path: the file of the features in the store; None for a table that was not read from it.
    """

    features: Tensor
    path: Path | None = None

    def __len__(self) -> int:
        return len(self.features)

    @property
    def plain(self) -> Tensor:
        """(N, D): view 0."""
        return self.features[:, 0]

    def sample(self, index: Tensor, *, generator: torch.Generator, count: int = 1) -> Tensor:
        """Sample augmented views of some images; view 0 where there are no others.

        Args:
            index: (B,) image indices.
            generator: of the random choice.
            count: views of each image; different ones where there are enough.

        Returns:
            (count, B, D).
        """
        views = self.features.shape[1]
        if views <= count:
            chosen = torch.arange(count).remainder(views).expand(len(index), -1)
        else:
            chosen = 1 + torch.rand(len(index), views - 1, generator=generator).argsort(dim=1)[:, :count]  # (B, count)
        return self.features[index.to(self.features.device), chosen.T.to(self.features.device)]


class FeatureBatches:
    """Batches of two sampled views with their targets; those of an epoch depend only on the seed and the epoch.

    Like Dassl's loader it drops the last, smaller batch, unless it is the only one. For an ensemble of prompts, a batch
    concatenates one batch of each member, and each member has its own order of the images.

    Args:
        table: of N images.
        index: (S,) the images to use.
        targets: tensors of S rows, which every batch contains under the same name.
        batch_size: images of each member in a batch.
        seed: of the order and the views.
        epoch: returns the current epoch.
        members: E, number of members of the ensemble.

    Yields:
        img and img2, (E * B, D) two views, and the targets of these images.
    """

    def __init__(
        self,
        table: FeatureTable,
        index: Tensor,
        targets: dict[str, Tensor],
        *,
        batch_size: int,
        seed: int,
        epoch: Callable[[], int],
        members: int = 1,
    ) -> None:
        self.table, self.index, self.targets, self.members = table, index, targets, members
        self.batch_size, self.seed, self.epoch = min(batch_size, len(index)), seed, epoch

    def __len__(self) -> int:
        return len(self.index) // self.batch_size

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        streams = [self._stream(self.seed, self.epoch(), *member_seed(member)) for member in range(self.members)]
        for parts in zip(*streams, strict=True):
            yield {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _stream(self, *seed: int) -> Iterator[dict[str, Tensor]]:
        rng = torch.Generator().manual_seed(stable_seed("batches", *seed))
        order = torch.randperm(len(self.index), generator=rng)
        for rows in order.split(self.batch_size)[: len(self)]:
            rows = rows.to(self.index.device)
            first, second = self.table.sample(self.index[rows], generator=rng, count=2)
            yield {"img": first, "img2": second, **{name: values[rows] for name, values in self.targets.items()}}


def extract_features(
    backbone: Backbone,
    paths: Sequence[str | Path],
    *,
    store: Store,
    views: int = 1,
    augment: Transform | None = None,
    seed: int = 0,
    batch_size: int = 100,
    workers: int | None = None,
    title: str = "features",
    device: torch.device | str | None = None,
) -> tuple[FeatureTable, bool]:
    """Extract the features of images, or read them from the store.

    Args:
        backbone: its image encoder and preprocessing make view 0.
        paths: N image files.
        store: keeps the table; the key consists of the images' content, the backbone's weights and what the transforms
            do (see `describe`).
        views: V >= 1, view 0 included.
        augment: PIL image to (3, H, W), random through the global generators of torch, Python
            and NumPy; needed where views > 1.
        seed: of the augmentation.
        batch_size: images a forward pass.
        workers: processes that read images; None: `READERS` for a backbone on a GPU, none for one on the CPU.
        title: on the progress bar.
        device: of the table; None: the backbone's. On the CPU a table of more than 4 GiB is memory-mapped.

    Returns:
        The table, and whether it was in the store.

    Raises:
        UserError: images are unreadable, and the message names them, or a worker was killed (run again, finished work
            is kept), or the image tower overflows in half precision.
    """
    files = [str(path) for path in paths]
    if not files:
        raise UserError(f"{title}: there are no images")
    settings = {
        "recipe": 3,
        "images": content_digest(files, cache=store.digests),
        "backbone": backbone.fingerprint,
        "plain": describe(backbone.preprocess),
        "augment": describe(augment) if views > 1 else None,
        "views": views,
        "seed": seed if views > 1 else None,
        "dtype": str(next(backbone.model.parameters()).dtype),
        **backbone.computation,
    }
    with store.open("features", settings) as entry:
        cached = entry.complete
        if not cached:
            if workers is None:
                workers = _default_workers(backbone.device)
            pixels = Views(files, backbone.preprocess, augment, views=views, seed=seed)
            _extract(backbone, pixels, entry, batch_size=batch_size, workers=workers, title=title)
        features = entry.tensors("features.safetensors")["features"]
        return FeatureTable(features.to(device or backbone.device), entry.path / "features.safetensors"), cached


def _default_workers(device: torch.device) -> int:
    """Processes that keep a GPU busy; none for the CPU, which has its cores' work in the encoder."""
    return READERS if device.type == "cuda" and sys.platform == "linux" else 0


def _extract(backbone: Backbone, views: Views, entry: Entry, *, batch_size: int, workers: int, title: str) -> None:
    """Fill an artifact with features, a file for each chunk of images: a killed run loses at most one chunk."""
    size = max(batch_size, CHUNK // batch_size * batch_size)  # whole batches, the same ones in a resumed run
    chunks = [range(start, min(start + size, len(views))) for start in range(0, len(views), size)]
    # Their sizes depend on batch_size.
    paths = [entry.path / f"chunk-{chunk.start:09d}-{chunk.stop:09d}.safetensors" for chunk in chunks]
    done = [load_tensors(path) is not None for path in paths]
    missing = [chunk for chunk, there in zip(chunks, done, strict=True) if not there]
    unreadable: list[str] = []
    with (
        Progress(len(views), title=title, unit="images") as progress,
        closing(_encode(backbone, views, missing, batch_size=batch_size, workers=workers)) as encoded,
    ):
        progress.skip(len(views) - sum(map(len, missing)))
        for chunk, path, there in zip(chunks, paths, done, strict=True):
            if not there:
                features, errors = _collect(backbone, encoded, len(chunk), progress)
                unreadable += errors
                if not errors:
                    save_tensors(path, {"features": features})
    if unreadable:
        more = f" (and {len(unreadable) - 1} more: {'; '.join(unreadable[1:4])})" if len(unreadable) > 1 else ""
        raise UserError(f"{unreadable[0]}{more}; repair or remove it")
    parts = (load_file(path)["features"] for path in paths)  # one after the other: the table may exceed memory
    first = next(parts)
    shape = (len(views), *first.shape[1:])
    write_table(entry.path / "features.safetensors", "features", chain([first], parts), shape=shape, dtype=first.dtype)
    entry.finish(["features.safetensors"])


def _collect(
    backbone: Backbone, encoded: Iterator[_Encoded], count: int, progress: Progress
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
        progress.update(batch.images)
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
    backbone: Backbone, views: Views, chunks: Sequence[range], *, batch_size: int, workers: int
) -> Generator[_Encoded, None, None]:
    """Encode chunks of images, each but the last a whole number of batches.

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

    places = [(index, views.paths[index]) for chunk in chunks for index in chunk]
    with (
        closing(map_in_processes(views.read, places, workers=workers)) as read,
        closing(batched(read, batch_size)) as plain,
        closing(one_ahead(map(prepare, plain)) if workers else (prepare(items) for items in plain)) as batches,
        closing(behind(_begun(batches, chunks, batch_size, encode), by=int(upload.overlaps))) as encoded,
    ):
        yield from encoded


def _begun(
    batches: Iterator[tuple[int, list[str], Tensor | None]],
    chunks: Sequence[range],
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
