"""From unlabelled images to the auxiliary classifier, and the mixin that brings it to a trainer."""

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
from air_plugin.auxiliary.build import Auxiliary, build_auxiliary
from air_plugin.auxiliary.classifier import AuxiliaryClassifier
from air_plugin.clip.backbone import Backbone
from air_plugin.config import add_air_config
from air_plugin.diffusion.pipeline import Generator, load_generator
from air_plugin.functional.losses import consistency_loss, synthetic_loss
from air_plugin.mixin import AuxiliaryMixin
from air_plugin.utils.errors import UserError
from air_plugin.utils.images import load_rgb
from air_plugin.utils.provenance import Stages
from air_plugin.utils.store import Store

NAMES = ["dog", "annual_crop land", "sea"]


@pytest.fixture
def build(tiny_backbone: Backbone, pictures: list[str], store: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "load_generator", lambda *_, **__: make_generator())
    probs = torch.rand(7, 3, generator=torch.Generator().manual_seed(0)).softmax(dim=1)

    def run(*, names: list[str] = NAMES, **changes: Any) -> tuple[Auxiliary, dict[str, bool]]:
        stages = Stages()
        features = features_of(tiny_backbone, [Path(picture) for picture in pictures])
        made = build_auxiliary(
            tiny_backbone,
            names,
            pictures,
            features=features,
            probs=probs,
            settings=air_settings(**changes),
            store=store,
            stages=stages,
        )
        return made, {stage.name: stage.cached for stage in stages.done}

    return run


def features_of(backbone: Backbone, paths: list[Path]) -> Tensor:
    return torch.cat([backbone.encode_images(backbone.preprocess(load_rgb(path))[None]) for path in paths])


def test_the_classifier_is_made_of_the_kept_images(build, tiny_backbone: Backbone):
    made, _ = build()
    assert [len(images) for images in made.images] == [4, 4, 4] and made.kept.shape == (3, 2)
    for c, images in enumerate(made.images):
        features = features_of(tiny_backbone, images)
        cosines = features @ torch.nn.functional.normalize(features.mean(dim=0), dim=0)
        assert made.kept[c].tolist() == cosines.argsort(descending=True)[:2].tolist()
        assert torch.allclose(made.prototypes[c], features[made.kept[c]], atol=1e-5)
        assert torch.allclose(made.classifier.weight[c], features[made.kept[c]].mean(dim=0), atol=1e-5)
    assert made.classifier.scale == pytest.approx(2.0 * tiny_backbone.logit_scale)


def test_images_belong_to_their_class(build):
    made, _ = build()
    manifest = made.images[0][0].parent / "manifest.jsonl"
    generated = {line["key"]: line for line in map(json.loads, manifest.read_text().splitlines())}
    for name, images in zip(NAMES, made.images, strict=True):
        lines = [generated[path.stem] for path in images]
        assert [(line["classname"], line["number"]) for line in lines] == [(name, i) for i in range(4)]


def test_everything_comes_from_the_store_the_second_time(build):
    first, stages = build()
    assert stages == dict.fromkeys(("generator", "lora", "generation", "prototypes", "refinement"), False)
    second, stages = build()
    expected = {"generator": False, "lora": True, "generation": True, "prototypes": True, "refinement": False}
    assert stages == expected
    assert first.key == second.key and torch.equal(first.classifier.weight, second.classifier.weight)
    assert torch.equal(first.kept, second.kept) and first.images == second.images


