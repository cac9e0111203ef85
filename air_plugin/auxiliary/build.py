"""From unlabelled images to the auxiliary classifier: LoRA, generated images, prototypes (AiR, sections 1 and 2)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from air_plugin.auxiliary.classifier import AuxiliaryClassifier, make_card
from air_plugin.auxiliary.refinement import Round, finalize, summarize
from air_plugin.clip.backbone import Backbone
from air_plugin.clip.features import extract_features
from air_plugin.config import AirSettings
from air_plugin.diffusion.generate import GenerationReport, generate, plan_jobs
from air_plugin.diffusion.lora import adapter_loaded, choose_captions, train_lora
from air_plugin.diffusion.pipeline import Generator, load_generator, require_size
from air_plugin.functional.prototypes import gather_prototypes, real_prototypes, select_prototypes
from air_plugin.utils.files import digest_files, write_atomically
from air_plugin.utils.provenance import Stages
from air_plugin.utils.store import Entry, Store, key_of
from air_plugin.utils.tensors import save_tensors


@dataclass(frozen=True)
class Auxiliary:
    """The auxiliary classifier with what it was made of.

    prototypes: (C, K, D) unit features of the kept images.
    images: C lists of M image files.
    kept: (C, K) which of them were kept, nearest to the class mean first.
    key: of its artifact; empty where it is none.
    generated: (C, M, D) unit features of all images.
    rounds: how it came about; empty where nobody looked at the unlabelled images.
    """

    classifier: AuxiliaryClassifier
    prototypes: Tensor
    images: list[list[Path]]
    kept: Tensor
    key: str
    generated: Tensor
    rounds: tuple[Round, ...] = ()


def build_auxiliary(
    backbone: Backbone,
    classnames: Sequence[str],
    paths: Sequence[str],
    *,
    features: Tensor,
    probs: Tensor,
    settings: AirSettings,
    store: Store,
    stages: Stages,
) -> Auxiliary:
    """Make the auxiliary classifier, taking from the store whatever is there.

    The first round's captions are the zero-shot labels. With AIR.ROUNDS above 1, a later round's are what the round
    before made of the unlabelled images; it ends early once these labels hardly change. Everything but the labels,
    which follow from it, lies in the store, so that an interrupted build goes on where it was.

    Args:
        backbone: whose features the classifier reads.
        classnames: C names.
        paths: N unlabelled images.
        features: (N, D) of them, unit rows.
        probs: (N, C) zero-shot probabilities, for the captions of LoRA and for EM.
        settings: validated.
        store: of the artifacts.
        stages: takes the times of generator, lora, generation, prototypes and refinement.
    """
    if settings.prototypes == "real":
        with stages.stage("prototypes"):
            auxiliary = auxiliary_of_real_images(
                backbone, classnames, paths, features=features, probs=probs, settings=settings
            )
        with stages.stage("refinement"):
            auxiliary, posterior_probs, figures = _finalized(auxiliary, features, probs, settings=settings, store=store)
        return replace(auxiliary, rounds=(summarize(posterior_probs, probs, figures),))
    with stages.stage("generator"):
        generator = load_generator(settings.generator, device=backbone.device, **settings.loading)
    captions, rounds = probs, list[Round]()
    for number in range(1, settings.rounds + 1):
        suffix = f", round {number}" if number > 1 else ""
        auxiliary = _generate_and_select(
            backbone,
            generator,
            classnames,
            paths,
            captions=captions,
            settings=settings,
            store=store,
            stages=stages,
            suffix=suffix,
        )
        with stages.stage(f"refinement{suffix}"):
            auxiliary, posterior_probs, figures = _finalized(auxiliary, features, probs, settings=settings, store=store)
        rounds.append(summarize(posterior_probs, captions, figures))
        if settings.rounds > 1:
            print(f"round {number}: {rounds[-1].changed:.1f} % of the labels changed")
        if rounds[-1].stable:
            break
        captions = posterior_probs
    return replace(auxiliary, rounds=tuple(rounds))


def _finalized(
    auxiliary: Auxiliary, features: Tensor, probs: Tensor, *, settings: AirSettings, store: Store
) -> tuple[Auxiliary, Tensor, dict[str, Any]]:
    classifier, posterior_probs, figures = finalize(
        auxiliary.classifier, auxiliary.generated, features=features, probs=probs, settings=settings, store=store
    )
    return replace(auxiliary, classifier=classifier), posterior_probs, figures


def _generate_and_select(
    backbone: Backbone,
    generator: Generator,
    classnames: Sequence[str],
    paths: Sequence[str],
    *,
    captions: Tensor,
    settings: AirSettings,
    store: Store,
    stages: Stages,
    suffix: str,
) -> Auxiliary:
    """One round up to the paper's classifier, from (N, C) probabilities that the captions of LoRA are made of."""
    adapter = None
    if settings.lora.enabled:
        with stages.stage(f"lora{suffix}") as stage:
            adapter = adapt(generator, classnames, paths, probs=captions, settings=settings, store=store)
            stage.cached = adapter.cached
    with stages.stage(f"generation{suffix}") as stage:
        report = generate_images(generator, adapter, classnames, settings=settings, store=store)
        stage.cached = report.generated == 0
    with stages.stage(f"prototypes{suffix}") as stage:
        auxiliary, stage.cached = make_prototypes(
            backbone, classnames, report.paths, settings=settings, store=store, adapter=adapter, generator=generator
        )
    return auxiliary


