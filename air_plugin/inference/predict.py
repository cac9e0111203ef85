"""A trained classifier in use: from image features, or image files, to the probabilities of its heads."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from air_plugin.auxiliary.classifier import AuxiliaryClassifier
from air_plugin.clip.backbone import Backbone
from air_plugin.clip.visual_prompts import PromptedTower, require_vision_transformer
from air_plugin.functional.fusion import fuse
from air_plugin.functional.similarity import cosines
from air_plugin.utils.errors import UserError
from air_plugin.utils.image_files import find_images
from air_plugin.utils.images import READERS, UnreadableImage, load_rgb
from air_plugin.utils.tensors import unit_rows
from air_plugin.utils.workers import batched, one_ahead

logger = logging.getLogger(__name__)

Images = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@dataclass(frozen=True)
class Prediction:
    """A head's prediction for one image. top: (label, probability) by falling probability, `label` first."""

    path: Path
    label: str
    probability: float
    top: list[tuple[str, float]]


@dataclass
class Bundle:
    """A trained classifier, ready for use.

    backbone: holds its frozen image tower.
    classnames: C names.
    text: (E, C, D) unit text features; E is 1 where there is no ensemble of prompts.
    logit_scale: s of the text head, softmax(s f t).
    auxiliary: of the fused head; None without one.
    primary: the run's primary classifier: text or fused.
    card: its origin, JSON values.
    tokens: (P, W) learned tokens of the image tower; None without any.
    reads_frozen: whether the auxiliary classifier reads features of the tower without the tokens.
    skipped: the files of the last `predict` that could not be read, with the reason.
    """

    backbone: Backbone
    classnames: list[str]
    text: Tensor
    logit_scale: float
    auxiliary: AuxiliaryClassifier | None
    primary: str
    card: dict[str, Any]
    tokens: Tensor | None = None
    reads_frozen: bool = False
    skipped: dict[Path, str] = field(default_factory=dict)

    @property
    def heads(self) -> list[str]:
        """The names of its heads."""
        return ["text"] if self.auxiliary is None else ["text", "fused"]

    @functools.cached_property
    def _tower(self) -> PromptedTower:
        tower = require_vision_transformer(self.backbone)
        return PromptedTower(tower, autocast=self.backbone.autocast)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """(N, 3, H, W) prepared pixels to (N, D) unit features for `classify`.

        Returns:
            Those of the image tower, with its learned tokens where there are some; and those without the tokens, where
            the auxiliary classifier reads these, else None.
        """
        if self.tokens is None:
            return self.backbone.encode_images(pixels), None
        frozen = self.backbone.encode_images(pixels) if self.reads_frozen else None
        return self._tower.encode(pixels, self.tokens), frozen

    @torch.no_grad()
    def classify(self, features: Tensor, frozen: Tensor | None = None) -> dict[str, Tensor]:
        """The (N, C) probabilities of every head, from what `encode` gives.

        Args:
            features: (N, D) unit image features of its tower. Others are normalised, with a warning; see `unit_rows`.
            frozen: (N, D) of the same images without the learned tokens, where `reads_frozen`.

        Raises:
            ValueError: `frozen` is missing.
        """
        if self.reads_frozen and frozen is None:
            raise ValueError("the auxiliary classifier of this bundle reads features without tokens; see Bundle.encode")
        features = unit_rows(features.to(self.text), "images")
        frozen = None if frozen is None else unit_rows(frozen.to(self.text), "images")
        return head_probs(features, self.text, self.auxiliary, logit_scale=self.logit_scale, frozen=frozen)

    def require_frozen_tower(self, purpose: str) -> None:
        """Raise a UserError where the image tower has learned tokens, for a use that reads features without them."""
        if self.tokens is not None:
            raise UserError(
                f"this classifier has learned tokens in its image tower (TRAINER.PROMPT.MODALITY), which {purpose} "
                "does not use; use air predict or air export"
            )

    def predict(
        self, images: Images, *, top: int = 1, batch_size: int = 64, head: str | None = None, progress: bool = False
    ) -> Iterator[Prediction]:
        """Classify image files, a batch at a time.

        A file that is not a whole image is left out with a warning (logged), and named in `skipped`.

        Args:
            images: one file, a folder (any nesting; hidden files are left out), or several files.
            top: how many classes `Prediction.top` names, at least 1; cut to C.
            batch_size: images a forward pass.
            head: text or fused; None is the primary.
            progress: show a bar on stderr, where that is a terminal.

        Returns:
            The predictions in the order of the files, one by one while they are made.

        Raises:
            UserError: there is no such head or file, or not one image could be read.

        Example:
            >>> for prediction in load_bundle("output/run/bundle").predict("photos"):
            ...     print(prediction.path, prediction.label, prediction.probability)
        """
        if head is not None and head not in self.heads:
            raise UserError(f"this bundle has no {head} head; it has: {', '.join(self.heads)}")
        for name, value in (("top", top), ("batch_size", batch_size)):
            if value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")
        paths = _files(images)
        self.skipped = {}
        return self._predictions(
            paths,
            top=min(top, len(self.classnames)),
            batch_size=batch_size,
            head=head or self.primary,
            alone=len(paths) == 1 and isinstance(images, str | os.PathLike),
            progress=progress,
        )

    def _predictions(
        self, paths: list[Path], *, top: int, batch_size: int, head: str, alone: bool, progress: bool
    ) -> Iterator[Prediction]:
        from tqdm import tqdm

        bar = tqdm(total=len(paths), desc="images", unit="image", disable=None if progress else True)
        with (
            bar,
            ThreadPoolExecutor(READERS) as pool,
            closing(
                one_ahead((batch, list(pool.map(self._read, batch))) for batch in batched(paths, batch_size))
            ) as read,
        ):
            for batch, results in read:  # the next batch is read while this one is encoded
                kept, pixels = [], []
                for path, result in zip(batch, results, strict=True):
                    if isinstance(result, Tensor):
                        kept.append(path)
                        pixels.append(result)
                        continue
                    if alone:
                        raise UnreadableImage(result)
                    self.skipped[path] = result
                    logger.warning("%s; it is left out", result)
                if pixels:
                    yield from self._classify_pixels(kept, torch.stack(pixels), top=top, head=head)
                bar.update(len(batch))
        if len(self.skipped) == len(paths):
            raise UserError(f"none of the {len(paths)} images could be read")

    def _read(self, path: Path) -> Tensor | str:
        """(3, H, W) pixels of a file as the backbone takes them, or why there are none."""
        try:
            return self.backbone.preprocess(load_rgb(path))
        except UnreadableImage as error:
            return " ".join(str(error).split())

    def _classify_pixels(self, paths: list[Path], pixels: Tensor, *, top: int, head: str) -> list[Prediction]:
        probs = self.classify(*self.encode(pixels))[head]
        # Not torch.topk, which has no rule for ties: a label must be the argmax that the trainer takes.
        values, index = probs.sort(dim=1, descending=True, stable=True)
        rows = zip(paths, values[:, :top].tolist(), index[:, :top].tolist(), strict=True)
        predictions = []
        for path, numbers, classes in rows:
            ranked = [(self.classnames[c], value) for c, value in zip(classes, numbers, strict=True)]
            predictions.append(Prediction(path, *ranked[0], ranked))
        return predictions


