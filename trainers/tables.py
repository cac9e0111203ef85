"""Tables of images that a trainer reads: features of the frozen tower, or the prepared images themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dassl.config import get_cfg_default
from dassl.data.transforms import build_transform
from torch import Tensor

from air_plugin.clip.backbone import Backbone
from air_plugin.clip.features import FeatureTable, extract_features
from air_plugin.clip.prepared_images import ImageTable, prepare_images
from air_plugin.inference.bundle import preprocessing_of
from air_plugin.utils.errors import UserError
from air_plugin.utils.provenance import Stages
from air_plugin.utils.store import Store


@dataclass(frozen=True)
class Tables:
    """Makes tables, each as a stage of its own, or takes them from the store."""

    backbone: Backbone
    cfg: Any
    store: Store
    stages: Stages

    def features(self, paths: list[str], *, name: str, views: int = 1) -> FeatureTable:
        """Features of image files; views beyond the first follow INPUT.TRANSFORMS."""
        with self.stages.stage(name) as stage:
            table, stage.cached = extract_features(self.backbone, paths, **self.extraction(name, views=views))
        return table

    def images(self, paths: list[str], *, name: str, views: int = 1) -> ImageTable:
        """Prepared images; views beyond the first follow INPUT.TRANSFORMS."""
        with self.stages.stage(name) as stage:
            table, stage.cached = prepare_images(
                self.backbone,
                paths,
                store=self.store,
                views=views,
                augment=self._augmentation() if views > 1 else None,
                workers=self.cfg.DATALOADER.NUM_WORKERS,
                title=name,
            )
        return table

    def extraction(self, title: str, *, views: int) -> dict[str, Any]:
        """Arguments of `extract_features`."""
        return {
            "store": self.store,
            "views": views,
            "augment": self._augmentation() if views > 1 else None,
            "batch_size": self.cfg.DATALOADER.TEST.BATCH_SIZE,
            "workers": self.cfg.DATALOADER.NUM_WORKERS,
            "title": title,
        }

    def _augmentation(self) -> Callable[[Any], Tensor]:
        """INPUT.TRANSFORMS, with the size, mean and standard deviation of the backbone.

        Raises:
            UserError: the config names others, for which the backbone is not made.
        """
        prepared, size = preprocessing_of(self.backbone), self.backbone.image_size
        cfg, default = self.cfg.clone(), get_cfg_default()
        cfg.defrost()
        for key, value in (("SIZE", (size, size)), ("PIXEL_MEAN", prepared["mean"]), ("PIXEL_STD", prepared["std"])):
            if value is None:  # pixels are not normalised
                continue
            if list(cfg.INPUT[key]) not in (list(default.INPUT[key]), list(value)):
                raise UserError(f"INPUT.{key} is {cfg.INPUT[key]}; {self.backbone.name} takes {value}: leave it out")
            cfg.INPUT[key] = value
        return build_transform(cfg, is_train=True)
