"""The estimator."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from air_plugin import __version__
from air_plugin.auxiliary.build import Auxiliary, build_auxiliary
from air_plugin.clip.backbone import Backbone
from air_plugin.clip.loading import load_backbone
from air_plugin.clip.zero_shot import UnlabelledImages, look_at_unlabelled, template_features
from air_plugin.estimator.choice import AUTO, choose, settings_of, user_cache
from air_plugin.estimator.examples import Examples, collect, require_free
from air_plugin.estimator.inputs import InputError, Source, as_files, as_sources, clean_names, read_batches, unreadable
from air_plugin.estimator.prompts import train_prompts, views_of
from air_plugin.inference.bundle import MARK, load_bundle, save_bundle
from air_plugin.inference.predict import Bundle
from air_plugin.settings import AirSettings
from air_plugin.utils.checks import require_range, require_template
from air_plugin.utils.devices import pick_device
from air_plugin.utils.errors import UserError
from air_plugin.utils.files import require_writable
from air_plugin.utils.provenance import Stages
from air_plugin.utils.sections import LARGEST_SEED
from air_plugin.utils.seeding import randomness_kept
from air_plugin.utils.store import Store

log = logging.getLogger(__name__)

BATCH = 64  # images a forward pass in prediction
TEMPLATE = "a photo of a {}."


class AiRClassifier(ClassifierMixin, BaseEstimator):
    """A classifier of images, from unlabelled images and the names of their classes.

    A generator is adapted to the images, and its images make an auxiliary classifier, which EM refines on the
    unlabelled images and which is fused with CLIP's text classifier: the preset `plus` without prompt training
    (docs/method.md). No label is used. Follows scikit-learn's conventions; `clone`, `cross_val_score` and pipelines
    work. Finished stages lie in `cache`: an interrupted fit resumes, and a repeated one is quick.

    Args:
        class_names: the names of the C classes, at least two.
        template: a text with one {} for the name; say what the images are ("a satellite photo of {}.").
        backbone: auto, or a name that `air_plugin.load_backbone` takes. auto is ViT-B/32 on a GPU whose machine has the
            weights or reaches the hub, else `mini`, the embedded one.
        generator: auto, `mini`, a name on the hub or a folder in diffusers' layout. auto is Stable Diffusion 1.5 where
            auto of the backbone is ViT-B/32, else `mini`.
        prompts: train prompts on the fused pseudo-labels, too (air_plugin/estimator/prompts.py).
        head: that predicts: fused or text.
        settings: further settings by their key, for instance {"AIR.M": 60}; `air settings` lists them.
        random_state: seed of the adapter and the images.
        cache: folder of the store; None is ~/.cache/air_plugin. It may be removed at any time.
        device: cuda or cpu; None is a GPU where there is one.

    Attributes:
        classes_: (C,) the class names in their order, which is that of the columns of `predict_proba`.
        bundle_: the trained classifier with its backbone, an `air_plugin.Bundle`.
        auxiliary_: the auxiliary classifier with the generated images behind it; only after `fit`.
        examples_: typical generated images of each class, and the unlabelled images with the least sure label; None for
            a bundle of train.py.
        skipped_: the files that could not be read in `fit`, with the reason.

    Example:
        >>> classifier = AiRClassifier(["cat", "dog", "traffic light"]).fit("photos")
        >>> classifier.predict(["photos/1.jpg"])
        array(['dog'], dtype='<U13')
        >>> classifier.save("classifier")
    """

    classes_: np.ndarray
    bundle_: Bundle
    auxiliary_: Auxiliary
    examples_: Examples | None
    skipped_: dict[Path, str]
    HEADS: ClassVar[tuple[str, ...]] = ("fused", "text")

    def __init__(
        self,
        class_names: Any = None,
        *,
        template: str = TEMPLATE,
        backbone: str = AUTO,
        generator: str = AUTO,
        prompts: bool = False,
        head: str = "fused",
        settings: Mapping[str, Any] | None = None,
        random_state: int = 1,
        cache: str | Path | None = None,
        device: str | None = None,
    ) -> None:
        self.class_names = class_names
        self.template = template
        self.backbone = backbone
        self.generator = generator
        self.prompts = prompts
        self.head = head
        self.settings = settings
        self.random_state = random_state
        self.cache = cache
        self.device = device

    # Fitting

    def fit(self, images: Any, y: Any = None) -> AiRClassifier:
        """Make the classifier from unlabelled images.

        Args:
            images: a folder, files, PIL images or arrays; see `predict`. A file that cannot be read is left out with a
                warning, and named in `skipped_`.
            y: not used; it is there for scikit-learn, which passes labels to every `fit`.

        Raises:
            UserError: there are fewer than two images or classes, a name is too long for the text tower, or a parameter
                cannot be used.
        """
        names, sources = clean_names(self.class_names), as_sources(images)
        require_template("template", self.template)
        if isinstance(self.random_state, bool) or not isinstance(self.random_state, int | np.integer):
            raise InputError(f"random_state is {self.random_state!r}; it must be a whole number")
        require_range("random_state", self.random_state, 0, LARGEST_SEED)
        if self.head not in self.HEADS:
            raise InputError(f"head is {self.head!r}; it must be fused or text")
        cache = Path(self.cache) if self.cache is not None else user_cache()
        require_writable(cache, "cache", folder=True)
        device = pick_device(self.device or "")
        backbone_name, generator = choose(self.backbone, self.generator, device)
        cfg = settings_of(
            backbone_name,
            generator,
            seed=int(self.random_state),
            template=self.template,
            device=device,
            options=self.settings,
        )
        settings, store, stages = AirSettings.from_cfg(cfg), Store(cache), Stages()
        with stages.stage("backbone"):
            prompt = cfg.TRAINER.PROMPT
            backbone = load_backbone(backbone_name, precision=prompt.PREC, autocast=prompt.AUTOCAST, device=device)
        texts = template_features(backbone, names, self.template)  # names that are too long are told here
        with randomness_kept(), _threads(cfg.AIR.THREADS):
            with stages.stage("features"):
                files = as_files(sources, cache / "inputs")
                views = views_of(backbone, seed=settings.seed) if self.prompts else {}
                unlabelled, self.skipped_ = _look(backbone, files, texts, store=store, **views)
            self.auxiliary_ = build_auxiliary(
                backbone, names, unlabelled, settings=settings, store=store, stages=stages
            )
            text = texts[None]
            if self.prompts:
                with stages.stage("prompts"):
                    text = train_prompts(
                        backbone,
                        names,
                        unlabelled,
                        self.auxiliary_,
                        template=self.template,
                        seed=settings.seed,
                        store=store,
                    )
        self._finish(backbone, names, text, unlabelled)
        return self

    def _finish(self, backbone: Backbone, names: list[str], text: Tensor, unlabelled: UnlabelledImages) -> None:
        """Set what a fitted estimator has, from (E, C, D) text features."""
        card = {"transclip": False, "images": len(unlabelled.paths), "air_plugin": __version__}
        classifier = self.auxiliary_.classifier
        self.bundle_ = Bundle(backbone, names, text, backbone.logit_scale, classifier, self.head, card)
        self.classes_ = np.array(names)
        probs = self.bundle_.classify(unlabelled.features)[self.head]
        self.examples_ = collect(self.auxiliary_.prototypes, unlabelled.paths, probs, names)

    # Prediction

    def predict_proba(self, images: Any, *, head: str | None = None) -> np.ndarray:
        """(N, C) probabilities of the classes, rows sum to 1; columns in the order of `classes_`.

        Args:
            images: see `predict`.
            head: fused or text; None is the parameter of that name.
        """
        check_is_fitted(self)
        head = head or self.head
        if head not in self.bundle_.heads:
            raise InputError(f"this classifier has no {head} head; it has: {', '.join(self.bundle_.heads)}")
        parts = [self.bundle_.classify(features)[head] for features in self._features(as_sources(images))]
        return torch.cat(parts).cpu().numpy()

    def predict(self, images: Any) -> np.ndarray:
        """(N,) names of the most probable classes.

        Args:
            images: a folder (any nesting, files sorted by path), a file, or a sequence of files, PIL images and
                (H, W, 3) or (H, W) arrays; or one (N, H, W, 3) or (N, H, W) array. Arrays hold uint8, or floats in
                [0, 1].

        Raises:
            UserError: an image cannot be read: there would be no row for it.
        """
        probs = self.predict_proba(images)
        return self.classes_[probs.argmax(axis=1)]

    def score(self, images: Any, y: Any, sample_weight: Any = None) -> float:
        """The accuracy in [0, 1] on images with labels, which are class names or their places in `classes_`."""
        labels = np.asarray(y)
        check_is_fitted(self)
        if labels.dtype.kind in "iu":
            if labels.size and not 0 <= labels.min() <= labels.max() < len(self.classes_):
                raise InputError(f"labels lie in [{labels.min()}, {labels.max()}]; they must lie in [0, C) or be names")
            labels = self.classes_[labels]
        return super().score(images, labels, sample_weight)

    def _features(self, sources: list[Source]) -> Iterator[Tensor]:
        """(n, D) unit features of the images, batch by batch."""
        backbone = self.bundle_.backbone
        for batch in read_batches(sources, BATCH):
            yield backbone.encode_images(torch.stack([backbone.preprocess(image) for image in batch]))

    # Folders

    def save(self, folder: str | Path) -> None:
        """Write a folder that `load`, `air predict`, `air demo` and `air_plugin.load_bundle` read (a bundle).

        It holds the heads, the names and small copies of some images; the backbone is loaded by its name. A classifier
        that is in the folder already is replaced.
        """
        check_is_fitted(self)
        require_writable(Path(folder), "folder of the classifier", folder=True)
        require_free(Path(folder))
        (Path(folder) / MARK).unlink(missing_ok=True)  # it does not describe what is written now
        if self.examples_ is not None:
            self.examples_.save(Path(folder))
        bundle = self.bundle_
        parameters = {key: value for key, value in self.get_params().items() if key not in ("class_names", "cache")}
        parameters["random_state"] = int(self.random_state)  # JSON has no numbers of NumPy
        save_bundle(
            folder,
            backbone=bundle.backbone,
            classnames=bundle.classnames,
            text=bundle.text,
            auxiliary=bundle.auxiliary,
            primary=bundle.primary,
            card={**bundle.card, "estimator": parameters},
        )

    @classmethod
    def load(
        cls, folder: str | Path, *, backbone: Backbone | str | None = None, device: str | None = None
    ) -> AiRClassifier:
        """Read a folder that `save` wrote, or the bundle of a run of train.py.

        Args:
            folder: of the classifier.
            backbone: one that is loaded already, or where its weights lie now.
            device: cuda or cpu; None is a GPU where there is one.

        Raises:
            UserError: there is no whole classifier, or the backbone is another one than it was made for.
        """
        bundle = load_bundle(folder, device=pick_device(device or ""), backbone=backbone)
        bundle.require_frozen_tower("AiRClassifier")
        saved = bundle.card.get("estimator") or {"head": bundle.primary}
        accepted = cls._get_param_names()
        parameters = {key: value for key, value in saved.items() if key in accepted}
        estimator = cls(bundle.classnames, **{**parameters, "device": device})
        estimator.bundle_, estimator.classes_ = bundle, np.array(bundle.classnames)
        estimator.examples_, estimator.skipped_ = Examples.load(Path(folder)), {}
        return estimator

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "bundle_")

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = False
        tags.input_tags.two_d_array, tags.input_tags.three_d_array, tags.input_tags.string = False, True, True
        return tags


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let torch use so many threads for a while; 0 is its own number."""
    before = torch.get_num_threads()
    try:
        if count > 0:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


def _look(
    backbone: Backbone, files: list[str], texts: Tensor, *, store: Store, **views: Any
) -> tuple[UnlabelledImages, dict[Path, str]]:
    """The unlabelled images, without files that cannot be read, and these with the reason."""
    if len(files) < 2:
        raise InputError(f"there is {len(files)} image; a classifier is fitted on at least 2")
    try:
        return look_at_unlabelled(backbone, files, texts, store=store, **views)[0], {}
    except UserError:
        broken = unreadable(files)
        if not broken:
            raise
    for reason in broken.values():
        log.warning("%s; it is left out", reason)
    left = [file for file in files if Path(file) not in broken]
    if len(left) < 2:
        raise InputError(f"{len(left)} of the {len(files)} images can be read; a classifier is fitted on at least 2")
    return look_at_unlabelled(backbone, left, texts, store=store, **views)[0], broken
