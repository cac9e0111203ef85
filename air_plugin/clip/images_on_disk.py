"""Unlabelled images whose features lie on disk and are read by shards, for more images than memory holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from air_plugin.functional.similarity import cosines
from air_plugin.utils.files import digest, file_digest
from air_plugin.utils.tables import Table
from air_plugin.utils.tensors import unit_rows


@dataclass(frozen=True)
class ImagesOnDisk:
    """N images for `refine_shards`: their features are read from a file, and text probabilities computed from them.

    Text probabilities are those of `Backbone.text_probs`; as a table they would take C / D times the space of the
    features. Workers receive the path, not the numbers, so all of them must see the file at that path.

    table: (N, V, D) or (N, D) features; of V views, view 0 is used.
    texts: (C, D) unit text features, float32.
    logit_scale: s of softmax(s f t).

    Example:
        >>> images = ImagesOnDisk.open("features.safetensors", template_features(backbone, names, "a photo of a {}."),
        ...                            logit_scale=backbone.logit_scale)
        >>> refine_shards(images, prior=prior)
    """

    table: Table
    texts: np.ndarray
    logit_scale: float

    @classmethod
    def open(cls, path: str | Path, texts: Tensor, *, logit_scale: float, name: str = "features") -> ImagesOnDisk:
        """The images of a file of features.

        Args:
            path: safetensors; `extract_features` leaves one in its store.
            texts: (C, D) text features.
            logit_scale: of the backbone.
            name: of the features in the file.

        Raises:
            UserError: the file is missing or damaged, or has no such table.
        """
        table = Table.open(Path(path), name)
        return cls(table, unit_rows(texts, "texts").detach().float().cpu().numpy(), logit_scale)

    def __len__(self) -> int:
        return len(self.table)

    @property
    def classes(self) -> int:
        """C."""
        return len(self.texts)

    def features(self, start: int, stop: int) -> Tensor:
        """(stop - start, D) unit features, in memory."""
        return self._plain(self.table.rows(start, stop))

    def every(self, step: int) -> Tensor:
        """(ceil(N / step), D) unit features of every step-th image, in memory."""
        block = 1000 * step  # images that are mapped at a time
        ends = [(start, min(start + block, len(self))) for start in range(0, len(self), block)]
        return torch.cat([self._plain(self.table.rows(start, stop)[::step]) for start, stop in ends])

    def text_probs(self, start: int, stop: int) -> Tensor:
        """(stop - start, C) zero-shot probabilities softmax(s f t)."""
        features = self.features(start, stop)
        return cosines(self.logit_scale * features, torch.tensor(self.texts).to(features)).softmax(dim=1)

    def _plain(self, rows: np.ndarray) -> Tensor:
        """A copy of view 0."""
        return unit_rows(torch.from_numpy(np.array(rows if rows.ndim == 2 else rows[:, 0])), "images")

    def fingerprint(self) -> str:
        """SHA-256 of the file, the text features and the scale; the file is read once."""
        return digest(f"{file_digest(self.table.path)} {digest(self.texts.tobytes())} {self.logit_scale}".encode())
