"""What becomes of the generated images once the unlabelled ones are looked at: Gaussian head, EM, lambda, rounds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from air_plugin.auxiliary.classifier import AuxiliaryClassifier
from air_plugin.config import AirSettings
from air_plugin.functional.calibration import match_confidence, mean_confidence
from air_plugin.functional.fusion import fuse, fusion_weight
from air_plugin.functional.gaussian import LIKELIHOOD_WEIGHT, Gaussians, Refined, fit_gaussians, posterior, refine
from air_plugin.utils.store import Store
from air_plugin.utils.tensors import save_tensors, tensor_digest

STABLE = 0.02  # share of changed labels below which another round is not worth its price
FILE = "refined.safetensors"


@dataclass(frozen=True)
class Round:
    """One round of captions, drawing and labelling.

    labels: (N,) classes of the unlabelled images as the finished round sees them.
    changed: share of them, in percent, that the captions of the round had otherwise.
    figures: what was chosen without labels, JSON values.
    """

    labels: Tensor
    changed: float
    figures: dict[str, Any]

    @property
    def stable(self) -> bool:
        """Whether another round would be of the same captions, near enough."""
        return self.changed < 100 * STABLE


def finalize(
    classifier: AuxiliaryClassifier,
    generated: Tensor,
    *,
    features: Tensor,
    probs: Tensor,
    settings: AirSettings,
    store: Store,
) -> tuple[AuxiliaryClassifier, Tensor, dict[str, Any]]:
    """Give the auxiliary classifier the form that the settings ask for.

    Args:
        classifier: in the cosine form.
        generated: (C, M, D) unit features of all its images.
        features: (N, D) of the unlabelled images, unit rows.
        probs: (N, C) their zero-shot probabilities.
        settings: AUXILIARY, REFINE, PRIOR and LAMBDA.
        store: keeps what EM came to.

    Returns:
        The classifier, the (N, C) class probabilities of the unlabelled images by all that is known, and figures.
    """
    consensus = None
    figures: dict[str, Any] = {}
    if settings.auxiliary == "gaussian":
        model = None if settings.prior == "none" else _fit(generated)
        if settings.refine == "em":
            found = refined(model, features, probs, store=store)
            consensus = posterior(found.model, features, probs)
            weight, bias = found.model.bias_corrected_head()
            figures |= {
                "prior_strength": round(found.prior_strength, 2),
                "iterations": found.iterations,
                "converged": found.converged,
                "soft_counts": [round(soft_counts, 1) for soft_counts in found.soft_counts.tolist()],
            }
        else:
            assert model is not None  # AirSettings: PRIOR none needs EM
            weight, bias = model.bias_corrected_head()
        classifier = replace(classifier, weight=weight.float(), bias=bias.float())
    if settings.auxiliary == "gaussian" or settings.weight is None:
        scale = match_confidence(classifier.scores(features), mean_confidence(probs))
        classifier = replace(classifier, scale=scale)
    aux_probs = classifier.probs(features)
    if settings.weight is None:
        classifier = replace(classifier, fusion_weight=fusion_weight(probs, aux_probs, consensus=consensus))
    posterior_probs = fuse(probs, aux_probs, weight=classifier.fusion_weight) if consensus is None else consensus
    figures |= {"lambda": round(classifier.fusion_weight, 4), "scale": classifier.scale}
    return classifier, posterior_probs, figures


def summarize(posterior_probs: Tensor, captions: Tensor, figures: dict[str, Any]) -> Round:
    """A finished round, from (N, C) probabilities after it and those that its captions were made of."""
    labels = posterior_probs.argmax(dim=1)
    changed = 100.0 * float((labels != captions.argmax(dim=1)).double().mean())
    return Round(labels, round(changed, 2), figures)


def _fit(generated: Tensor) -> Gaussians:
    """The classes of (C, M, D) features."""
    classes, images, _ = generated.shape
    labels = torch.arange(classes, device=generated.device).repeat_interleave(images)
    return fit_gaussians(generated.flatten(0, 1), labels, classes=classes)


def refined(prior: Gaussians | None, features: Tensor, probs: Tensor, *, store: Store) -> Refined:
    """`refine`, or what it came to before: with many images it takes longer than anything but drawing."""
    inputs = {"features": features, "probs": probs}
    if prior is not None:
        inputs |= {"mean": prior.mean, "covariance": prior.covariance, "counts": prior.counts}
    with store.open("refined", {"recipe": 2, "inputs": tensor_digest(inputs), "weight": LIKELIHOOD_WEIGHT}) as entry:
        if not entry.complete:
            found = refine(features, probs, prior=prior)
            numbers = torch.tensor([found.prior_strength, found.iterations, found.converged], dtype=torch.float64)
            model = found.model
            tensors = {"mean": model.mean, "covariance": model.covariance, "counts": model.counts}
            save_tensors(entry.path / FILE, {**tensors, "soft_counts": found.soft_counts, "numbers": numbers})
            entry.finish([FILE])
        saved = {name: tensor.to(features.device) for name, tensor in entry.tensors(FILE).items()}
    prior_strength, iterations, converged = saved["numbers"].tolist()
    model = Gaussians(saved["mean"], saved["covariance"], saved["counts"])
    return Refined(model, saved["soft_counts"], prior_strength, int(iterations), bool(converged))
