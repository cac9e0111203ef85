"""`finalize` for more unlabelled images than memory holds: Gaussian head, EM and lambda from sums over shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from air_plugin.auxiliary.classifier import AuxiliaryClassifier
from air_plugin.auxiliary.refinement import fit, metrics_of, stored_result
from air_plugin.clip.images_on_disk import ImagesOnDisk
from air_plugin.config import AirSettings
from air_plugin.functional.calibration import SAMPLE, match_confidence
from air_plugin.functional.em import LIKELIHOOD_WEIGHT, PriorStrength, Refined, refine_shards
from air_plugin.functional.fusion import fuse, product_consensus, relative_weight
from air_plugin.functional.gaussian import Gaussians
from air_plugin.functional.shards import SHARD, EStep, Keep, ShardMap, add_up, cut, in_this_process
from air_plugin.utils.store import Store
from air_plugin.utils.tensors import load_tensors, save_tensors, tensor_digest

CHUNK = 4096  # images at a time


@dataclass(frozen=True)
class Labels:
    """What all evidence says about N images: a row of N * C probabilities would be too much.

    classes: (N,) int32, the top-1 classes.
    confidence: (N,) float32, their probabilities.
    """

    classes: np.ndarray
    confidence: np.ndarray


def finalize_shards(
    classifier: AuxiliaryClassifier,
    generated: Tensor,
    *,
    images: ImagesOnDisk,
    settings: AirSettings,
    store: Store,
    map_shards: ShardMap = in_this_process,
    usable: Tensor | None = None,
) -> tuple[AuxiliaryClassifier, Labels, dict[str, Any]]:
    """`finalize` on the CPU, for images on disk: nothing of the size N * D or N * C is held in memory.

    The results are those of `finalize`, except for rounding. An interrupted EM goes on after the last E step that was
    finished; the store keeps the sums of each, 8 (C D + C) bytes, until the end.

    Args:
        classifier: in the cosine form.
        generated: (C, M, D) unit features of all its images.
        images: N unlabelled images.
        settings: AUXILIARY, REFINE, PRIOR, PRIOR_STRENGTH and LAMBDA.
        store: keeps the result of EM.
        map_shards: computes the shards; in this process by default.
        usable: (C, M) bool, which of the generated images count; None: all.

    Returns:
        The classifier, the labels of the unlabelled images by all evidence, and metrics.
    """
    classifier, generated = classifier.to("cpu"), generated.cpu()
    usable = None if usable is None else usable.cpu()
    metrics: dict[str, Any] = {}
    head = None
    over = _Over(images, map_shards)
    if settings.auxiliary == "gaussian":
        model = None if settings.prior == "none" else fit(generated, usable)
        if settings.refine == "em":
            refined = refine_on_disk(
                model, images, prior_strength=settings.prior_strength, store=store, map_shards=map_shards
            )
            model, metrics = refined.model, metrics_of(refined)
            head = model.head()
        assert model is not None  # AirSettings: PRIOR none needs EM
        weight, bias = model.bias_corrected_head()
        classifier = replace(classifier, weight=weight.float(), bias=bias.float())
    if settings.auxiliary == "gaussian" or settings.weight is None:
        sample = images.every(-(-len(images) // SAMPLE))
        classifier = replace(classifier, scale=match_confidence(classifier.scores(sample), over.mean_confidence()))
    if settings.weight is None:
        classifier = replace(classifier, fusion_weight=over.fusion_weight(classifier, head))
    metrics |= {"lambda": round(classifier.fusion_weight, 4), "scale": classifier.scale}
    return classifier, over.labels(classifier, head), metrics


def refine_on_disk(
    prior: Gaussians | None,
    images: ImagesOnDisk,
    *,
    prior_strength: PriorStrength = "moments",
    store: Store,
    map_shards: ShardMap = in_this_process,
) -> Refined:
    """`refine_shards`, or its result from the store, which keeps the sums of finished steps of an interrupted one."""
    parts = {} if prior is None else prior.tensors()
    settings = {"inputs": tensor_digest(parts), "images": images.fingerprint(), "shard": SHARD}

    def make(folder: Path) -> Refined:
        return refine_shards(
            images,
            prior=prior,
            prior_strength=prior_strength,
            chunk=CHUNK,
            shard=SHARD,
            map_shards=map_shards,
            keep=_kept_in(folder),
        )

    return stored_result(settings, make, prior_strength=prior_strength, store=store)


def _kept_in(folder: Path) -> Keep:
    """Sums are kept in a folder, a file for each name."""

    def keep(name: str, sums: Callable[[], list[Tensor]]) -> list[Tensor]:
        path = folder / f"{name}.safetensors"
        found = load_tensors(path)
        if found is None:
            found = {str(number): tensor for number, tensor in enumerate(sums())}
            save_tensors(path, found)
        return [found[str(number)] for number in range(len(found))]

    return keep


@dataclass(frozen=True)
class _Over:
    """What is computed over all images, shard by shard."""

    images: ImagesOnDisk
    map_shards: ShardMap

    def mean_confidence(self) -> float:
        """See `calibration.mean_confidence`, of the text probabilities."""
        setup = partial(_Evidence, self.images)
        total = add_up(setup, _Evidence.confidence, cut(len(self.images), SHARD), map_shards=self.map_shards)
        return float(total[0]) / len(self.images)

    def fusion_weight(self, classifier: AuxiliaryClassifier, head: tuple[Tensor, Tensor] | None) -> float:
        """See `fusion.fusion_weight`; the consensus is EM's where there is a head."""
        setup = _Evidence.of(self.images, classifier, head)
        (votes,) = add_up(setup, _Evidence.votes, cut(len(self.images), SHARD), map_shards=self.map_shards)
        text, auxiliary = (votes / len(self.images)).tolist()
        return relative_weight(auxiliary, to=text)

    def labels(self, classifier: AuxiliaryClassifier, head: tuple[Tensor, Tensor] | None) -> Labels:
        setup, shards = _Evidence.of(self.images, classifier, head), cut(len(self.images), SHARD)
        labels = Labels(np.empty(len(self.images), np.int32), np.empty(len(self.images), np.float32))
        for index, (classes, confidence) in self.map_shards(setup, _Evidence.labels, shards):
            part = slice(shards[index].start, shards[index].stop)
            labels.classes[part], labels.confidence[part] = classes, confidence
        return labels


