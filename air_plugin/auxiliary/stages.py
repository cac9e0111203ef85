"""The stages of the auxiliary classifier: LoRA adapter, images, prototypes (AiR, sections 1 and 2)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from air_plugin.auxiliary.classifier import AuxiliaryClassifier, make_card
from air_plugin.auxiliary.supervision import Supervision
from air_plugin.clip.backbone import Backbone
from air_plugin.clip.features import extract_features
from air_plugin.clip.zero_shot import UnlabelledImages, template_features
from air_plugin.config import AirSettings
from air_plugin.diffusion.captions import captions_of_labels, choose_captions
from air_plugin.diffusion.compile import is_worth_compiling
from air_plugin.diffusion.generate import GenerationReport, count_missing, generate
from air_plugin.diffusion.jobs import plan_jobs
from air_plugin.diffusion.lora import adapter_loaded, train_lora
from air_plugin.diffusion.pipeline import Generator, require_size
from air_plugin.diffusion.spread import Recipe, generate_with
from air_plugin.engine import chosen, number_of_workers
from air_plugin.functional.prototypes import gather_prototypes, names_own_class, real_prototypes, select_prototypes
from air_plugin.utils.class_names import listed
from air_plugin.utils.digests import content_digest
from air_plugin.utils.files import to_json, write_atomically
from air_plugin.utils.store import Entry, NotStored, Store, key_of
from air_plugin.utils.tensors import save_tensors

log = logging.getLogger(__name__)

FILE = "prototypes.safetensors"


@dataclass(frozen=True)
class Adapter:
    """A trained LoRA adapter: its folder and key in the store, and whether it was there already."""

    folder: Path
    key: str
    cached: bool


@dataclass(frozen=True)
class Prototypes:
    """The images that stand for each class.

    features: (C, K, D) unit features of the kept images.
    images: C lists of M image files.
    kept: (C, K) which of them were kept, nearest to the class mean first.
    generated: (C, M, D) unit features of all images.
    usable: (C, M) bool, the images that AIR.FILTER_TOP has left; None without a filter.
    key: of the artifact in the store; empty where there is none (real images).
    cached: whether the artifact was in the store.
    """

    features: Tensor
    images: list[list[Path]]
    kept: Tensor
    generated: Tensor
    key: str = ""
    cached: bool = False
    usable: Tensor | None = None

    @property
    def kept_images(self) -> list[Path]:
        """C * K files: the kept images of the first class, then those of the second one, and so on."""
        return [self.images[c][k] for c, row in enumerate(self.kept.tolist()) for k in row]


def adapt(
    generator: Generator,
    classnames: Sequence[str],
    paths: Sequence[str],
    *,
    probs: Tensor,
    settings: AirSettings,
    store: Store,
    supervision: Supervision | None = None,
) -> Adapter:
    """Train the LoRA adapter, or take it from the store.

    Args:
        generator: is adapted; the pipeline itself stays as it is.
        classnames: C names.
        paths: N unlabelled images.
        probs: (N, C) class probabilities; the captions are made of them.
        settings: LORA, PROMPT, SIZE and the seed.
        store: of the adapter and its checkpoints.
        supervision: labelled images, which are all used, with their true classes in the captions.
    """
    require_size(generator.pipeline, settings.size)
    names = list(classnames)
    if supervision is not None and supervision.classes is not None:
        probs, names = probs[:, supervision.classes], [names[label] for label in supervision.classes.tolist()]
    index, captions = choose_captions(probs, names, settings.prompt, settings.lora)
    images = [paths[i] for i in index]
    if supervision is not None:
        images += supervision.paths
        captions += captions_of_labels(supervision.labels.tolist(), classnames, settings.prompt, settings.lora)
    folder, key, cached = train_lora(
        generator,
        images,
        captions,
        settings=settings.lora,
        size=settings.size,
        seed=settings.seed,
        store=store,
        graphs=settings.cuda_graphs,
    )
    return Adapter(folder, key, cached)


def generate_images(
    generator: Generator, adapter: Adapter | None, classnames: Sequence[str], *, settings: AirSettings, store: Store
) -> GenerationReport:
    """Generate the M images of each class that are not in the store.

    Returns:
        The M * C files, first image of every class first, and how many were generated now.

    Raises:
        NotStored: images are missing in a store that is only read.
    """
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
    # The folder is shared by every M and class list; the key of each image covers the rest.
    common = {
        "recipe": 1,
        **source,
        "prompt": settings.prompt,
        "seed": settings.seed,
        "steps": settings.steps,
        "guidance": settings.guidance,
        "size": settings.size,
    }
    adapter_folder = adapter.folder if adapter else None
    with store.open("images", common, grows=True) as entry:
        folder = entry.path  # other processes may fill it at the same time: its lock is not kept
        missing = count_missing(jobs, folder) if store.read_only else 0
    if missing:
        raise NotStored(f"{store.root} lacks {missing:,} of the {len(jobs):,} images of these classes")
    engine = chosen()
    workers = number_of_workers(engine)
    if workers == 1 and engine.name == "local":
        with adapter_loaded(pipeline, adapter_folder, accelerator=generator.accelerator):
            return generate(pipeline, jobs, folder, batch_size=settings.batch, compile_unet=settings.compile)
    gpus = 1.0 if engine.gpus() or pipeline.device.type == "cuda" else 0.0
    recipe = Recipe(
        name=settings.generator,
        loading=settings.loading,
        fingerprint=generator.fingerprint,
        adapter=adapter_folder,
        prompts=tuple(dict.fromkeys(job.prompt for job in jobs)),
        guidance=settings.guidance,
        folder=folder.absolute(),
        size=settings.batch,
        compile_unet=is_worth_compiling(settings.compile, pipeline.device, len(jobs) // workers),
    )
    return generate_with(engine, recipe, jobs, workers=workers, gpus=gpus)


def make_prototypes(
    backbone: Backbone,
    classnames: Sequence[str],
    images: Sequence[Path],
    *,
    settings: AirSettings,
    store: Store,
    generator: Generator,
    adapter: Adapter | None,
) -> Prototypes:
    """Select the K most typical images of each class (AiR, ACG).

    Args:
        backbone: gives the features.
        classnames: C names.
        images: M * C files, first image of every class first.
        settings: K, FILTER_TOP, and what the artifact's key covers.
        store: of the artifacts.
        generator: that made the images.
        adapter: that it was adapted with.
    """
    by_class = [list(images[c :: len(classnames)]) for c in range(len(classnames))]
    ordered = [path for paths in by_class for path in paths]
    table, _ = extract_features(backbone, ordered, store=store, title="features of images")
    generated = table.plain.unflatten(0, (len(classnames), -1))  # (C, M, D)
    key = {
        "recipe": 1,
        "images": content_digest(ordered, cache=store.digests),
        "backbone": backbone.fingerprint,
        **backbone.computation,
        "classes": list(classnames),
        "kept": settings.kept_per_class,
        "generator": generator.fingerprint,
        "lora": adapter.key if adapter else None,
        "prompt": settings.prompt,
        "seed": settings.seed,
    }
    usable = None
    if settings.filter_top:
        key["filter"] = settings.filter_top
        text = template_features(backbone, classnames, settings.prompt)
        usable = names_own_class(generated, text, top=settings.filter_top)
        _report_filter(usable, classnames, settings.kept_per_class)
    with store.open("prototypes", key) as entry:
        cached = entry.complete
        if not cached:
            _select(generated, entry, settings.kept_per_class, usable)
        saved = entry.tensors(FILE)
    features = saved["prototypes"].to(backbone.device)
    return Prototypes(features, by_class, saved["kept"], generated, entry.key, cached, usable)


def _report_filter(usable: Tensor, classnames: Sequence[str], count: int) -> None:
    """Log how many images the filter drops; warn of classes of which fewer remain than are kept."""
    log.info("filter: %d of %d images show another class and are dropped", int((~usable).sum()), usable.numel())
    few = [name for name, left in zip(classnames, usable.sum(dim=1).tolist(), strict=True) if left < count]
    if few:
        log.warning("AIR.FILTER_TOP leaves fewer than AIR.K images of %d classes: %s", len(few), listed(few))


def _select(generated: Tensor, entry: Entry, count: int, usable: Tensor | None) -> None:
    """Fill an artifact with the prototypes among (C, M, D) features."""
    kept = select_prototypes(generated, count, usable=usable)
    save_tensors(entry.path / FILE, {"prototypes": gather_prototypes(generated, kept), "kept": kept})
    write_atomically(entry.path / "provenance.json", to_json(entry.settings, indent=1).encode())
    entry.finish([FILE, "provenance.json"])


def prototypes_of_real_images(
    unlabelled: UnlabelledImages, *, settings: AirSettings, supervision: Supervision | None = None
) -> Prototypes:
    """The control without a generator: the M most confident images of each zero-shot class, labelled ones first."""
    paths, features, probs = unlabelled.paths, unlabelled.features, unlabelled.probs
    if supervision is not None:
        paths, (features, probs) = [*paths, *supervision.paths], supervision.joined(features, probs)
    chosen = real_prototypes(probs, settings.images_per_class)  # (C, M)
    candidates = features[chosen]
    kept = select_prototypes(candidates, min(settings.kept_per_class, chosen.shape[1]))
    images = [[Path(paths[i]) for i in row] for row in chosen.tolist()]
    return Prototypes(gather_prototypes(candidates, kept), images, kept, candidates)


def cosine_classifier(
    prototypes: Prototypes,
    backbone: Backbone,
    classnames: Sequence[str],
    *,
    settings: AirSettings,
    generator: Generator | None = None,
    adapter: Adapter | None = None,
) -> AuxiliaryClassifier:
    """The paper's classifier: p^ from the mean cosine to a class's prototypes (AiR, ACG).

    Args:
        prototypes: of C classes.
        backbone: that made their features.
        classnames: C names.
        settings: AUX_FORM, AUX_SCALE and LAMBDA.
        generator: that made the images, for the card; None for real images.
        adapter: for the card.
    """
    scale = settings.scale * backbone.logit_scale if settings.form == "softmax" else None
    weight = 1.0 if settings.weight is None else settings.weight  # auto: until `finalize` has chosen it
    card = make_card(
        backbone,
        classnames,
        settings=settings,
        generator=generator.fingerprint if generator else None,
        adapter=adapter.key if adapter else None,
    )
    head = AuxiliaryClassifier.from_prototypes(prototypes.features, scale=scale)
    return replace(head, fusion_weight=weight, card=card)
