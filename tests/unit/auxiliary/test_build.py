"""From unlabelled images to the auxiliary classifier, and the heads that it adds to our trainers."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_models import air_settings, make_generator
from torch import Tensor
from yacs.config import CfgNode

from air_plugin.auxiliary import build as module
from air_plugin.auxiliary.build import Auxiliary, Built, build_auxiliary
from air_plugin.auxiliary.classifier import AuxiliaryClassifier
from air_plugin.auxiliary.stages import Prototypes
from air_plugin.clip.backbone import Backbone
from air_plugin.clip.features import FeatureTable
from air_plugin.clip.zero_shot import UnlabelledImages
from air_plugin.config import add_air_config
from air_plugin.diffusion import lora
from air_plugin.diffusion.lora_step import LoraStep
from air_plugin.diffusion.pipeline import Generator, load_generator
from air_plugin.functional.losses import consistency_loss, synthetic_loss
from air_plugin.mixin import AuxiliaryMixin, augment
from air_plugin.utils.errors import UserError
from air_plugin.utils.images import load_rgb
from air_plugin.utils.provenance import Stages
from air_plugin.utils.store import Store
from trainers.air import AiR
from trainers.cpl import CPL
from trainers.fused_heads import FusedHeads
from trainers.self_training import SelfTraining

NAMES = ["dog", "annual_crop land", "sea"]


@pytest.fixture
def build(tiny_backbone: Backbone, pictures: list[str], store: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "load_generator", lambda *_, **__: make_generator())
    probs = torch.rand(7, 3, generator=torch.Generator().manual_seed(0)).softmax(dim=1)
    features = features_of(tiny_backbone, [Path(picture) for picture in pictures])

    def run(until: module.Until | None = None, **changes: Any) -> tuple[Any, dict[str, bool]]:
        stages, options = Stages(), {"settings": air_settings(**changes), "store": store}
        arguments = tiny_backbone, NAMES, unlabelled(pictures, features, probs)
        if until is None:
            made: Auxiliary | Built = build_auxiliary(*arguments, **options, stages=stages)
        else:
            made = module.build(*arguments, **options, stages=stages, until=until)
        return made, {stage.name: stage.cached for stage in stages.done}

    return run


def unlabelled(paths: list[str], features: Tensor, probs: Tensor) -> UnlabelledImages:
    return UnlabelledImages(paths, FeatureTable(features[:, None]), probs)


def features_of(backbone: Backbone, paths: list[Path]) -> Tensor:
    return torch.cat([backbone.encode_images(backbone.preprocess(load_rgb(path))[None]) for path in paths])


def test_the_classifier_is_made_of_the_kept_images(build, tiny_backbone: Backbone):
    made, _ = build()
    prototypes = made.prototypes
    assert [len(images) for images in prototypes.images] == [4, 4, 4] and prototypes.kept.shape == (3, 2)
    kept = []
    for c, images in enumerate(prototypes.images):
        features = features_of(tiny_backbone, images)
        cosines = features @ torch.nn.functional.normalize(features.mean(dim=0), dim=0)
        assert prototypes.kept[c].tolist() == cosines.argsort(descending=True)[:2].tolist()
        assert torch.allclose(prototypes.generated[c], features, atol=1e-5)
        assert torch.allclose(prototypes.features[c], features[prototypes.kept[c]], atol=1e-5)
        assert torch.allclose(made.classifier.weight[c], features[prototypes.kept[c]].mean(dim=0), atol=1e-5)
        kept += [images[k] for k in prototypes.kept[c]]
    assert prototypes.kept_images == kept
    assert made.classifier.scale == pytest.approx(2.0 * tiny_backbone.logit_scale)


def test_images_belong_to_their_class(build):
    made, _ = build()
    manifest = made.prototypes.images[0][0].parent / "manifest.jsonl"
    generated = {line["key"]: line for line in map(json.loads, manifest.read_text().splitlines())}
    for name, images in zip(NAMES, made.prototypes.images, strict=True):
        lines = [generated[path.stem] for path in images]
        assert [(line["classname"], line["number"]) for line in lines] == [(name, i) for i in range(4)]


def test_everything_comes_from_the_store_the_second_time(build):
    first, stages = build()
    assert stages == dict.fromkeys(("generator", "lora", "generation", "prototypes", "refinement"), False)
    second, stages = build()
    expected = {"generator": False, "lora": True, "generation": True, "prototypes": True, "refinement": False}
    assert stages == expected
    assert torch.equal(first.classifier.weight, second.classifier.weight)
    one, other = first.prototypes, second.prototypes
    assert one.key == other.key and torch.equal(one.kept, other.kept) and one.images == other.images
    assert (one.cached, other.cached) == (False, True)


@pytest.mark.parametrize(
    ("change", "cached"),
    [
        ({"LAMBDA": 9.0, "AUX_SCALE": 5.0, "AUX_FORM": "raw", "BETA": 0.0}, (True, True, True)),
        ({"K": 1}, (True, True, False)),
        ({"M": 3}, (True, True, False)),
        ({"M": 6}, (True, False, False)),
        ({"STEPS": 2}, (True, False, False)),
        ({"GUIDANCE": 3.0}, (True, False, False)),
        ({"COMPILE": True, "BATCH": 3}, (True, True, True)),
        ({"PROMPT": "a drawing of a {}"}, (False, False, False)),
        ({"LORA.STEPS": 3}, (False, False, False)),
        ({"GENERATION_SEED": 5}, (False, False, False)),
    ],
)
def test_a_setting_makes_new_what_depends_on_it_and_no_more(build, change: dict, cached: tuple[bool, bool, bool]):
    build()
    _, stages = build(**change)
    assert (stages["lora"], stages["generation"], stages["prototypes"]) == cached


def test_the_generator_is_loaded_as_the_settings_say(
    tiny_backbone: Backbone, pictures: list[str], store: Store, monkeypatch: pytest.MonkeyPatch
):
    seen: dict[str, Any] = {}

    def load(name: str, **options: Any) -> Generator:
        seen.update(options, name=name)
        return make_generator()

    monkeypatch.setattr(module, "load_generator", load)
    options = {
        "GENERATOR": "owner/model",
        "REVISION": "abc",
        "VARIANT": "fp16",
        "SCHEDULER": "lcm",
        "LCM_LORA": "owner/lora",
        "LCM_LORA_REVISION": "def",
        "SAFETY_CHECKER": True,
        "PRECISION": "bf16",
        "INT8": True,
    }
    build_auxiliary(
        tiny_backbone,
        NAMES,
        unlabelled(pictures, torch.eye(7, 24), torch.eye(7, 3)),
        settings=air_settings(**options),
        store=store,
        stages=Stages(),
    )
    assert seen.pop("device") == tiny_backbone.device and seen.pop("name") == "owner/model"
    assert seen == {key.lower(): value for key, value in options.items() if key != "GENERATOR"}
    assert set(seen) < set(inspect.signature(load_generator).parameters)


def test_the_labels_of_a_round_are_the_captions_of_the_next(build, monkeypatch: pytest.MonkeyPatch):
    seen: list[Tensor] = []
    adapt = module.adapt

    def spy(*args: Any, probs: Tensor, **options: Any) -> Any:
        seen.append(probs)
        return adapt(*args, probs=probs, **options)

    monkeypatch.setattr(module, "adapt", spy)
    monkeypatch.setattr(module.Round, "stable", False)
    made, stages = build(ROUNDS=2, AUXILIARY="gaussian", REFINE="em")
    assert len(seen) == len(made.rounds) == 2
    assert torch.equal(seen[1].argmax(dim=1), made.rounds[0].labels)
    changed = (made.rounds[1].labels != made.rounds[0].labels).double().mean()
    assert made.rounds[1].changed == pytest.approx(100 * float(changed), abs=0.01)
    assert {"lora", "lora, round 2", "refinement, round 2"} <= stages.keys()
    again, stages = build(ROUNDS=2, AUXILIARY="gaussian", REFINE="em")
    assert stages["lora, round 2"] and stages["generation, round 2"] and stages["prototypes, round 2"]
    assert torch.equal(again.classifier.weight, made.classifier.weight)


def test_rounds_end_once_labels_stay(build, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module.Round, "stable", True)
    made, _ = build(ROUNDS=5)
    assert len(made.rounds) == 1


STAGES = {
    "lora": {"generator", "lora"},
    "images": {"generator", "lora", "generation"},
    "prototypes": {"generator", "lora", "generation", "prototypes"},
    "classifier": {"generator", "lora", "generation", "prototypes", "refinement"},
}


@pytest.mark.parametrize("until", STAGES)
def test_a_build_ends_with_the_stage_that_was_asked_for(build, until: module.Until):
    made, stages = build(until)
    assert stages.keys() == STAGES[until]
    fields = dict(zip(STAGES, (made.adapter, made.images, made.prototypes, made.auxiliary), strict=True))
    assert {name for name, value in fields.items() if value is not None} == set(list(STAGES)[: len(stages) - 1])
    whole, _ = build()  # the stages are those of the whole build
    assert made.images is None or made.images.paths[::3] == whole.prototypes.images[0]
    assert made.prototypes is None or made.prototypes.key == whole.prototypes.key
    assert made.adapter.key == whole.classifier.card["lora"]


def test_the_last_round_ends_with_the_stage_that_was_asked_for(build, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module.Round, "stable", False)
    options = {"AUXILIARY": "gaussian", "REFINE": "em", "LORA.CAPTIONS": "all"}  # whose second round has other captions
    made, stages = build("lora", ROUNDS=2, **options)
    assert stages.keys() == STAGES["classifier"] | {"lora, round 2"} and made.images is None
    whole, _ = build(ROUNDS=2, **options)
    assert made.adapter.key == whole.classifier.card["lora"] != build("lora", **options)[0].adapter.key


@pytest.mark.parametrize(
    ("until", "changes", "key"),
    [
        ("lora", {"PROTOTYPES": "real"}, "AIR.PROTOTYPES"),
        ("images", {"PROTOTYPES": "real"}, "AIR.PROTOTYPES"),
        ("lora", {"LORA.ENABLED": False}, "AIR.LORA.ENABLED"),
    ],
)
def test_a_stage_with_nothing_to_make_is_refused(build, until: module.Until, changes: dict, key: str):
    with pytest.raises(UserError, match=rf"^{key} is \w+; it must be"):
        build(until, **changes)


def test_prototypes_of_real_images_have_no_artifact(build, pictures: list[str]):
    made, stages = build("prototypes", PROTOTYPES="real")
    assert stages.keys() == {"prototypes"} and made.auxiliary is None and made.prototypes.key == ""
    assert {str(path) for path in made.prototypes.kept_images} <= {*pictures}


@pytest.mark.parametrize("prior", ["prototypes", "none"])
def test_controls_without_a_generator_load_none(build, monkeypatch: pytest.MonkeyPatch, prior: str):
    monkeypatch.setattr(module, "load_generator", lambda *_, **__: pytest.fail("a generator was loaded"))
    made, stages = build(PROTOTYPES="real", PRIOR=prior, AUXILIARY="gaussian", REFINE="em")
    assert set(stages) == {"prototypes", "refinement"} and len(made.rounds) == 1


@pytest.mark.parametrize("enabled", [True, False])
def test_a_size_that_the_generator_cannot_make_is_refused_before_anything_is_made(build, store: Store, enabled: bool):
    with pytest.raises(UserError, match=r"AIR\.SIZE is 17"):
        build(SIZE=17, **{"LORA.ENABLED": enabled})
    assert not [path for path in store.root.rglob("*") if path.is_file()]


def test_a_filter_of_more_classes_than_there_are_is_refused_before_anything_is_made(build, store: Store):
    with pytest.raises(UserError, match=r"^AIR\.FILTER_TOP is 4; it must be in \[0, 3\]$"):
        build(FILTER_TOP=4)
    assert not [path for path in store.root.rglob("*") if path.is_file()]


def test_another_scheduler_keeps_the_adapter_and_generates_anew(build, monkeypatch: pytest.MonkeyPatch):
    from diffusers import DDIMScheduler

    first, _ = build()
    other = make_generator()
    other.pipeline.scheduler = DDIMScheduler.from_config(other.pipeline.scheduler.config)
    monkeypatch.setattr(module, "load_generator", lambda *_, **__: other)
    second, stages = build()
    assert stages["lora"] and not stages["generation"] and first.prototypes.images != second.prototypes.images


@pytest.mark.parametrize("graphs", [True, False])
def test_graphs_are_used_as_the_settings_say_and_decide_no_artifact(
    build, monkeypatch: pytest.MonkeyPatch, graphs: bool
):
    passed = []

    def step(*arguments: Any, graphs: bool, **named: Any) -> LoraStep:
        passed.append(graphs)
        return LoraStep(*arguments, graphs=graphs, **named)

    monkeypatch.setattr(lora, "LoraStep", step)
    build(until="lora", CUDA_GRAPHS=graphs)
    assert passed == [graphs]
    _, cached = build(until="lora", CUDA_GRAPHS=not graphs)
    assert cached["lora"] and passed == [graphs]


def test_without_lora_there_is_no_such_stage_and_other_images(build):
    with_lora, _ = build()
    without, stages = build(**{"LORA.ENABLED": False})
    assert "lora" not in stages
    one, other = ({path for row in made.prototypes.images for path in row} for made in (with_lora, without))
    assert not one & other


def test_fewer_images_are_the_first_of_more(build):
    many, _ = build(M=6)
    few, stages = build(M=3)
    assert stages["generation"] and [row[:3] for row in many.prototypes.images] == few.prototypes.images


def test_raw_form_has_no_scale(build):
    assert build(AUX_FORM="raw")[0].classifier.scale is None


def test_the_pipeline_is_left_as_it_was(build, monkeypatch: pytest.MonkeyPatch):
    from air_plugin.diffusion.pipeline import _fingerprint

    generator = make_generator()
    monkeypatch.setattr(module, "load_generator", lambda *_, **__: generator)
    build()
    assert _fingerprint(generator.pipeline) == generator.fingerprint


def test_the_gallery_is_a_picture(build, pictures: list[str], tmp_path: Path):
    from PIL import Image

    from air_plugin.auxiliary.gallery import plot_gallery

    made, _ = build()
    probs = torch.rand(7, 3, generator=torch.Generator().manual_seed(0))
    plot_gallery(made.prototypes, NAMES, unlabelled(pictures, torch.eye(7, 24), probs), tmp_path / "gallery.png")
    with Image.open(tmp_path / "gallery.png") as image:
        image.load()
        assert image.width > 500 and image.height > 100


def test_a_gallery_row_shows_kept_dropped_and_confident_images():
    from air_plugin.auxiliary.gallery import _row

    images = [[Path(f"{number}") for number in range(6)]]
    made = SimpleNamespace(images=images, kept=torch.tensor([[4, 1, 3]]))
    cells = _row(made, 0, ["a", "b", "c"], torch.tensor([0.1, 0.9, 0.5]))
    shown = [str(path) for _, path in sorted(cells.items())]
    assert shown == ["4", "1", "3", "0", "2", "5", "b", "c", "a"]


# The heads of our trainers


class Host:
    """What a prompt trainer of words gives the mixin."""

    is_visual = False

    def __init__(self, auxiliary: Auxiliary, **changes: Any) -> None:
        self.cfg = SimpleNamespace(TRAINER=SimpleNamespace(PROMPT=SimpleNamespace(MODALITY="text")))
        self.auxiliary, self.air = auxiliary, air_settings(**changes)
        self.seed = self.epoch = self.batch_idx = 0
        self.device = torch.device("cpu")
        self.model = SimpleNamespace(logits=lambda features, text: features @ text.T)

    def head_probs(self, features: Tensor, frozen: Tensor | None = None) -> dict[str, Tensor]:
        return {"text": features[:, :3].softmax(dim=1)}

    def losses(self, batch: dict[str, Tensor], text: Tensor) -> dict[str, Tensor]:
        return {"loss_r": batch["img"].sum()}


class Mixed(FusedHeads, Host):
    pass


@pytest.fixture
def air(monkeypatch: pytest.MonkeyPatch):
    """Makes the trainer AiR without a data set: its part of the loss stands beside the host's."""
    monkeypatch.setattr(SelfTraining, "losses", Host.losses)

    def make(**changes: Any) -> AiR:
        trainer = object.__new__(AiR)
        Host.__init__(trainer, auxiliary(), **changes)
        return trainer

    return make


