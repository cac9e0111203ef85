"""The auxiliary classifier in trainers with several heads over cached features: the text head, and p* beside it."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor

from air_plugin.auxiliary.build import Auxiliary, build_auxiliary, followed
from air_plugin.auxiliary.supervision import Supervision
from air_plugin.clip.features import FeatureTable
from air_plugin.config import refuse_drop_in_keys
from air_plugin.functional.fusion import fuse
from air_plugin.functional.metrics import primary_metric
from air_plugin.mixin import AuxiliaryMixin
from air_plugin.utils.store import NotStored, Store
from air_plugin.utils.tensors import unit_rows
from trainers.evaluation import seen_classes
from trainers.labelled import LabelledImages, unlabelled_classes

log = logging.getLogger(f"air_plugin.{__name__}")  # `show_logs` shows what is below air_plugin
LAMBDAS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)


class FusedHeads(AuxiliaryMixin):
    """Adds the head `fused` to a PromptTrainer: p* = p + lambda p^ (AiR, PLG; air_plugin/functional/fusion.py).

    Where prompts are of words, the image tower is the frozen backbone, and the cached features serve both classifiers.
    Where the image tower has prompts, the cosine classifier follows it: the kept images are encoded by it before each
    test. A Gaussian classifier, EM and AIR.LAMBDA auto are made for features of the frozen tower, and read these of the
    same images. Pseudo-labels are always fused with features of the frozen tower. AIR.PRIMARY chooses the primary one.
    """

    primary: str
    is_left_out = False  # the auxiliary classifier, in an evaluation on other classes
    by_lambda: list[list[float]] | None = None

    def check_cfg(self, cfg: Any) -> None:
        super().check_cfg(cfg)
        refuse_drop_in_keys(cfg)
        self.primary = self.air.primary

    def check_host(self) -> None:
        """Nothing to try: the image tower is the frozen backbone."""

    def build_auxiliary(self) -> None:
        store = Store(self.store.root, read_only=self._evaluates)
        self.auxiliary = build_auxiliary(
            self.backbone,
            self.classnames,
            self.unlabelled,
            settings=self.air,
            store=store,
            stages=self.stages,
            supervision=self._supervision(),
        )

    def _supervision(self) -> Supervision | None:
        """The labelled images of the paradigms ssl and trzsl, as the frozen backbone sees them; None in ul."""
        labelled = LabelledImages.of(self.dm.dataset)
        if not labelled:
            return None
        views = 1 if self.is_visual else self.views
        table = self.tables.features(labelled.paths, name="features of labelled", views=views)
        classes = unlabelled_classes(self.dm.dataset)
        return Supervision(
            labelled.paths,
            unit_rows(table.plain, "images"),
            torch.tensor(labelled.labels, device=self.device),
            None if classes is None else torch.tensor(classes, device=self.device),
        )

    def train(self) -> None:
        _ = self.auxiliary  # its stages come before the one of prompt training
        super().train()

    def load_model(self, directory: str, epoch: int | None = None) -> None:
        """Load weights; to evaluate them, the auxiliary classifier comes from the store.

        For classes that the prompts were not trained with it is left out where the store has none.

        Raises:
            UserError: the store has no artifacts of the classes that the prompts were trained with.
        """
        super().load_model(directory, epoch)
        if not self._evaluates:
            return
        try:
            _ = self.auxiliary
        except NotStored as error:
            if not self.has_other_names:
                raise self._not_stored(error) from error
            self.primary, self.is_left_out = "text", True
            log.warning(
                "the auxiliary classifier is left out, and the text head is the primary classifier: %s; ZeroshotAiR "
                "with these classes and this AIR.CACHE makes what is needed",
                error,
            )
        else:
            log.info("the auxiliary classifier is of this run's %d classes, from the store", len(self.classnames))

    # Prediction

    @property
    def follows(self) -> bool:
        """Whether the auxiliary classifier is used in features of the image tower with its prompts."""
        return self.is_visual and self._any_tower

    @functools.cached_property
    def kept_images(self) -> Any:
        """The table of the C * K kept images, in the form that the prompts are trained on: class after class."""
        prototypes = self.auxiliary.prototypes
        if not self.is_visual:
            return FeatureTable(prototypes.features.flatten(0, 1)[:, None])
        paths = [str(path) for path in prototypes.kept_images]
        return self.training_table(paths, name="features of prototypes", views=1)

    @torch.no_grad()
    def refresh(self) -> Auxiliary:
        """The auxiliary classifier as it is in a test from now on: where it follows the prompts, encoded by them."""
        self._current = self.auxiliary
        if self.follows:
            features = self.model.encode(self.kept_images.plain)
            self._current = followed(self.auxiliary, features.unflatten(0, self.auxiliary.prototypes.kept.shape))
        elif self.is_visual:
            log.info("the auxiliary classifier reads features of the frozen image tower, which it is made for")
        return self._current

    def model_inference(self, input: Tensor) -> Tensor:
        return super(AuxiliaryMixin, self).model_inference(input)  # not the mixin's: `head_probs` has fused already

    def test(self, split: str | None = None) -> float | None:
        if not self.is_left_out:
            self.refresh()
        return super(AuxiliaryMixin, self).test(split)  # not the mixin's, which finds out whether the tower changed

    def features_of(self, paths: list[str], *, split: str) -> tuple[Tensor, Tensor | None]:
        features, _ = super().features_of(paths, split=split)
        if not self.is_visual or self.follows or self.is_left_out:
            return features, None
        return features, self.tables.features(paths, name=f"features of {split}").plain

    def head_probs(self, features: Tensor, frozen: Tensor | None = None) -> dict[str, Tensor]:
        heads = super().head_probs(features, frozen)
        if self.is_left_out:
            return heads
        classifier = (self._current or self.refresh()).classifier
        auxiliary = classifier.probs(features if self.follows or frozen is None else frozen)
        return {**heads, "fused": fuse(heads["text"], auxiliary, weight=classifier.fusion_weight)}

    def bundle_heads(self) -> dict[str, Any]:
        heads = super().bundle_heads()
        if self.is_left_out:
            return heads
        classifier = (self._current or self.refresh()).classifier
        return {**heads, "auxiliary": classifier, "reads_frozen": self.is_visual and not self.follows}

    def diagnose(self, heads: dict[str, Tensor], features: Tensor, labels: Tensor) -> None:
        """Score of the fused head for other lambdas; computed afterwards, nothing is chosen by it."""
        super().diagnose(heads, features, labels)
        if self.is_left_out or self.cfg.TRAINER.TRANSDUCTION.METHOD != "none":
            return  # there is no fused head, or a rival's, which is another one
        classifier = (self._current or self.refresh()).classifier
        auxiliary = classifier.probs(features)
        seen = seen_classes(self.dm.dataset)
        found = {
            weight: primary_metric(fuse(heads["text"], auxiliary, weight=weight).argmax(1), labels, seen=seen)
            for weight in sorted({*LAMBDAS, classifier.fusion_weight})
        }
        self.by_lambda = [[weight, value] for weight, value in found.items() if value is not None]

    def metrics(self) -> dict[str, Any]:
        return {**super().metrics(), "by_lambda": self.by_lambda, "auxiliary": self._rounds()}

    def _rounds(self) -> list[dict[str, Any]]:
        """Of each round of generation: its metrics, and the share of right labels, in percent, computed afterwards."""
        true = self.hidden_labels()
        return [
            {
                "changed": done.changed,
                **done.metrics,
                "accuracy": None if true is None else 100.0 * float((done.labels.cpu() == true).double().mean()),
            }
            for done in self.auxiliary.rounds
        ]
