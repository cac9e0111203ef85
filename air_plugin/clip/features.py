"""Image features. They are extracted once, so that no image encoder runs in training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor

from air_plugin.clip.encoding import Chunk
from air_plugin.clip.preparation import describe
from air_plugin.clip.spread import encode_with_engine
from air_plugin.clip.views import Transform, Views, choose_views
from air_plugin.utils.digests import content_digest
from air_plugin.utils.errors import UserError
from air_plugin.utils.progress import Progress
from air_plugin.utils.seeding import member_seed, stable_seed
from air_plugin.utils.store import Entry, Store
from air_plugin.utils.tables import write_table
from air_plugin.utils.tensors import load_tensors

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
        chosen = choose_views(len(index), self.features.shape[1], count=count, generator=generator)  # (B, count)
        return self.features[index.to(self.features.device), chosen.T.to(self.features.device)]


class Sampled(Protocol):
    """A table of images that batches are sampled from: `FeatureTable`, or `ImageTable` of prepared_images.py."""

    def __len__(self) -> int: ...

    @property
    def plain(self) -> Any:
        """View 0 of all images, indexed by tensors."""

    def sample(self, index: Tensor, *, generator: torch.Generator, count: int = 1) -> Tensor:
        """(count, B, ...) views of (B,) images."""


class FeatureBatches:
    """Batches of two sampled views with their targets; those of an epoch depend only on the seed and the epoch.

    Like Dassl's loader it drops the last, smaller batch, unless it is the only one. For an ensemble of prompts, a batch
    concatenates one batch of each member, and each member has its own order of the images.

    Args:
        table: of N images: their features, or the images themselves (`ImageTable`).
        index: (S,) the images to use.
        targets: tensors of S rows, which every batch contains under the same name.
        batch_size: images of each member in a batch.
        seed: of the order and the views.
        epoch: returns the current epoch.
        members: E, number of members of the ensemble.

    Yields:
        img and img2, two views, (E * B, D) features or (B, H, W, 3) images, and the targets of these images.
    """

    def __init__(
        self,
        table: Sampled,
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
            yield (
                parts[0] if len(parts) == 1 else {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            )

    def order(self, rng: torch.Generator) -> Tensor:
        """The rows of `index` and the targets in the order of an epoch, the last incomplete batch included."""
        return torch.randperm(len(self.index), generator=rng)

    def _stream(self, *seed: int) -> Iterator[dict[str, Tensor]]:
        rng = torch.Generator().manual_seed(stable_seed("batches", *seed))
        for rows in self.order(rng).split(self.batch_size)[: len(self)]:
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
        workers: processes that read images; None: `READERS` for a backbone on a GPU, none for one on the CPU. Where
            ENGINE and WORKERS name several workers (see air_plugin/engine.py), each of these has so many.
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
            pixels = Views(backbone.preprocess, augment, views=views, seed=seed)
            _extract(backbone, files, pixels, entry, batch_size=batch_size, workers=workers, title=title)
        features = entry.tensors("features.safetensors")["features"]
        return FeatureTable(features.to(device or backbone.device), entry.path / "features.safetensors"), cached


def _extract(
    backbone: Backbone,
    files: Sequence[str],
    views: Views,
    entry: Entry,
    *,
    batch_size: int,
    workers: int | None,
    title: str,
) -> None:
    """Fill an artifact with features, a file for each chunk of images: a killed worker loses at most one."""
    size = max(batch_size, CHUNK // batch_size * batch_size)  # whole batches, the same ones in a resumed run
    chunks = []
    for start in range(0, len(files), size):
        part = files[start : start + size]
        # The name tells the size, which depends on batch_size.
        chunks.append(Chunk(start, part, entry.path / f"chunk-{start:09d}-{start + len(part):09d}.safetensors"))
    missing = [chunk for chunk in chunks if load_tensors(chunk.file) is None]
    with Progress(len(files), title=title, unit="images") as progress:
        progress.skip(len(files) - sum(map(len, missing)))
        unreadable = encode_with_engine(
            backbone, views, missing, batch_size=batch_size, workers=workers, update=progress.update
        )
    if unreadable:
        more = f" (and {len(unreadable) - 1} more: {'; '.join(unreadable[1:4])})" if len(unreadable) > 1 else ""
        raise UserError(f"{unreadable[0]}{more}; repair or remove it")
    parts = (load_file(chunk.file)["features"] for chunk in chunks)  # one after the other: more than memory, perhaps
    first = next(parts)
    shape = (len(files), *first.shape[1:])
    write_table(entry.path / "features.safetensors", "features", chain([first], parts), shape=shape, dtype=first.dtype)
    entry.finish(["features.safetensors"])