@dataclass(frozen=True)
class _Evidence:
    """The state of a worker: the images and both classifiers.

    weight, bias, scale, fusion_weight: of the auxiliary classifier, as arrays.
    head: of EM's classes, for their posterior; None where there was no EM.
    """

    images: ImagesOnDisk
    weight: Any = None
    bias: Any = None
    scale: float | None = None
    fusion_weight: float = 1.0
    head: tuple[Any, Any] | None = None

    @classmethod
    def of(
        cls, images: ImagesOnDisk, classifier: AuxiliaryClassifier, head: tuple[Tensor, Tensor] | None
    ) -> Callable[[], _Evidence]:
        """What makes the state in a worker."""
        numbers = None if head is None else (head[0].numpy(), head[1].numpy())
        weight, bias = classifier.weight.numpy(), classifier.bias.numpy()
        return partial(cls, images, weight, bias, classifier.scale, classifier.fusion_weight, numbers)

    def parts(self, shard: range) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Chunk by chunk: (n, C) text and auxiliary probabilities, and EM's posterior."""
        classifier = AuxiliaryClassifier(torch.tensor(self.weight), torch.tensor(self.bias), self.scale)
        step = EStep(self.images, self.head, LIKELIHOOD_WEIGHT, CHUNK)
        for part, features, z in step.parts(shard):
            probs = self.images.text_probs(part.start, part.stop)
            yield probs, classifier.probs(features.float()), None if self.head is None else z.to(probs)

    def confidence(self, shard: range) -> list[Any]:
        """The sum of the largest text probabilities."""
        total = 0.0
        for start in range(shard.start, shard.stop, CHUNK):
            probs = self.images.text_probs(start, min(start + CHUNK, shard.stop))
            total += float(probs.max(dim=1).values.double().sum())
        return [np.array(total)]

    def votes(self, shard: range) -> list[Any]:
        """The sums of the consensus' probabilities of the top-1 classes: of the text, and of the auxiliary head."""
        total = torch.zeros(2, dtype=torch.float64)
        for probs, aux_probs, z in self.parts(shard):
            consensus = product_consensus(probs, aux_probs) if z is None else z
            for number, judged in enumerate((probs, aux_probs)):
                total[number] += consensus.gather(1, judged.argmax(dim=1, keepdim=True)).double().sum()
        return [total.numpy()]

    def labels(self, shard: range) -> tuple[Any, Any]:
        """The top-1 classes by all evidence, and their probabilities."""
        found = []
        for probs, aux_probs, z in self.parts(shard):
            all_evidence = fuse(probs, aux_probs, weight=self.fusion_weight) if z is None else z
            found.append(all_evidence.max(dim=1))
        classes = torch.cat([part.indices for part in found]).int()
        return classes.numpy(), torch.cat([part.values for part in found]).float().numpy()