def auxiliary() -> Auxiliary:
    prototypes = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(1))
    head = AuxiliaryClassifier.from_prototypes(prototypes, scale=2.0)
    return Auxiliary(head, Prototypes(prototypes, [], torch.arange(2).expand(3, -1), prototypes))


def batch() -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(2)
    return {"img": torch.randn(4, 5, generator=rng), "img2": torch.randn(4, 5, generator=rng)}


TEXT = torch.randn(3, 5, generator=torch.Generator().manual_seed(3))


def test_the_primary_classifier_is_as_configured():
    class Checked:
        def check_cfg(self, cfg: Any) -> None:
            pass

    cfg = CfgNode({"DATASET": {}, "TRAINER": {}, "SEED": 0})
    add_air_config(cfg)
    for primary in ("text", "fused"):
        cfg.AIR.PRIMARY = primary
        trainer = type("Mine", (FusedHeads, Checked), {})()
        trainer.check_cfg(cfg)
        assert trainer.primary == primary


def test_augment_adds_the_heads_to_trainers_that_have_them_and_the_mixin_to_others():
    assert augment(CPL).__mro__[1:4] == (FusedHeads, AuxiliaryMixin, CPL)
    assert augment(Host).__mro__[1:3] == (AuxiliaryMixin, Host)


