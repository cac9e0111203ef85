"""How the unlabelled images refine the auxiliary classifier."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_models import air_settings
from torch import Tensor

from air_plugin.auxiliary import refinement as module
from air_plugin.auxiliary.build import Auxiliary
from air_plugin.auxiliary.classifier import AuxiliaryClassifier
from air_plugin.auxiliary.refinement import finalize, summarize
from air_plugin.auxiliary.stages import Prototypes
from air_plugin.functional.calibration import mean_confidence
from air_plugin.functional.em import posterior, refine
from air_plugin.functional.fusion import fuse, fusion_weight
from air_plugin.functional.gaussian import fit_gaussians
from air_plugin.utils.files import digest
from air_plugin.utils.store import Store
from air_plugin.utils.tensors import load_tensors, save_tensors

C, M, K, D = 3, 20, 4, 8


def unit(values: Tensor) -> Tensor:
    return torch.nn.functional.normalize(values, dim=-1)


def images(count: int, *, seed: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(C).repeat_interleave(count)
    return unit(torch.eye(C, D)[labels] + 0.25 * torch.randn(len(labels), D, generator=rng)), labels


@pytest.fixture
def auxiliary() -> Auxiliary:
    generated = unit(images(M, seed=0)[0] + 0.3 * torch.eye(1, D)).unflatten(0, (C, M))
    prototypes = generated[:, :K]
    head = AuxiliaryClassifier.from_prototypes(prototypes, scale=20.0)
    head = replace(head, fusion_weight=2.0, card={"classes": ["a", "b", "c"]})
    return Auxiliary(head, Prototypes(prototypes, [], torch.arange(K).expand(C, K), generated))


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    features, _ = images(40, seed=1)
    return {"features": features, "probs": (4 * features[:, :C]).softmax(dim=1)}


def gaussian(**changes: Any) -> Any:
    return air_settings(**{"AUXILIARY": "gaussian", **changes})


def auto(settings: Any) -> Any:
    return replace(settings, weight=None)


def test_the_papers_form_stays_as_it_is(auxiliary, inputs, store: Store):
    made, posterior_probs, _ = finalize(
        auxiliary.classifier, auxiliary.prototypes.generated, **inputs, settings=air_settings(), store=store
    )
    assert made == auxiliary.classifier
    aux_probs = auxiliary.classifier.probs(inputs["features"])
    assert torch.equal(posterior_probs, fuse(inputs["probs"], aux_probs, weight=2.0))


def test_gaussian_classes_are_fitted_to_all_generated_images_not_to_the_kept_ones(auxiliary, inputs, store: Store):
    made, posterior_probs, _ = finalize(
        auxiliary.classifier, auxiliary.prototypes.generated, **inputs, settings=gaussian(), store=store
    )
    labels = torch.arange(C).repeat_interleave(M)
    weight, bias = fit_gaussians(auxiliary.prototypes.generated.flatten(0, 1), labels, classes=C).head()
    assert torch.allclose(made.weight, weight.float()) and torch.allclose(made.bias, bias.float())
    assert made.weight.dtype == torch.float32 and made.card == auxiliary.classifier.card
    aux_probs = made.probs(inputs["features"])
    assert mean_confidence(aux_probs) == pytest.approx(mean_confidence(inputs["probs"]), abs=1e-4)
    assert torch.allclose(posterior_probs, fuse(inputs["probs"], aux_probs, weight=2.0))


@pytest.mark.parametrize("prior", ["prototypes", "none"])
def test_em_has_the_generated_images_as_its_prior_or_none(auxiliary, inputs, store: Store, prior: str):
    settings = gaussian(REFINE="em", PRIOR=prior)
    made, posterior_probs, metrics = finalize(
        auxiliary.classifier, auxiliary.prototypes.generated, **inputs, settings=settings, store=store
    )
    labels = torch.arange(C).repeat_interleave(M)
    generated = auxiliary.prototypes.generated.flatten(0, 1)
    classes = fit_gaussians(generated, labels, classes=C) if prior == "prototypes" else None
    found = refine(inputs["features"], inputs["probs"], prior=classes)
    assert torch.allclose(made.weight, found.model.bias_corrected_head()[0].float())
    assert torch.allclose(posterior_probs, posterior(found.model, inputs["features"], inputs["probs"]))
    assert metrics["prior_strength"] == round(found.prior_strength, 2) and (metrics["prior_strength"] == 0) == (
        prior == "none"
    )
    assert metrics["iterations"] == found.iterations and sum(metrics["soft_counts"]) == pytest.approx(120, abs=0.2)


@pytest.mark.parametrize("form", ["cosine", "gaussian"])
def test_lambda_is_chosen_where_it_is_auto(auxiliary, inputs, store: Store, form: str):
    settings = auto(air_settings(AUXILIARY=form))
    made, _, metrics = finalize(
        auxiliary.classifier, auxiliary.prototypes.generated, **inputs, settings=settings, store=store
    )
    aux_probs = made.probs(inputs["features"])
    assert made.fusion_weight == pytest.approx(fusion_weight(inputs["probs"], aux_probs))
    assert made.fusion_weight != 2.0 and metrics["lambda"] == round(made.fusion_weight, 4)
    assert mean_confidence(aux_probs) == pytest.approx(mean_confidence(inputs["probs"]), abs=1e-4)


def test_em_is_not_run_again_for_the_same_images(auxiliary, inputs, store: Store, monkeypatch: pytest.MonkeyPatch):
    settings = auto(gaussian(REFINE="em"))
    first, posterior_probs, metrics = finalize(
        auxiliary.classifier, auxiliary.prototypes.generated, **inputs, settings=settings, store=store
    )
    monkeypatch.setattr(module, "refine", lambda *_, **__: pytest.fail("EM was run again"))
    second, again, same = finalize(
        auxiliary.classifier, auxiliary.prototypes.generated, **inputs, settings=settings, store=store
    )
    assert torch.equal(first.weight, second.weight) and torch.equal(posterior_probs, again)
    assert metrics == same
    moved = {**inputs, "probs": inputs["probs"].roll(1, dims=0)}
    with pytest.raises(pytest.fail.Exception, match="run again"):
        finalize(auxiliary.classifier, auxiliary.prototypes.generated, **moved, settings=settings, store=store)


def test_the_result_of_em_in_a_store_of_the_previous_version_is_read(auxiliary, inputs, store: Store):
    arguments = auxiliary.classifier, auxiliary.prototypes.generated
    options = {**inputs, "settings": gaussian(REFINE="em"), "store": store}
    _, _, metrics = finalize(*arguments, **options)
    (folder,) = (mark.parent for mark in store.root.glob("refined/*/entry.json"))
    tensors = load_tensors(folder / module.FILE)
    assert tensors is not None
    former = {"soft_counts": "mass"}
    save_tensors(folder / module.FILE, {former.get(name, name): tensor for name, tensor in tensors.items()})
    mark = json.loads((folder / "entry.json").read_text())
    mark["files"] = {module.FILE: digest((folder / module.FILE).read_bytes())}
    (folder / "entry.json").write_text(json.dumps(mark))
    modified = (folder / module.FILE).stat().st_mtime_ns
    assert finalize(*arguments, **options)[2] == metrics
    assert (folder / module.FILE).stat().st_mtime_ns == modified  # it was not made again


@pytest.mark.parametrize(("moved", "stable"), [(0, True), (1, True), (2, False), (50, False)])
def test_a_round_is_stable_below_two_percent_of_changed_labels(moved: int, stable: bool):
    before = torch.eye(2)[torch.zeros(100, dtype=torch.long)]
    after = before.clone()
    after[:moved] = torch.eye(2)[1]
    done = summarize(after, before, {})
    assert done.changed == moved and done.stable is stable
    assert done.labels.tolist() == [1] * moved + [0] * (100 - moved)