def auxiliary_of_real_images(
    backbone: Backbone,
    classnames: Sequence[str],
    paths: Sequence[str],
    *,
    features: Tensor,
    probs: Tensor,
    settings: AirSettings,
) -> Auxiliary:
    """The control of AiR without a generator: prototypes of real images, by their pseudo-label instead of their prompt.

    Args:
        backbone: whose features the classifier reads.
        classnames: C names.
        paths: N unlabelled images.
        features: (N, D) of them, unit rows.
        probs: (N, C) zero-shot probabilities.
        settings: M, K, lambda, form and scale.
    """
    chosen = real_prototypes(probs, settings.images_per_class)  # (C, M)
    candidates = features[chosen]
    kept = select_prototypes(candidates, min(settings.kept_per_class, chosen.shape[1]))
    prototypes = gather_prototypes(candidates, kept)
    card = make_card(backbone, classnames, settings=settings)
    classifier = _classifier(prototypes, backbone, settings=settings, card=card)
    images = [[Path(paths[i]) for i in row] for row in chosen.tolist()]
    return Auxiliary(classifier, prototypes, images, kept, key="", generated=candidates)


@dataclass(frozen=True)
class Adapter:
    """A trained LoRA adapter in the store."""

    folder: Path
    key: str
    cached: bool


def adapt(
    generator: Generator,
    classnames: Sequence[str],
    paths: Sequence[str],
    *,
    probs: Tensor,
    settings: AirSettings,
    store: Store,
) -> Adapter:
    """Train (or take) the adapter on the unlabelled images with pseudo-labels as captions."""
    require_size(generator.pipeline, settings.size)
    index, captions = choose_captions(probs, classnames, settings.prompt, settings.lora)
    folder, key, cached = train_lora(
        generator,
        [paths[i] for i in index],
        captions,
        settings=settings.lora,
        size=settings.size,
        seed=settings.seed,
        store=store,
    )
    return Adapter(folder, key, cached)


def generate_images(
    generator: Generator, adapter: Adapter | None, classnames: Sequence[str], *, settings: AirSettings, store: Store
) -> GenerationReport:
    """Draw (or take) the images, first image of every class first."""
    pipeline = generator.pipeline
    require_size(pipeline, settings.size)
    source = {"generator": generator.fingerprint, "lora": adapter.key if adapter else None, **generator.sampling}
    jobs = plan_jobs(
        classnames,
        template=settings.prompt,
        images_per_class=settings.images_per_class,
        seed=settings.seed,
        steps=settings.steps,
        guidance=settings.guidance,
        size=settings.size,
        weights=key_of(source),
    )
    # The folder is shared by every M and class list; the images' own keys say what is in it.
    common = {
        "recipe": 1,
        **source,
        "prompt": settings.prompt,
        "seed": settings.seed,
        "steps": settings.steps,
        "guidance": settings.guidance,
        "size": settings.size,
    }
    folder = adapter.folder if adapter else None
    with store.open("images", common) as entry, adapter_loaded(pipeline, folder, accelerator=generator.accelerator):
        return generate(pipeline, jobs, entry.path, batch_size=settings.batch)


def make_prototypes(
    backbone: Backbone,
    classnames: Sequence[str],
    images: Sequence[Path],
    *,
    settings: AirSettings,
    store: Store,
    adapter: Adapter | None,
    generator: Generator,
) -> tuple[Auxiliary, bool]:
    """Features of the images, the K most typical of each class, and the classifier.

    Args:
        backbone: gives the features.
        classnames: C names.
        images: M * C files, first image of every class first.
        settings: K, form and scale.
        store: of the artifacts.
        adapter: for the provenance.
        generator: for the provenance.

    Returns:
        The auxiliary classifier, and whether it was in the store.
    """
    by_class = [list(images[c :: len(classnames)]) for c in range(len(classnames))]
    ordered = [path for paths in by_class for path in paths]
    table, _ = extract_features(backbone, ordered, store=store, title="features of images")
    generated = table.plain.unflatten(0, (len(classnames), -1))  # (C, M, D)
    key = {
        "recipe": 1,
        "images": digest_files(ordered),
        "backbone": backbone.fingerprint,
        "classes": list(classnames),
        "kept": settings.kept_per_class,
        "generator": generator.fingerprint,
        "lora": adapter.key if adapter else None,
        "prompt": settings.prompt,
        "seed": settings.seed,
    }
    with store.open("prototypes", key) as entry:
        cached = entry.complete
        if not cached:
            _select(generated, entry, settings)
        saved = entry.tensors("prototypes.safetensors")
        card = make_card(
            backbone,
            classnames,
            settings=settings,
            generator=generator.fingerprint,
            adapter=adapter.key if adapter else None,
        )
        prototypes = saved["prototypes"].to(backbone.device)
        classifier = _classifier(prototypes, backbone, settings=settings, card=card)
        return Auxiliary(classifier, prototypes, by_class, saved["kept"], entry.key, generated), cached


def _select(features: Tensor, entry: Entry, settings: AirSettings) -> None:
    """(C, M, D) features to the artifact."""
    kept = select_prototypes(features, settings.kept_per_class)
    prototypes = gather_prototypes(features, kept)
    save_tensors(entry.path / "prototypes.safetensors", {"prototypes": prototypes, "kept": kept})
    write_atomically(entry.path / "provenance.json", json.dumps(entry.settings, indent=1).encode())
    entry.finish(["prototypes.safetensors", "provenance.json"])


def _classifier(
    prototypes: Tensor, backbone: Backbone, *, settings: AirSettings, card: dict[str, Any]
) -> AuxiliaryClassifier:
    """(C, K, D) kept features to the classifier."""
    scale = settings.scale * backbone.logit_scale if settings.form == "softmax" else None
    head = AuxiliaryClassifier.from_prototypes(prototypes, scale=scale)
    weight = 1.0 if settings.weight is None else settings.weight  # auto: until `finalize` has chosen it
    return replace(head, fusion_weight=weight, card=card)