@pytest.mark.parametrize("weight", [0.0, 1.0, 3.0])
def test_the_fused_head_is_the_weighted_mean_of_both(weight: float):
    made = auxiliary()
    made = replace(made, classifier=replace(made.classifier, fusion_weight=weight))
    trainer, features = Mixed(made), batch()["img"]
    heads = trainer.head_probs(features)
    text, aux = features[:, :3].softmax(dim=1), trainer.auxiliary.classifier.probs(features)
    assert torch.equal(heads["text"], text)
    assert torch.allclose(heads["fused"], (text + weight * aux) / (1 + weight))


# L_s, the trainer AiR's own


def test_the_mixin_leaves_a_trainers_losses_alone():
    assert Mixed.losses is Host.losses


def test_consistency_is_added_with_its_weight(air):
    losses = air(BETA=0.5).losses(batch(), TEXT)
    expected = 0.5 * consistency_loss(batch()["img"] @ TEXT.T, batch()["img2"] @ TEXT.T)
    assert set(losses) == {"loss_r", "loss_s"} and torch.allclose(losses["loss_s"], expected)


def test_beta_zero_adds_nothing(air):
    assert set(air(BETA=0.0).losses(batch(), TEXT)) == {"loss_r"}


def test_the_synthetic_form_is_cross_entropy_on_prototypes_of_known_class(air):
    trainer = air(LS="synthetic")
    features, label = trainer._sample_prototypes(4)
    for row, c in zip(features, label.tolist(), strict=True):
        assert any(torch.equal(row, prototype) for prototype in trainer.auxiliary.prototypes.features[c])
    losses = trainer.losses(trainer.inputs(batch()), TEXT)
    assert torch.allclose(losses["loss_s"], synthetic_loss(features @ TEXT.T, label))


def test_sampled_prototypes_depend_on_seed_epoch_and_batch_alone(air):
    def generated(**where: int) -> list[float]:
        trainer = air()
        for name, value in where.items():
            setattr(trainer, name, value)
        torch.manual_seed(len(where))
        return trainer._sample_prototypes(50)[0].flatten().tolist()

    assert generated() == generated(seed=0, epoch=0)
    assert len({tuple(generated(**where)) for where in ({}, {"seed": 1}, {"epoch": 1}, {"batch_idx": 1})}) == 4


@pytest.mark.public_reports
@pytest.mark.parametrize("change", [{"PROMPT": "w" * 20 + " {}"}, {"LORA.GENERIC": "w" * 33}])
@pytest.mark.parametrize("enabled", [True, False])
def test_a_text_that_the_generator_would_cut_is_refused_before_anything_is_made(
    build, store: Store, change: dict[str, str], enabled: bool
):
    """Item 3 of the public reports: not after the LoRA is trained. One class name is too long for the prompt."""
    with pytest.raises(UserError, match="tokens, but the generator's text tower takes 32"):
        build(**change, **{"LORA.ENABLED": enabled})
    assert not [path for path in store.root.rglob("*") if path.is_file()]
