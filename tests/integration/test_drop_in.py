"""Trainers of other people's shapes gain the auxiliary classifier: in two lines, or by `augment`."""

from __future__ import annotations

import copy
import logging
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import documents
import numpy as np
import pytest
import torch
from dassl_small import TinyApart, tiny_cfg, write_images
from drop_in_trainers import (
    CoCoOpShape,
    CoOpModel,
    CoOpShape,
    HeadlessShape,
    KgCoOpShape,
    MaPLeShape,
    PLOTShape,
    UPLShape,
    VPTShape,
    ZeroshotShape,
)
from torch import Tensor, nn

from air_plugin import AuxiliaryMixin, add_air_config, augment
from air_plugin.utils.errors import UserError
from air_plugin.utils.images import load_rgb

LAMBDA = 2.0


class MyCoOp(AuxiliaryMixin, CoOpShape):
    """Nothing more is needed."""


class MyCoCoOp(AuxiliaryMixin, CoCoOpShape):
    """Nothing more is needed."""


class MyKgCoOp(AuxiliaryMixin, KgCoOpShape):
    """Nothing more is needed."""


class MyVPT(AuxiliaryMixin, VPTShape):
    """Nothing more is needed."""


class MyMaPLe(AuxiliaryMixin, MaPLeShape):
    """Its image encoder takes prompts, so it overrides how images are encoded."""

    def image_features(self, images: Tensor) -> Tensor:
        _, shared_ctx, _, deep_prompts = self.model.prompt_learner()
        return self.model.image_encoder(images.type(self.model.dtype), shared_ctx, deep_prompts)


class MyHeadless(AuxiliaryMixin, HeadlessShape):
    """Its image encoder has another name."""

    def image_features(self, images: Tensor) -> Tensor:
        return self.model.tower(images)


MINE = (MyCoOp, MyCoCoOp, MyKgCoOp, MyVPT, MyMaPLe, MyHeadless)


