"""How the unlabelled images refine the auxiliary classifier: Gaussian head, EM, lambda, rounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from air_plugin.auxiliary.classifier import AuxiliaryClassifier
from air_plugin.auxiliary.supervision import Supervision
from air_plugin.config import AirSettings
from air_plugin.functional.calibration import match_confidence, mean_confidence
from air_plugin.functional.em import LIKELIHOOD_WEIGHT, PriorStrength, Refined, posterior, refine
from air_plugin.functional.fusion import fuse, fusion_weight
from air_plugin.functional.gaussian import Gaussians, fit_gaussians
from air_plugin.utils.store import Store
from air_plugin.utils.tensors import save_tensors, tensor_digest

STABLE = 0.02  # share of changed labels below which another round is not worth its time
FILE = "refined.safetensors"


@dataclass(frozen=True)
class Round:
    """One round of captions, generation and labelling.

    probs: (N, C) class probabilities of the unlabelled images after the round.
    changed: share of their labels, in percent, that differ from those that the captions were made of.
    metrics: what was chosen without labels, JSON values.
    """

    probs: Tensor
    changed: float
    metrics: dict[str, Any]

    @property
    def labels(self) -> Tensor:
        """(N,) classes of the unlabelled images."""
        return self.probs.argmax(dim=1)

    @property
    def stable(self) -> bool:
        """Whether the captions of another round would hardly differ."""
        return self.changed < 100 * STABLE


def finalize(
    classifier: AuxiliaryClassifier,
    generated: Tensor,
    *,
    features: Tensor,
    probs: Tensor,
    settings: AirSettings,
    store: Store,
    supervision: Supervision | None = None,
    usable: Tensor | None = None,
) -> tuple[AuxiliaryClassifier, Tensor, dict[str, Any]]:
    """Give the auxiliary classifier the form that the settings ask for.

    Args:
        classifier: in the cosine form.
        generated: (C, M, D) unit features of all its images.
        features: (N, D) of the unlabelled images, unit rows.
        probs: (N, C) their zero-shot probabilities.
        settings: AUXILIARY, REFINE, PRIOR, PRIOR_STRENGTH and LAMBDA.
        store: keeps the result of EM.
        supervision: labelled images, which EM uses, too; nothing else is chosen by them.
        usable: (C, M) bool, which of the images count; None: all.

    Returns:
        The classifier, the (N, C) class probabilities of the unlabelled images by all evidence, and metrics.
    """
    consensus = None
    metrics: dict[str, Any] = {}
    allowed = probs if supervision is None else supervision.allowed(probs)
    if settings.auxiliary == "gaussian":
        model = None if settings.prior == "none" else fit(generated, usable)
        if settings.refine == "em":
            images = (features, probs) if supervision is None else supervision.joined(features, probs)
            refined = refine_cached(model, *images, prior_strength=settings.prior_strength, store=store)
            model, metrics = refined.model, metrics_of(refined)
            consensus = posterior(model, features, allowed)
        assert model is not None  # AirSettings: PRIOR none needs EM
        weight, bias = model.bias_corrected_head()
        classifier = replace(classifier, weight=weight.float(), bias=bias.float())
    if settings.auxiliary == "gaussian" or settings.weight is None:
        scale = match_confidence(classifier.scores(features), mean_confidence(probs))
        classifier = replace(classifier, scale=scale)
    aux_probs = classifier.probs(features)
    if settings.weight is None:
        classifier = replace(classifier, fusion_weight=fusion_weight(probs, aux_probs, consensus=consensus))
    posterior_probs = consensus
    if posterior_probs is None:
        posterior_probs = fuse(probs, aux_probs, weight=classifier.fusion_weight)
        posterior_probs = posterior_probs if supervision is None else supervision.allowed(posterior_probs)
    metrics |= {"lambda": round(classifier.fusion_weight, 4), "scale": classifier.scale}
    return classifier, posterior_probs, metrics


def summarize(posterior_probs: Tensor, captions: Tensor, metrics: dict[str, Any]) -> Round:
    """A finished round, from (N, C) probabilities after it and those that its captions were made of."""
    changed = (posterior_probs.argmax(dim=1) != captions.argmax(dim=1)).double().mean()
    return Round(posterior_probs, round(100.0 * float(changed), 2), metrics)


def metrics_of(refined: Refined) -> dict[str, Any]:
    """What EM has estimated, JSON values."""
    return {
        "prior_strength": round(refined.prior_strength, 2),
        "iterations": refined.iterations,
        "converged": refined.converged,
        "soft_counts": [round(count, 1) for count in refined.soft_counts.tolist()],
    }


def fit(generated: Tensor, usable: Tensor | None = None) -> Gaussians:
    """The classes of (C, M, D) features of generated images; of a filter's (C, M) usable ones where it is given."""
    classes, images, _ = generated.shape
    labels = torch.arange(classes, device=generated.device).repeat_interleave(images)
    chosen = slice(None) if usable is None else usable.flatten()
    return fit_gaussians(generated.flatten(0, 1)[chosen], labels[chosen], classes=classes)


def refine_cached(
    prior: Gaussians | None, features: Tensor, probs: Tensor, *, prior_strength: PriorStrength = "moments", store: Store
) -> Refined:
    """`refine`, or its result from the store: with many images only generation takes longer."""
    inputs = {"features": features, "probs": probs}
    if prior is not None:
        inputs |= prior.tensors()

    def make(_: Path) -> Refined:
        return refine(features, probs, prior=prior, prior_strength=prior_strength)

    settings = {"inputs": tensor_digest(inputs)}
    return stored_result(settings, make, prior_strength=prior_strength, store=store, device=features.device)


def stored_result(
    settings: dict[str, Any],
    make: Callable[[Path], Refined],
    *,
    prior_strength: PriorStrength,
    store: Store,
    device: torch.device | str = "cpu",
) -> Refined:
    """The result of EM that the store has under some settings, or that `make` makes.

    Args:
        settings: what decides the result beside `prior_strength` and the constants.
        make: is called with the folder of the artifact; files that it leaves there are removed at the end.
        store: keeps the result.
        device: of the result.
    """
    settings = {"recipe": 2, "weight": LIKELIHOOD_WEIGHT, **settings}
    if prior_strength != "moments":  # keys are as before there was a choice
        settings["prior_strength"] = prior_strength
    with store.open("refined", settings) as entry:
        if not entry.complete:
            found = make(entry.path)
            numbers = torch.tensor([found.prior_strength, found.iterations, found.converged], dtype=torch.float64)
            tensors = {**found.model.tensors(), "soft_counts": found.soft_counts, "numbers": numbers}
            save_tensors(entry.path / FILE, tensors)
            entry.finish([FILE])
        saved = {name: tensor.to(device) for name, tensor in entry.tensors(FILE).items()}
        if "mass" in saved:  # the former name of the soft counts
            saved["soft_counts"] = saved.pop("mass")
    n0, iterations, converged = saved["numbers"].tolist()
    model = Gaussians(saved["mean"], saved["covariance"], saved["counts"])
    return Refined(model, saved["soft_counts"], n0, int(iterations), bool(converged))