def head_probs(
    features: Tensor,
    text: Tensor,
    auxiliary: AuxiliaryClassifier | None,
    *,
    logit_scale: float,
    frozen: Tensor | None = None,
) -> dict[str, Tensor]:
    """The probabilities of every head.

    Args:
        features: (N, D) unit image features.
        text: (E, C, D) unit text features; an ensemble's probabilities are averaged (UPL, prompt ensemble).
        auxiliary: of the fused head p* = p + lambda p^, normalised (AiR, PLG).
        logit_scale: s of the text head, softmax(s f t).
        frozen: (N, D) features that the auxiliary classifier reads instead; None: it reads `features`.

    Returns:
        By the head's name (N, C), rows sum to 1.
    """
    probs = (logit_scale * cosines(features, text)).softmax(dim=2).mean(dim=0)  # (E, N, C) -> (N, C)
    if auxiliary is None:
        return {"text": probs}
    beside = auxiliary.probs(features if frozen is None else frozen)
    return {"text": probs, "fused": fuse(probs, beside, weight=auxiliary.fusion_weight)}


def _files(images: Images) -> list[Path]:
    """The image files of `Bundle.predict`'s argument."""
    if not isinstance(images, str | os.PathLike):
        paths = [Path(path) for path in images]
        if not paths:
            raise UserError("there are no images to classify")
        return paths
    path = Path(images)
    if path.is_dir():
        return find_images(path)
    if not path.exists():
        raise UserError(f"there is no image or folder {path}")
    return [path]