def theirs(mine: type) -> type:
    """The trainer that a class is made of."""
    return mine.__mro__[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("colours")
    write_images(folder)
    write_images(folder / "apart")
    return folder


@pytest.fixture(scope="module")
def config(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Makes a configuration; all share one store, so that the images are generated once."""
    cache = tmp_path_factory.mktemp("cache")
    air = {
        "CACHE": str(cache),
        "M": 4,
        "K": 2,
        "SIZE": 32,
        "STEPS": 2,
        "BATCH": 12,
        "LAMBDA": LAMBDA,
        "LORA__ENABLED": False,
    }

    def make(**options: Any) -> Any:
        cfg = tiny_cfg(data, tmp_path_factory.mktemp("run"))
        add_air_config(cfg)
        cfg.MODEL.BACKBONE.NAME, cfg.DATASET.NAME = "mini", "TinyApart"
        cfg.INPUT.SIZE, cfg.INPUT.INTERPOLATION = (32, 32), "bicubic"
        cfg.INPUT.PIXEL_MEAN = [0.48145466, 0.4578275, 0.40821073]
        cfg.INPUT.PIXEL_STD = [0.26862954, 0.26130258, 0.27577711]
        for key, value in {**{f"AIR__{key}": value for key, value in air.items()}, **options}.items():
            *parents, last = key.split("__")
            node = cfg
            for parent in parents:
                node = node[parent]
            assert last in node, key
            node[last] = value
        return cfg

    return make


def build(trainer: type, cfg: Any) -> Any:
    from dassl.utils import set_random_seed

    set_random_seed(1)
    return trainer(cfg)


def train(trainer: type, cfg: Any) -> Any:
    built = build(trainer, cfg)
    built.train()
    return built


@pytest.fixture(scope="module")
def trained(config: Callable[..., Any]) -> Callable[[type], Any]:
    """A trained trainer of a class, the same one for every test of this file: do not change it."""
    made: dict[type, Any] = {}

    def get(trainer: type) -> Any:
        if trainer not in made:
            made[trainer] = train(trainer, config())
        return made[trainer]

    return get


def first_batch(trainer: Any) -> Tensor:
    return next(iter(trainer.test_loader))["img"]


@contextmanager
def calls_of(module: nn.Module) -> Iterator[list[int]]:
    """The sizes of the batches that go through a module meanwhile."""
    sizes: list[int] = []
    hook = module.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    yield sizes
    hook.remove()


def softmax(values: list[float]) -> list[float]:
    top = max(values)
    parts = [math.exp(value - top) for value in values]
    return [part / sum(parts) for part in parts]


def encoded(trainer: Any, image: Tensor) -> list[float]:
    """One image's unit features, by the trainer's own tower."""
    with torch.no_grad():
        row = trainer.image_features(image[None])[0].double()
    return (row / row.norm()).tolist()


def kept_features(trainer: Any) -> list[list[list[float]]]:
    """Of each class, the unit features of the images that were kept, as the trainer sees test images."""
    prototypes, transform = trainer.auxiliary.prototypes, trainer.test_loader.dataset.transform
    return [
        [encoded(trainer, transform(load_rgb(images[k]))) for k in kept]
        for images, kept in zip(prototypes.images, prototypes.kept.tolist(), strict=True)
    ]


def slow_fusion(trainer: Any, own_logits: Tensor, images: Tensor, *, weight: float) -> Tensor:
    """(B, C) log of the normalised p + lambda p^, an image and a class at a time."""
    prototypes = kept_features(trainer)
    rows = []
    for logits, image in zip(own_logits.tolist(), images, strict=True):
        feature = encoded(trainer, image)
        scores = [
            sum(sum(a * b for a, b in zip(feature, other, strict=True)) for other in others) / len(others)
            for others in prototypes
        ]
        text, aux = softmax(logits), softmax([trainer.auxiliary.classifier.scale * score for score in scores])
        total = [p + weight * q for p, q in zip(text, aux, strict=True)]
        rows.append([math.log(value / sum(total)) for value in total])
    return torch.tensor(rows)


def own_inference(trainer: Any, images: Tensor) -> Tensor:
    """The trainer's logits without the mixin."""
    with torch.no_grad():
        return theirs(type(trainer)).model_inference(trainer, images)


# What is predicted


@pytest.mark.parametrize("mine", MINE)
def test_output_is_the_log_of_both_classifiers_sum_over_the_tower_as_it_is_now(mine: type, trained: Callable):
    trainer = trained(mine)
    trainer.test()
    images = first_batch(trainer)
    with torch.no_grad():
        fused = trainer.model_inference(images)
    own = own_inference(trainer, images)
    expected = slow_fusion(trainer, own, images, weight=LAMBDA)
    assert torch.allclose(fused, expected, atol=1e-4)
    assert torch.allclose(fused.exp().sum(dim=1), torch.ones(len(images)))
    assert not torch.allclose(fused, own.log_softmax(dim=1), atol=1e-2)  # the auxiliary classifier counts


@pytest.mark.parametrize("split", ["test", "val"])
@pytest.mark.parametrize("mine", [MyCoOp, MyMaPLe])
def test_accuracy_is_that_of_the_fused_output(mine: type, split: str, trained: Callable):
    trainer = trained(mine)
    accuracy = trainer.test(split=split)
    hits = []
    with torch.no_grad():
        for batch in trainer.val_loader if split == "val" else trainer.test_loader:
            hits += (trainer.model_inference(batch["img"]).argmax(dim=1) == batch["label"]).tolist()
    assert accuracy == pytest.approx(100 * sum(hits) / len(hits))


@pytest.mark.parametrize("mine", [MyCoOp, MyKgCoOp])
def test_lambda_zero_is_the_trainers_own_decision(mine: type, config: Callable):
    trainer = train(mine, config(AIR__LAMBDA=0.0))
    for batch in [*trainer.test_loader, *trainer.val_loader]:
        with torch.no_grad():
            fused = trainer.model_inference(batch["img"])
        own = own_inference(trainer, batch["img"])
        assert torch.equal(fused.argmax(dim=1), own.argmax(dim=1))
        assert torch.allclose(fused, own.log_softmax(dim=1).clamp(min=math.log(1e-37)), atol=1e-4)


@pytest.mark.parametrize("mine", [MyCoOp, MyCoCoOp, MyKgCoOp, MyVPT, MyMaPLe])
def test_the_image_encoder_runs_once_a_batch(mine: type, trained: Callable):
    trainer = trained(mine)
    trainer.test()
    images = first_batch(trainer)
    with calls_of(trainer.model.image_encoder) as sizes, torch.no_grad():
        for _ in range(3):
            trainer.model_inference(images)
    assert sizes == [len(images)] * 3
    trainer.refresh()
    with calls_of(trainer.model.image_encoder) as sizes, torch.no_grad():
        for _ in range(3):
            trainer.model_inference(images)
    assert len(sizes) == 4  # the recorded output is compared once


def test_recorded_outputs_are_not_used_where_the_features_are_others(config: Callable):
    class Negated(AuxiliaryMixin, CoOpShape):
        def image_features(self, images: Tensor) -> Tensor:
            return -self.model.image_encoder(images)

    trainer = build(Negated, config())
    images = first_batch(trainer)
    with torch.no_grad():
        outputs = [trainer.model_inference(images) for _ in range(2)]
    assert torch.equal(*outputs)
    expected = slow_fusion(trainer, own_inference(trainer, images), images, weight=LAMBDA)
    assert torch.allclose(outputs[0], expected, atol=1e-4)


def test_a_model_that_encodes_twice_is_encoded_for_us(config: Callable):
    class Twice(CoOpModel):
        def forward(self, image: Tensor) -> Tensor:
            self.image_encoder(image.flip(3))
            return super().forward(image)

    class MyTwice(AuxiliaryMixin, CoOpShape):
        network = Twice

    trainer = build(MyTwice, config())
    images = first_batch(trainer)
    with torch.no_grad():
        fused = trainer.model_inference(images)
    expected = slow_fusion(trainer, own_inference(trainer, images), images, weight=LAMBDA)
    assert torch.allclose(fused, expected, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_are_fused_in_single_precision(dtype: torch.dtype, config: Callable):
    class Half(CoOpModel):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.image_encoder, self.dtype = copy.deepcopy(self.image_encoder).to(dtype), dtype

        def scaled(self, image_features: Tensor, text_features: Tensor) -> Tensor:
            return super().scaled(image_features, text_features.to(dtype)).to(dtype)

    class MyHalf(AuxiliaryMixin, CoOpShape):
        network = Half

    trainer = build(MyHalf, config())
    trainer.test()
    images = first_batch(trainer)
    own = own_inference(trainer, images)
    with torch.no_grad():
        fused = trainer.model_inference(images)
    assert own.dtype == dtype and fused.dtype == torch.float32
    tolerance = 0.05 if dtype == torch.float16 else 0.1  # one image and a batch are rounded otherwise, times 100
    assert torch.allclose(fused, slow_fusion(trainer, own, images, weight=LAMBDA), atol=tolerance)
    assert trainer._current is trainer.auxiliary  # rounding is no other tower


def test_a_model_in_data_parallel_is_looked_into(trained: Callable, config: Callable, monkeypatch: pytest.MonkeyPatch):
    # Where there is a GPU, DataParallel would move model and images to it, while the other trainer is on the CPU.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    class Parallel(MyCoOp):
        def register_model(self, *args: Any) -> None:  # the last step of build_model, where CoOp wraps its model
            super().register_model(*args)
            self.model = nn.DataParallel(self.model)

    trainer, plain = train(Parallel, config()), trained(MyCoOp)
    images = first_batch(plain)
    plain.test()
    with torch.no_grad(), calls_of(trainer.model.module.image_encoder) as sizes:
        assert torch.equal(trainer.model_inference(images), plain.model_inference(images))
    assert sizes == [len(images)]


# What training is


@pytest.mark.parametrize("mine", MINE)
def test_training_is_bit_identical_to_the_trainers_own(mine: type, config: Callable):
    after = []
    for trainer in (theirs(mine), mine):
        built = train(trainer, config())
        randomness = random.random(), float(np.random.rand()), float(torch.rand(1))
        after.append((built.model.state_dict(), randomness))
        assert not any(
            parameter.grad is not None for parameter in built.model.parameters() if not parameter.requires_grad
        )
    assert after[0][1] == after[1][1]
    assert after[0][0].keys() == after[1][0].keys()
    assert all(torch.equal(value, after[1][0][name]) for name, value in after[0][0].items())


def test_no_random_number_is_used_up_by_what_we_make(config: Callable, tmp_path: Path):
    """With an empty store, LoRA, and a part of ours that draws from every global generator."""

    class Wasteful(MyCoOp):
        def build_auxiliary(self) -> None:
            random.random(), np.random.rand(), torch.rand(1)
            super().build_auxiliary()

    after = []
    for trainer, options in ((CoOpShape, {}), (Wasteful, {"AIR__LORA__ENABLED": True, "AIR__CACHE": str(tmp_path)})):
        built = build(trainer, config(AIR__LORA__STEPS=2, AIR__LORA__BATCH=2, **options))
        built.before_train()
        after.append((random.random(), float(np.random.rand()), float(torch.rand(1))))
    assert after[0] == after[1] and list(tmp_path.glob("lora/*/entry.json"))


@pytest.mark.parametrize("mine", MINE)
def test_training_changes_something(mine: type, trained: Callable, config: Callable):
    before, after = build(theirs(mine), config()).model.state_dict(), trained(mine).model.state_dict()
    assert any(not torch.equal(value, after[name]) for name, value in before.items())


def test_the_best_epoch_on_validation_data_is_that_of_the_fused_output(config: Callable):
    trainer = train(MyCoOp, config(TEST__FINAL_MODEL="best_val"))
    assert trainer.test(split="val") == pytest.approx(trainer.best_result)


@pytest.mark.parametrize("configured", [False, True])
def test_the_stages_are_shown_unless_the_host_has_its_own_logging(
    configured: bool, config: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    logger = logging.getLogger("air_plugin")
    monkeypatch.setattr(logger, "propagate", False)  # pytest's handlers are those of the root
    monkeypatch.setattr(logger, "handlers", [logging.NullHandler()] if configured else [])
    build(MyCoOp, config()).before_train()
    assert ("stage prototypes: " in capsys.readouterr().out) is not configured


# The tower's changes


@pytest.mark.parametrize(("mine", "changes"), [(MyCoOp, False), (MyKgCoOp, False), (MyVPT, True), (MyMaPLe, True)])
def test_prototypes_are_encoded_anew_where_training_changed_the_tower(mine: type, changes: bool, trained: Callable):
    trainer = trained(mine)
    trainer.test()
    kept = torch.tensor(kept_features(trainer))
    assert torch.allclose(trainer._current.prototypes.features, kept, atol=1e-4) or not changes
    same = torch.allclose(trainer.auxiliary.prototypes.features, kept, atol=1e-3)
    assert same is not changes and (trainer._current is trainer.auxiliary) is not changes
    if changes:  # no file of it passes for one of the backbone
        assert trainer.auxiliary.classifier.card["backbone_fingerprint"]
        assert trainer._current.classifier.card["backbone_fingerprint"] is None


def test_kept_images_are_encoded_again_only_after_a_change(config: Callable):
    trainer = build(MyVPT, config())
    trainer.refresh()
    encoder = trainer.model.image_encoder

    def images_encoded() -> int:
        with calls_of(encoder) as sizes:
            trainer.refresh()
        return sum(sizes)

    assert images_encoded() == 6  # 3 classes x 2: all of so few are looked at
    with torch.no_grad():
        encoder.VPT.add_(1.0)
    assert images_encoded() == 12
    assert images_encoded() == 6


def test_few_of_many_kept_images_are_looked_at(config: Callable):
    trainer = build(MyCoOp, config(AIR__M=20, AIR__K=20, AIR__PROTOTYPES="real"))
    with calls_of(trainer.model.image_encoder) as sizes:
        trainer.refresh()
    assert trainer.auxiliary.prototypes.kept.numel() == 36 and sum(sizes) == 9


def test_looking_at_images_leaves_every_mode_as_it_was(config: Callable):
    trainer = build(MyVPT, config())
    trainer.model.train()
    trainer.model.text_encoder.eval()
    before = {name: part.training for name, part in trainer.model.named_modules()}
    state = copy.deepcopy(trainer.model.state_dict())
    trainer.refresh()
    assert {name: part.training for name, part in trainer.model.named_modules()} == before
    assert all(torch.equal(value, state[name]) for name, value in trainer.model.state_dict().items())


# From the checkpoint, and from other sources


def test_evaluation_alone_from_a_checkpoint_predicts_the_same(config: Callable):
    for mine in (MyCoOp, MyMaPLe):
        first = train(mine, config())
        again = mine(config())
        again.load_model(first.output_dir, epoch=2)
        assert again.test() == first.test()
        images = first_batch(first)
        with torch.no_grad():
            assert torch.allclose(again.model_inference(images), first.model_inference(images), atol=1e-5)


def test_prototypes_may_be_real_images(data: Path, config: Callable):
    trainer = build(MyCoOp, config(AIR__PROTOTYPES="real"))
    own = {str(path) for path in data.glob("*.png")}
    assert {str(path) for images in trainer.auxiliary.prototypes.images for path in images} <= own
    images = first_batch(trainer)
    with torch.no_grad():
        fused = trainer.model_inference(images)
    expected = slow_fusion(trainer, own_inference(trainer, images), images, weight=LAMBDA)
    assert torch.allclose(fused, expected, atol=1e-4)


@pytest.mark.parametrize("name", ["TinyApart", "TinyApartBare"])
def test_unlabelled_images_are_train_u_else_train_x(name: str, config: Callable, data: Path):
    trainer = build(MyCoOp, config(DATASET__NAME=name))
    trainer.before_train()
    assert trainer.unlabelled.paths == sorted(str(path) for path in data.glob("*.png"))
    assert trainer.unlabelled.probs.shape == (12, 3)


def test_labels_change_nothing(config: Callable, monkeypatch: pytest.MonkeyPatch):
    before = build(MyCoOp, config(DATASET__NAME="TinyApartBare", AIR__PROTOTYPES="real"))
    plain = TinyApart.__init__

    def turned(self: Any, cfg: Any) -> None:
        plain(self, cfg)
        for item in self._train_x:
            item._label = (item._label + 1) % 3
        self._train_u = []

    monkeypatch.setattr(TinyApart, "__init__", turned)
    after = build(MyCoOp, config(AIR__PROTOTYPES="real"))
    assert after.dm.dataset.train_x[0].label != before.dm.dataset.train_x[0].label
    assert torch.equal(after.auxiliary.classifier.weight, before.auxiliary.classifier.weight)


# Tests that are not fused, and what a test says


class Bypass(CoOpShape):
    """Its test does not go through model_inference, as CLAP's does not."""

    def test(self, split: str | None = None) -> float:
        self.set_model_mode("eval")
        self.evaluator.reset()
        for batch in self.test_loader:
            image, label = self.parse_batch_test(batch)
            self.evaluator.process(self.model(image), label)
        return self.evaluator.evaluate()["accuracy"]


@pytest.mark.public_reports
def test_a_test_that_fuses_nothing_is_an_error_and_warned_of_before_training(
    config: Callable, caplog: pytest.LogCaptureFixture
):
    """Number 25."""
    trainer = build(augment(Bypass), config())
    assert any("its test() does not name model_inference" in message for message in caplog.messages)
    assert "test() did not call model_inference, so nothing was fused" in message_of(trainer.test)
    assert "nothing was fused" in message_of(trainer.train)
    caplog.clear()
    build(MyKgCoOp, config())
    build(augment(type("Below", (CoOpShape,), {"test": lambda self: super(CoOpShape, self).test()})), config())
    assert not any("does not name" in message for message in caplog.messages)


class AtTheEnd(CoOpShape):
    """Gives the evaluator everything at once, by name, and tests the other split within its test."""

    def test(self, split: str | None = None) -> float:
        if split is None:
            self.test(split="val")
        self.set_model_mode("eval")
        self.evaluator.reset()
        pairs = [self.parse_batch_test(batch) for batch in (self.val_loader if split else self.test_loader)]
        outputs = torch.cat([self.model_inference(image) for image, _ in pairs])
        self.evaluator.process(gt=torch.cat([label for _, label in pairs]), mo=outputs)
        return self.evaluator.evaluate()["accuracy"]


class WithoutLabels(CoOpShape):
    """Keeps the evaluator out of it."""

    def test(self, split: str | None = None) -> float:
        batch = next(iter(self.test_loader))
        return float((self.model_inference(batch["img"]).argmax(1) == batch["label"]).float().mean())


@pytest.mark.public_reports
@pytest.mark.parametrize("shape", [CoOpShape, KgCoOpShape, AtTheEnd])
def test_lambda_and_both_accuracies_are_logged_at_each_test(
    shape: type, config: Callable, caplog: pytest.LogCaptureFixture
):
    """Number 25."""
    trainer = train(augment(shape), config(AIR__LAMBDA=0.75, OPTIM__LR=0.5))
    caplog.clear()
    with caplog.at_level(logging.INFO, "air_plugin"):
        accuracy = trainer.test()
    own, fused, count = 0, 0, 0
    with torch.no_grad():
        for batch in trainer.test_loader:
            count += len(batch["label"])
            own += int((shape.model_inference(trainer, batch["img"]).argmax(1) == batch["label"]).sum())
            fused += int((trainer.model_inference(batch["img"]).argmax(1) == batch["label"]).sum())
    assert accuracy == pytest.approx(100 * fused / count)
    expected = f"lambda 0.75: {100 * own / count:.1f} % alone, {100 * fused / count:.1f} % fused, of {count} images"
    assert caplog.messages[-1] == f"{shape.__name__}+AiR: {expected}"
    assert sum("lambda" in message for message in caplog.messages) == (2 if shape is AtTheEnd else 1)
    assert "process" not in vars(trainer.evaluator)


@pytest.mark.public_reports
def test_accuracies_without_labels_are_unknown(config: Callable, caplog: pytest.LogCaptureFixture):
    """Number 25."""
    trainer = build(augment(WithoutLabels), config())
    with caplog.at_level(logging.INFO, "air_plugin"):
        trainer.test()
    assert "lambda 2: accuracies unknown" in caplog.messages[-1]


# Nothing is adapted to images that accuracy is measured on, and nothing in an evaluation


@pytest.mark.public_reports
def test_test_images_are_never_adapted_to(config: Callable, tmp_path: Path):
    """Number 27: TinyColours has its test and validation images among its training images."""
    cfg = config(DATASET__NAME="TinyColours", AIR__CACHE=str(tmp_path / "cache"))
    trainer = build(MyCoOp, cfg)
    assert "all 12 images of train_u are in test or val" in message_of(trainer.train)
    assert not (tmp_path / "cache").exists()
    bare = build(MyCoOp, config(DATASET__NAME="TinyColoursBare"))
    bare.before_train()
    assert len(bare.unlabelled.paths) == 6
    assert not {item.impath for item in bare.dm.dataset.test} & set(bare.unlabelled.paths)
    labels = build(augment(Labels), config(DATASET__NAME="TinyColoursBare"))
    assert "6 of the 12 images of self.paths are in test or val" in message_of(labels.pseudo_probs)


@pytest.mark.public_reports
def test_evaluation_of_a_checkpoint_makes_nothing(config: Callable, tmp_path: Path):
    """Number 27: neither adapter nor images; with the run's store it gives the run's result."""
    options = {"AIR__LORA__ENABLED": True, "AIR__LORA__STEPS": 3, "AIR__LORA__BATCH": 2}
    first = train(MyCoOp, config(AIR__CACHE=str(tmp_path / "full"), **options))

    def evaluate(cache: str, model_dir: str, **more: Any) -> float:
        trainer = build(MyCoOp, config(AIR__CACHE=str(tmp_path / cache), **options, **more))
        trainer.load_model(model_dir, *([2] if model_dir else []))
        return trainer.test()

    message = message_of(lambda: evaluate("empty", first.output_dir))
    assert "AIR.CACHE" in message and "without --model-dir" in message and str(tmp_path / "empty") in message
    assert not list((tmp_path / "empty").rglob("*.safetensors")) + list((tmp_path / "empty").rglob("*.png"))
    assert evaluate("full", first.output_dir) == first.test()
    assert "lacks 3 of the 15 images" in message_of(lambda: evaluate("full", first.output_dir, AIR__M=5))
    evaluate("empty", "")  # what the message tells
    assert list((tmp_path / "empty").rglob("*.png"))
    assert evaluate("empty", first.output_dir) == first.test()


@pytest.mark.public_reports
def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_is_made(config: Callable, tmp_path: Path):
    """Number 28: a checkpoint of another number of classes, to evaluate or to resume from."""
    other = build(MyHeadless, config())
    other.model.head = nn.Linear(other.model.head.in_features, 4)
    other._models["head"] = other.model.head
    other.save_model(0, str(tmp_path / "other"))
    cfg = config(AIR__CACHE=str(tmp_path / "cache"), RESUME=str(tmp_path / "other"))
    trainer = build(MyHeadless, cfg)
    for run in (trainer.train, lambda: trainer.load_model(str(tmp_path / "other"), epoch=1)):
        with pytest.raises(RuntimeError, match="size mismatch"):
            run()
    assert not (tmp_path / "cache").exists()


# augment


def test_augment_is_the_class_statement(trained: Callable, config: Callable):
    from dassl.engine import TRAINER_REGISTRY, build_trainer
    from dassl.utils import set_random_seed

    made = augment(CoOpShape)
    assert made.__name__ == "CoOpShape+AiR" and made.__mro__[1:3] == (AuxiliaryMixin, CoOpShape)
    assert made.__module__ == CoOpShape.__module__
    TRAINER_REGISTRY.register(made)
    set_random_seed(1)
    trainer = build_trainer(config(TRAINER__NAME="CoOpShape+AiR"))
    trainer.train()
    images, mine = first_batch(trainer), trained(MyCoOp)
    mine.test()
    with torch.no_grad():
        assert torch.equal(trainer.model_inference(images), mine.model_inference(images))


def test_twice_is_an_error():
    for trainer in (MyCoOp, augment(CoOpShape)):
        with pytest.raises(UserError, match=r"has the auxiliary classifier already"):
            augment(trainer)


# Pseudo-labels


class Labels(CoOpShape):
    """Labels the unlabelled images, in an order of its own."""

    def build_model(self) -> None:
        super().build_model()
        self.paths = sorted((item.impath for item in self.dm.dataset.train_x), reverse=True)

    def pseudo_probs(self) -> Tensor:
        return torch.rand(12, 3, generator=torch.Generator().manual_seed(0)).softmax(dim=1)


def test_pseudo_labels_are_fused_in_the_trainers_own_order(config: Callable):
    trainer = build(augment(Labels), config())
    assert trainer.paths == sorted(trainer.paths, reverse=True)
    fused, own = trainer.pseudo_probs(), Labels.pseudo_probs(trainer)
    for row, text, path in zip(fused, own, trainer.paths, strict=True):
        image = trainer.test_loader.dataset.transform(load_rgb(path))
        expected = slow_fusion(trainer, text[None].log(), image[None], weight=LAMBDA)[0]
        assert torch.allclose(row.log(), expected, atol=1e-3)


# The overrides that docs/drop-in.md shows

DOCUMENTED = {"MaPLe": MaPLeShape, "ZeroshotCLIP": ZeroshotShape, "PLOT": PLOTShape, "UPLTrainer": UPLShape}


@pytest.mark.public_reports
@pytest.mark.parametrize("name", ["MaPLeAiR", "ZeroshotCLIPAiR", "PLOTAiR", "UPLAiR"])
def test_a_documented_override_makes_its_trainer_work(name: str, config: Callable, caplog: pytest.LogCaptureFixture):
    """Number 32."""
    names: dict[str, Any] = {"AuxiliaryMixin": AuxiliaryMixin, **DOCUMENTED}
    (block,) = (one for one in documents.snippets() if f"class {name}(" in one.text)
    exec(block.text, names)
    mine = names[name]
    trainer = build(mine, config(AIR__CACHE=config().AIR.CACHE))
    if name == "ZeroshotCLIPAiR":
        trainer.load_model("")
    else:
        trainer.train()
    caplog.clear()
    with caplog.at_level(logging.INFO, "air_plugin"):
        trainer.test()
    assert " % alone, " in caplog.messages[-1] and caplog.messages[-1].startswith(f"{name}: lambda 2: ")
    images = first_batch(trainer)
    own = own_inference(trainer, images)
    with torch.no_grad():
        fused = trainer.model_inference(images)
    assert torch.allclose(fused, slow_fusion(trainer, own, images, weight=LAMBDA), atol=1e-4)
    assert not any("does not name" in message for message in caplog.messages)


# Errors are one line


def message_of(run: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as raised:
        run()
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("shape", [MaPLeShape, HeadlessShape])
def test_a_model_without_image_features_is_named_before_anything_is_made(shape: type, config: Callable, tmp_path: Path):
    message = message_of(lambda: build(augment(shape), config(AIR__CACHE=str(tmp_path))))
    assert f"{shape.__name__}+AiR" in message and "override image_features(images)" in message
    assert "docs/drop-in.md" in message
    assert not list(tmp_path.rglob("*.png")) and not list(tmp_path.rglob("*.safetensors"))


def test_features_that_are_no_rows_are_named(config: Callable):
    class Tokens(MyCoOp):
        def image_features(self, images: Tensor) -> Any:
            return images.flatten(2)

    class Pair(MyCoOp):
        def image_features(self, images: Tensor) -> Any:
            return super().image_features(images), None

    assert "(1, 3, 1024) for 1 images" in message_of(lambda: build(Tokens, config()))
    assert "a tuple for 1 images" in message_of(lambda: build(Pair, config()))


@pytest.mark.public_reports
def test_an_output_that_is_no_logits_is_named(config: Callable, tmp_path: Path):
    """Number 28."""

    class Bare(KgCoOpShape):
        model_inference = CoOpShape.model_inference  # as if its author had forgotten it

    class Narrow(CoOpShape):
        def model_inference(self, input: Tensor) -> Tensor:
            return super().model_inference(input)[:, :2]

    cfg = config(AIR__CACHE=str(tmp_path / "cache"))
    assert "model_inference returns a tuple, not (1, 3) logits" in message_of(lambda: build(augment(Bare), cfg))
    assert "model_inference returns (1, 2), not (1, 3) logits" in message_of(lambda: build(augment(Narrow), cfg))
    assert not (tmp_path / "cache").exists()


@pytest.mark.public_reports
@pytest.mark.parametrize("options", [{"AIR__AUXILIARY": "gaussian"}, {"AIR__LAMBDA": "auto"}], ids=["gaussian", "auto"])
def test_a_tower_that_is_not_the_backbone_is_named_before_anything_is_made(
    options: dict[str, Any], config: Callable, tmp_path: Path
):
    """Number 28: prompts within the encoder, an encoder that is the backbone but is trained, and one that is it."""

    class Tuned(CoOpShape):
        trained, registered = "image_encoder", "image_encoder"

    for shape in (MyVPT, MyMaPLe, augment(Tuned)):
        cfg = config(AIR__CACHE=str(tmp_path / "cache"), AIR__SIZE=48, **options)
        assert "its image tower is not the frozen backbone" in message_of(lambda: build(shape, cfg))  # noqa: B023
    assert not (tmp_path / "cache").exists()
    assert train(MyCoOp, config(**options)).test() >= 0


@pytest.mark.public_reports
def test_an_inference_that_needs_training_first_is_tried_later(config: Callable, caplog: pytest.LogCaptureFixture):
    """Number 28."""

    class Later(CoOpShape):
        def before_train(self) -> None:
            super().before_train()
            self.factor = 1.0

        def model_inference(self, input: Tensor) -> Tensor:
            return self.factor * super().model_inference(input)

    trainer = build(augment(Later), config())
    assert any("cannot be tried before training" in message and "factor" in message for message in caplog.messages)
    trainer.train()


@pytest.mark.public_reports
@pytest.mark.parametrize("mine", [MyVPT, MyCoCoOp])
def test_trying_one_image_changes_no_state(mine: type, config: Callable):
    """Number 28: neither weights, nor statistics, nor modes, nor random numbers."""
    after = []
    for trainer in (theirs(mine), mine):
        built = build(trainer, config(AIR__AUXILIARY="cosine"))
        modes = [part.training for part in built.model.modules()]
        after.append((built.model.state_dict(), modes, random.random(), float(np.random.rand()), float(torch.rand(1))))
    assert after[0][1:] == after[1][1:]
    assert all(torch.equal(value, after[1][0][name]) for name, value in after[0][0].items())


def test_pseudo_labels_of_unknown_images_are_named(config: Callable):
    class Whose(CoOpShape):
        pseudo_probs = Labels.pseudo_probs

    class TooFew(Labels):
        def pseudo_probs(self) -> Tensor:
            return super().pseudo_probs()[:5]

    class TooEarly(Labels):
        def build_model(self) -> None:
            super().build_model()
            self.pseudo_probs()

    assert "no self.paths; set it in build_model" in message_of(lambda: build(augment(Whose), config()))
    assert "(5, 3), not 12 images" in message_of(build(augment(TooFew), config()).pseudo_probs)
    assert "call it in before_train" in message_of(lambda: build(augment(TooEarly), config()))


def test_a_config_without_our_keys_is_named(data: Path, tmp_path: Path):
    assert "add_air_config(cfg)" in message_of(lambda: MyCoOp(tiny_cfg(data, tmp_path)))


def test_a_data_set_without_one_transform_is_named(config: Callable):
    assert "transform" in message_of(lambda: build(MyCoOp, config(INPUT__NO_TRANSFORM=True)))