@pytest.mark.parametrize(
    ("change", "cached"),
    [
        ({"LAMBDA": 9.0, "AUX_SCALE": 5.0, "AUX_FORM": "raw", "BETA": 0.0}, (True, True, True)),
        ({"K": 1}, (True, True, False)),
        ({"M": 3}, (True, True, False)),
        ({"M": 6}, (True, False, False)),
        ({"STEPS": 2}, (True, False, False)),
        ({"GUIDANCE": 2.0}, (True, False, False)),
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
    }
    build_auxiliary(
        tiny_backbone,
        NAMES,
        pictures,
        features=torch.eye(7, 24),
        probs=torch.eye(7, 3),
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


@pytest.mark.parametrize("prior", ["prototypes", "none"])
def test_controls_without_a_generator_load_none(build, monkeypatch: pytest.MonkeyPatch, prior: str):
    monkeypatch.setattr(module, "load_generator", lambda *_, **__: pytest.fail("a generator was loaded"))
    made, stages = build(PROTOTYPES="real", PRIOR=prior, AUXILIARY="gaussian", REFINE="em")
    assert set(stages) == {"prototypes", "refinement"} and len(made.rounds) == 1


@pytest.mark.parametrize("enabled", [True, False])
def test_a_size_that_the_generator_cannot_draw_is_said_before_anything_is_made(build, store: Store, enabled: bool):
    with pytest.raises(UserError, match=r"AIR\.SIZE is 17"):
        build(SIZE=17, **{"LORA.ENABLED": enabled})
    assert not [path for path in store.root.rglob("*") if path.is_file()]


def test_another_way_of_drawing_keeps_the_adapter_and_draws_anew(build, monkeypatch: pytest.MonkeyPatch):
    from diffusers import DDIMScheduler

    first, _ = build()
    other = make_generator()
    other.pipeline.scheduler = DDIMScheduler.from_config(other.pipeline.scheduler.config)
    monkeypatch.setattr(module, "load_generator", lambda *_, **__: other)
    second, stages = build()
    assert stages["lora"] and not stages["generation"] and first.images != second.images


def test_without_lora_there_is_no_such_stage_and_other_images(build):
    with_lora, _ = build()
    without, stages = build(**{"LORA.ENABLED": False})
    assert "lora" not in stages
    assert not {p for row in with_lora.images for p in row} & {p for row in without.images for p in row}


def test_fewer_images_are_the_first_of_more(build):
    many, _ = build(M=6)
    few, stages = build(M=3)
    assert stages["generation"] and [row[:3] for row in many.images] == few.images


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
    plot_gallery(made, NAMES, pictures, probs, tmp_path / "gallery.png")
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


# The mixin


class Host:
    """What a prompt trainer gives the mixin."""

    def __init__(self, auxiliary: Auxiliary, **changes: Any) -> None:
        self.auxiliary, self.air = auxiliary, air_settings(**changes)
        self.seed = self.epoch = self.batch_idx = 0
        self.model = SimpleNamespace(logits=lambda features, text: features @ text.T)

    def head_probs(self, features: Tensor) -> dict[str, Tensor]:
        return {"text": features[:, :3].softmax(dim=1)}

    def losses(self, batch: dict[str, Tensor], text: Tensor) -> dict[str, Tensor]:
        return {"loss_r": batch["img"].sum()}


class Mixed(AuxiliaryMixin, Host):
    pass


@pytest.fixture
def air(monkeypatch: pytest.MonkeyPatch):
    """Makes the trainer AiR without a data set: its part of the loss stands beside the host's."""
    from trainers.air import AiR
    from trainers.self_training import SelfTraining

    monkeypatch.setattr(SelfTraining, "losses", Host.losses)

    def make(**changes: Any) -> AiR:
        trainer = object.__new__(AiR)
        Host.__init__(trainer, auxiliary(), **changes)
        return trainer

    return make


def auxiliary() -> Auxiliary:
    prototypes = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(1))
    head = AuxiliaryClassifier.from_prototypes(prototypes, scale=2.0)
    return Auxiliary(head, prototypes, [], torch.empty(0), "key", prototypes)


def batch() -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(2)
    return {"img": torch.randn(4, 5, generator=rng), "img2": torch.randn(4, 5, generator=rng)}


TEXT = torch.randn(3, 5, generator=torch.Generator().manual_seed(3))


def test_the_headline_is_as_configured_where_there_are_heads_to_choose_from():
    class Checked:
        def check_cfg(self, cfg: Any) -> None:
            pass

    class Headed(Checked):
        head_probs = Host.head_probs

    cfg = CfgNode({"DATASET": {}, "TRAINER": {}, "SEED": 0})
    add_air_config(cfg)
    cfg.AIR.PRIMARY = "text"
    for host, expected in ((Headed, "text"), (Checked, "fused")):  # without heads, what is predicted is always fused
        trainer = type("Mine", (AuxiliaryMixin, host), {})()
        trainer.check_cfg(cfg)
        assert trainer.primary == expected


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
        assert any(torch.equal(row, prototype) for prototype in trainer.auxiliary.prototypes[c])
    assert torch.allclose(trainer.losses(batch(), TEXT)["loss_s"], synthetic_loss(features @ TEXT.T, label))


def test_drawn_prototypes_depend_on_seed_epoch_and_batch_alone(air):
    def generated(**where: int) -> list[float]:
        trainer = air()
        for name, value in where.items():
            setattr(trainer, name, value)
        torch.manual_seed(len(where))
        return trainer._sample_prototypes(50)[0].flatten().tolist()

    assert generated() == generated(seed=0, epoch=0)
    assert len({tuple(generated(**where)) for where in ({}, {"seed": 1}, {"epoch": 1}, {"batch_idx": 1})}) == 4
