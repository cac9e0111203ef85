"""From unlabelled images to the auxiliary classifier: the one path of trainers, mixin and `air` (AiR, sections 1-2)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from air_plugin.auxiliary.classifier import AuxiliaryClassifier
from air_plugin.auxiliary.refinement import Round, finalize, summarize
from air_plugin.auxiliary.stages import (
    Adapter,
    Prototypes,
    adapt,
    cosine_classifier,
    generate_images,
    make_prototypes,
    prototypes_of_real_images,
)
from air_plugin.auxiliary.supervision import Supervision
from air_plugin.clip.backbone import Backbone
from air_plugin.clip.zero_shot import UnlabelledImages
from air_plugin.config import AirSettings
from air_plugin.diffusion.generate import GenerationReport
from air_plugin.diffusion.pipeline import Generator, load_generator
from air_plugin.diffusion.text_limits import require_fit
from air_plugin.utils.checks import require, require_range
from air_plugin.utils.class_names import fill
from air_plugin.utils.provenance import Stages
from air_plugin.utils.store import Store

logger = logging.getLogger(__name__)

Until = Literal["lora", "images", "prototypes", "classifier"]


@dataclass(frozen=True)
class Auxiliary:
    """The finished auxiliary classifier, the images behind it, and the rounds that led to it (at least one)."""

    classifier: AuxiliaryClassifier
    prototypes: Prototypes
    rounds: tuple[Round, ...] = ()


def followed(auxiliary: Auxiliary, features: Tensor) -> Auxiliary:
    """The cosine classifier in the features of another image tower than the frozen backbone.

    Args:
        auxiliary: of the frozen backbone.
        features: (C, K, D) unit features of its kept images by the other tower.
    """
    former = auxiliary.classifier
    head = AuxiliaryClassifier.from_prototypes(features, scale=former.scale)
    card = {**former.card, "backbone_fingerprint": None}  # no other tower makes such features
    head = replace(head, fusion_weight=former.fusion_weight, card=card)
    return replace(auxiliary, classifier=head, prototypes=replace(auxiliary.prototypes, features=features))


@dataclass(frozen=True)
class Built:
    """What `build` has made up to its last stage; later stages are None.

    adapter: also None without LoRA.
    images: also None for real images.
    """

    adapter: Adapter | None = None
    images: GenerationReport | None = None
    prototypes: Prototypes | None = None
    auxiliary: Auxiliary | None = None


@dataclass(frozen=True)
class _Inputs:
    """What every stage needs; see `build`."""

    backbone: Backbone
    classnames: Sequence[str]
    unlabelled: UnlabelledImages
    settings: AirSettings
    store: Store
    stages: Stages
    supervision: Supervision | None


def require_stage(settings: AirSettings, until: Until) -> None:
    """Raise a UserError where the settings leave nothing to make at a stage."""
    if until in ("lora", "images"):
        what = "synthetic to adapt a generator or to generate images"
        require(settings.prototypes == "synthetic", "AIR.PROTOTYPES", settings.prototypes, what)
    if until == "lora":
        require(settings.lora.enabled, "AIR.LORA.ENABLED", settings.lora.enabled, "True to train an adapter")


def build(
    backbone: Backbone,
    classnames: Sequence[str],
    unlabelled: UnlabelledImages,
    *,
    settings: AirSettings,
    store: Store,
    stages: Stages,
    supervision: Supervision | None = None,
    until: Until = "classifier",
) -> Built:
    """Run the stages of the auxiliary classifier up to one of them; finished stages come from the store.

    The captions of the first round are the zero-shot labels. With AIR.ROUNDS above 1, the captions of a later round are
    the labels after the round before; the rounds end early once these labels hardly change. `until` ends the last
    round. Everything but the labels, which follow from it, lies in the store: an interrupted build resumes.

    Args:
        backbone: whose features the classifier reads.
        classnames: C names.
        unlabelled: N images, their features and zero-shot probabilities.
        settings: validated.
        store: of the artifacts.
        stages: takes the times of generator, lora, generation, prototypes and refinement.
        supervision: labelled images; None where there are none.
        until: the last stage.

    Raises:
        UserError: the settings leave nothing to make at that stage or do not fit the number of classes, the generator
            cannot be used, or a text is longer than its text tower.
    """
    require_stage(settings, until)
    require_range("AIR.FILTER_TOP", settings.filter_top, 0, len(classnames))
    inputs = _Inputs(backbone, classnames, unlabelled, settings, store, stages, supervision)
    if settings.prototypes == "real":
        return _build_of_real_images(inputs, until=until)
    with stages.stage("generator"):
        generator = load_generator(settings.generator, device=backbone.device, **settings.loading)
    require_fit(generator.pipeline, [*(fill(settings.prompt, name) for name in classnames), settings.lora.generic])
    captions, rounds, built = _allowed(unlabelled.probs, supervision), list[Round](), Built()
    for number in range(1, settings.rounds + 1):
        end = until if number == settings.rounds else "classifier"
        built = _build_round(inputs, generator, captions, rounds, until=end)
        if built.auxiliary is None:
            break
        rounds = list(built.auxiliary.rounds)
        if settings.rounds > 1:
            logger.info("round %d: %.1f %% of the labels changed", number, rounds[-1].changed)
        if rounds[-1].stable:
            break
        captions = rounds[-1].probs
    return built


def build_auxiliary(
    backbone: Backbone,
    classnames: Sequence[str],
    unlabelled: UnlabelledImages,
    *,
    settings: AirSettings,
    store: Store,
    stages: Stages,
    supervision: Supervision | None = None,
) -> Auxiliary:
    """Make the finished auxiliary classifier: `build` with all stages."""
    built = build(
        backbone, classnames, unlabelled, settings=settings, store=store, stages=stages, supervision=supervision
    )
    assert built.auxiliary is not None  # the last stage was run
    return built.auxiliary


def _build_round(
    inputs: _Inputs, generator: Generator, captions: Tensor, rounds: Sequence[Round], *, until: Until
) -> Built:
    """Run one more round, from the (N, C) probabilities that its captions are made of."""
    classnames, settings, store, stages = inputs.classnames, inputs.settings, inputs.store, inputs.stages
    suffix = f", round {len(rounds) + 1}" if rounds else ""
    adapter = None
    if settings.lora.enabled:
        with stages.stage(f"lora{suffix}") as stage:
            adapter = adapt(
                generator,
                classnames,
                inputs.unlabelled.paths,
                probs=captions,
                settings=settings,
                store=store,
                supervision=inputs.supervision,
            )
            stage.cached = adapter.cached
    if until == "lora":
        return Built(adapter)
    with stages.stage(f"generation{suffix}") as stage:
        images = generate_images(generator, adapter, classnames, settings=settings, store=store)
        stage.cached = images.generated == 0
    if until == "images":
        return Built(adapter, images)
    with stages.stage(f"prototypes{suffix}") as stage:
        prototypes = make_prototypes(
            inputs.backbone,
            classnames,
            images.paths,
            settings=settings,
            store=store,
            generator=generator,
            adapter=adapter,
        )
        stage.cached = prototypes.cached
    if until == "prototypes":
        return Built(adapter, images, prototypes)
    with stages.stage(f"refinement{suffix}"):
        classifier = cosine_classifier(
            prototypes, inputs.backbone, classnames, settings=settings, generator=generator, adapter=adapter
        )
        auxiliary = _finish(inputs, classifier, prototypes, captions, rounds)
    return Built(adapter, images, prototypes, auxiliary)


def _build_of_real_images(inputs: _Inputs, *, until: Until) -> Built:
    """The control without a generator: prototypes are unlabelled images, by their zero-shot label."""
    with inputs.stages.stage("prototypes"):
        prototypes = prototypes_of_real_images(
            inputs.unlabelled, settings=inputs.settings, supervision=inputs.supervision
        )
    if until == "prototypes":
        return Built(prototypes=prototypes)
    with inputs.stages.stage("refinement"):
        classifier = cosine_classifier(prototypes, inputs.backbone, inputs.classnames, settings=inputs.settings)
        captions = _allowed(inputs.unlabelled.probs, inputs.supervision)
        auxiliary = _finish(inputs, classifier, prototypes, captions, ())
    return Built(prototypes=prototypes, auxiliary=auxiliary)


def _allowed(probs: Tensor, supervision: Supervision | None) -> Tensor:
    return probs if supervision is None else supervision.allowed(probs)


def _finish(
    inputs: _Inputs, classifier: AuxiliaryClassifier, prototypes: Prototypes, captions: Tensor, rounds: Sequence[Round]
) -> Auxiliary:
    """Give the classifier its final form, and add the round to those before."""
    classifier, posterior_probs, metrics = finalize(
        classifier,
        prototypes.generated,
        usable=prototypes.usable,
        features=inputs.unlabelled.features,
        probs=inputs.unlabelled.probs,
        settings=inputs.settings,
        store=inputs.store,
        supervision=inputs.supervision,
    )
    return Auxiliary(classifier, prototypes, (*rounds, summarize(posterior_probs, captions, metrics)))
