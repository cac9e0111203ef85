"""Image features. They are extracted once, so that no image encoder runs in training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from air_plugin.clip.preparation import describe
from air_plugin.utils.digests import content_digest
from air_plugin.utils.errors import UserError
from air_plugin.utils.images import UnreadableImage, load_rgb
from air_plugin.utils.seeding import member_seed, seeded, stable_seed
from air_plugin.utils.store import Entry, Store
from air_plugin.utils.tensors import load_tensors, save_tensors
from air_plugin.utils.workers import batched, map_in_processes, one_ahead

if TYPE_CHECKING:
    from air_plugin.clip.backbone import Backbone

Transform = Callable[[Any], Tensor]  # PIL image to (3, H, W)
CHUNK = 4096  # images between two files of unfinished work


@dataclass(frozen=True)
class FeatureTable:
    """Unit image features of N images in V views.

    features: (N, V, D) float32. View 0 is the image as it is evaluated; the others are augmented.
    """

    features: Tensor

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


class _Views:
    """Images to (V, 3, H, W) pixels, or why there are none.

    Augmentation depends only on the seed, the index of the image and the view.
    """

    def __init__(
        self, paths: Sequence[str], plain: Transform, augment: Transform | None, views: int, seed: int
    ) -> None:
        self.paths, self.plain, self.augment, self.views, self.seed = paths, plain, augment, views, seed

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, place: tuple[int, str]) -> np.ndarray | str:
        """An image by its index and its path."""
        index, path = place
        try:
            image = load_rgb(path)
        except UnreadableImage as error:
            return str(error)
        pixels = [self.plain(image)]
        for view in range(1, self.views):
            with seeded(stable_seed(self.seed, index, view)):
                pixels.append(self.augment(image))  # type: ignore[misc]
        return torch.stack(pixels).numpy()


def extract_features(
    backbone: Backbone,
    paths: Sequence[str | Path],
    *,
    store: Store,
    views: int = 1,
    augment: Transform | None = None,
    seed: int = 0,
    batch_size: int = 100,
    workers: int = 0,
    title: str = "features",
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
        workers: processes that read images.
        title: on the progress bar.

    Returns:
        The table, and whether it was in the store.

    Raises:
        UserError: images are unreadable, and the message names them, or a worker was killed; run again, finished work
            is kept.
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
    }
    with store.open("features", settings) as entry:
        cached = entry.complete
        if not cached:
            pixels = _Views(files, backbone.preprocess, augment, views, seed)
            _extract(backbone, pixels, entry, batch_size=batch_size, workers=workers, title=title)
        return FeatureTable(entry.tensors("features.safetensors")["features"].to(backbone.device)), cached


def _extract(backbone: Backbone, dataset: _Views, entry: Entry, *, batch_size: int, workers: int, title: str) -> None:
    """Fill an artifact with features, a file for each chunk of images: a killed run loses at most one chunk."""
    from tqdm import tqdm

    size = max(batch_size, CHUNK // batch_size * batch_size)  # whole batches, the same ones in a resumed run
    chunks, unreadable = [], []
    with tqdm(total=len(dataset), desc=title, unit="image", disable=None) as bar:
        for start in range(0, len(dataset), size):
            indices = range(start, min(start + size, len(dataset)))
            path = (
                entry.path / f"chunk-{indices.start:09d}-{indices.stop:09d}.safetensors"
            )  # sizes depend on batch_size
            part = load_tensors(path)
            if part is None:
                features, errors = _encode(backbone, dataset, indices, batch_size=batch_size, workers=workers)
                unreadable += errors
                part = {"features": features}
                if not errors:
                    save_tensors(path, part)
            chunks.append(part["features"])
            bar.update(len(indices))
    if unreadable:
        more = f" (and {len(unreadable) - 1} more: {'; '.join(unreadable[1:4])})" if len(unreadable) > 1 else ""
        raise UserError(f"{unreadable[0]}{more}; repair or remove it")
    save_tensors(entry.path / "features.safetensors", {"features": torch.cat(chunks)})
    entry.finish(["features.safetensors"])


def _encode(
    backbone: Backbone, dataset: _Views, indices: range, *, batch_size: int, workers: int
) -> tuple[Tensor, list[str]]:
    """(n, V, D) features of some images, and the errors of those that cannot be read."""
    parts: list[Tensor] = []
    errors: list[str] = []
    places = [(index, dataset.paths[index]) for index in indices]
    with (
        closing(map_in_processes(dataset.read, places, workers=workers)) as read,
        closing(batched(read, batch_size)) as plain,
        closing(one_ahead(plain) if workers else plain) as batches,
    ):
        for batch in batches:
            errors += [item for item in batch if isinstance(item, str)]
            pixels = [item for item in batch if not isinstance(item, str)]
            if pixels and not errors:
                stacked = torch.from_numpy(np.stack(pixels))  # (n, V, 3, H, W)
                flat = backbone.encode_images(stacked.flatten(0, 1)).cpu()
                parts.append(flat.reshape(len(stacked), dataset.views, -1))
    return torch.cat(parts) if parts else torch.empty(0), errors
