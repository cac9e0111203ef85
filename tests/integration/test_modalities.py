"""TRAINER.PROMPT.MODALITY visual and multimodal through train.py, on a small vision transformer."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from recorded_graph import RecordedGraph
from runs import arguments, figures, weights
from shared import make_once
from small_backbones import small_backbone, write_backbone
from torch import Tensor
from torch.nn.functional import cross_entropy
from yacs.config import CfgNode

import train
import trainers.prompt_step
from air_plugin.clip.prepared_images import ImageTable
from air_plugin.clip.visual_prompts import PromptedTower, VisuallyPromptedCLIP, VisualPrompts
from air_plugin.inference.bundle import load_bundle
from air_plugin.utils.cuda_graph import GraphedStep
from air_plugin.utils.images import load_rgb
from trainers.prompt_step import prompt_step
from trainers.prompt_trainer import PromptTrainer

REAL = ["AIR.PROTOTYPES", "real"]  # no generator is needed
SHOTS = ["DATASET.NUM_SHOTS", "4"]


@pytest.fixture(scope="module")
def vit(shared: Path) -> str:
    """The folder of a small vision transformer."""
    return str(make_once(shared / "vit", lambda folder: write_backbone(folder / "model", "vit")) / "model")


def options(vit: str, cache: str, modality: str, *more: str) -> list[str]:
    return ["MODEL.BACKBONE.NAME", vit, "AIR.CACHE", cache, "TRAINER.PROMPT.MODALITY", modality, *more]


def trained(trainer: str, data: Path, output: Path, *given: str) -> Any:
    """A trainer after its training."""
    cfg, _ = train.set_up(train.parse(arguments(trainer, data, output, *given)))
    cfg.freeze()
    built = train.build(cfg)
    built.train()
    return built


@pytest.mark.parametrize("modality", ["visual", "multimodal"])
def test_a_resnet_is_refused_in_one_line_before_any_work(
    modality: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The embedded backbone is a ResNet."""
    store = tmp_path / "store"
    line = arguments("AiR", data, tmp_path / "run", "AIR.CACHE", str(store), "TRAINER.PROMPT.MODALITY", modality)
    assert train.main(line) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "ResNet" in error and "ViT-B/32" in error
    assert not list(store.glob("features/*")) and not (tmp_path / "run" / "settings.json").exists()


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["TRAINER.PROMPT.CSC", "True"], "TRAINER.PROMPT.CSC"),
        (["TRAINER.PROMPT.ENSEMBLE", "2"], "TRAINER.PROMPT.ENSEMBLE"),
        (["TRAINER.PROMPT.CTX_INIT", "a word"], "TRAINER.PROMPT.CTX_INIT"),
        (["TRAINER.PROMPT.CLASS_TOKEN_POSITION", "front"], "TRAINER.PROMPT.CLASS_TOKEN_POSITION"),
        (["TRAINER.TRANSDUCTION.METHOD", "stata", "TRAINER.TRANSDUCTION.ON", "unlabelled"], "TRAINER.TRANSDUCTION.ON"),
        (["AIR.LS", "consistency"], "TRAINER.PROMPT.IMAGE_VIEWS"),
    ],
)
def test_what_has_no_meaning_is_named(
    given: list[str], named: str, vit: str, data: Path, cache: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert train.main(arguments("AiR", data, tmp_path, *options(vit, cache, "visual", *given))) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"error: {named} is ")


@pytest.mark.parametrize(
    ("trainer", "modality", "given"),
    [
        ("CPL", "visual", ["TRAINER.PROMPT.ROUNDS", "2", "OPTIM.MAX_EPOCH", "1", "TRAINER.CPL.LOSS", "rc"]),
        ("CPL", "multimodal", ["DATASET.PARADIGM", "ssl", "OPTIM.MAX_EPOCH", "2", "TRAINER.PROMPT.IMAGE_VIEWS", "3"]),
        ("AiR", "visual", [*REAL, "AIR.LS", "synthetic", "OPTIM.MAX_EPOCH", "2"]),
    ],
)
def test_a_resumed_run_is_the_undisturbed_one(
    trainer: str,
    modality: str,
    given: list[str],
    vit: str,
    data: Path,
    cache: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    lines = [
        arguments(trainer, data, tmp_path / name, *options(vit, cache, modality, *given)) for name in ("one", "two")
    ]
    assert train.main(lines[0]) == 0
    run_epoch = PromptTrainer.run_epoch

    def stops(self: PromptTrainer) -> None:
        if self.epoch == 1:
            raise KeyboardInterrupt
        run_epoch(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PromptTrainer, "run_epoch", stops)
        train.run_command(train.parse(lines[1]))
    assert train.main(lines[1]) == 0
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert figures(tmp_path / "one") == figures(tmp_path / "two")


@pytest.mark.parametrize("auxiliary", ["cosine", "gaussian"])
def test_heads_bundle_and_evaluation_agree_with_a_plain_computation(
    auxiliary: str, vit: str, data: Path, cache: str, tmp_path: Path
):
    """The cosine classifier reads features of the prompted tower, the Gaussian one those of the frozen tower."""
    given = options(vit, cache, "visual", *REAL, "AIR.AUXILIARY", auxiliary, "OPTIM.LR", "0.5")
    trainer = trained("AiR", data, tmp_path / "run", *given)
    backbone, tokens = trainer.backbone, trainer.model.prompt_learner.tokens.detach()

    def encoded(paths: list[Any]) -> tuple[Tensor, Tensor]:
        pixels = torch.stack([backbone.preprocess(load_rgb(str(path))) for path in paths])
        return PromptedTower(backbone.model.visual).encode(pixels, tokens), backbone.encode_images(pixels)

    images = [item.impath for item in trainer.dm.dataset.test]
    (features, frozen), classifier = encoded(images), trainer.auxiliary.classifier
    scale = backbone.logit_scale
    text = (scale * features @ trainer.template_features.T).softmax(dim=1)
    if auxiliary == "cosine":
        kept, _ = encoded(trainer.auxiliary.prototypes.kept_images)
        means = kept.unflatten(0, trainer.auxiliary.prototypes.kept.shape).mean(dim=1)
        beside = (classifier.scale * features @ means.T).softmax(dim=1)
    else:
        beside = classifier.probs(frozen)
    fused = text + classifier.fusion_weight * beside
    expected = {"text": text, "fused": fused / fused.sum(dim=1, keepdim=True)}
    assert float((features - frozen).abs().max()) > 0.01
    for head, probs in expected.items():
        found = trainer.predictions["heads"][head]
        confidence = torch.tensor(found["confidence"])
        assert torch.allclose(confidence, probs.amax(dim=1), atol=1e-4), head
    train.write_bundle(trainer, tmp_path / "bundle")
    bundle = load_bundle(tmp_path / "bundle")
    for head in expected:
        labels = [prediction.label for prediction in bundle.predict(images, head=head)]
        assert labels == [trainer.classnames[label] for label in trainer.predictions["heads"][head]["predicted"]]
    assert bundle.reads_frozen == (auxiliary == "gaussian")
    again = ["--eval-only", "--model-dir", str(tmp_path / "run")]
    cfg, _ = train.set_up(train.parse([*again, *arguments("AiR", data, tmp_path / "again", *given)]))
    cfg.freeze()
    loaded = train.build(cfg)
    loaded.load_model(str(tmp_path / "run"))
    loaded.test()
    assert loaded.results == trainer.results and loaded.predictions == trainer.predictions


def test_a_step_as_a_graph_is_the_same(
    vit: str, data: Path, cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With the CPU's stand-in for a CUDA graph: shapes stay the same, and nothing in a step waits for the host."""
    given = options(vit, cache, "multimodal", *REAL, "AIR.LS", "synthetic", "DATASET.PARADIGM", "ssl")
    assert train.main(arguments("AiR", data, tmp_path / "plain", *given)) == 0
    made: list[RecordedGraph] = []

    def step(*inputs: Any, **others: Any) -> GraphedStep:
        made.append(RecordedGraph())
        return GraphedStep(*inputs, **others, graph=made[-1])

    monkeypatch.setattr(trainers.prompt_step, "GraphedStep", step)
    assert train.main(arguments("AiR", data, tmp_path / "graph", *given)) == 0
    one, two = weights(tmp_path / "plain"), weights(tmp_path / "graph")
    assert len(made) == 1 and "replay" in made[0].log and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("overflows", [False, True])
def test_a_scaled_loss_gives_the_same_gradient_and_none_where_it_overflows(overflows: bool):
    backbone = small_backbone("vit")
    gradients = []
    for scale in (1.0, 1024.0):
        prompts = VisualPrompts(backbone, ["a", "b"], count=3, generator=torch.Generator().manual_seed(0))

        class Model(VisuallyPromptedCLIP):
            loss_scale = scale  # type: ignore[assignment]

        cfg = CfgNode({"TRAINER": {"PROMPT": {"ENSEMBLE": 1, "CLIP_GRAD": 0.1}}, "AIR": {"CUDA_GRAPHS": False}})
        factor = float("inf") if overflows and scale > 1 else 1.0
        trainer = SimpleNamespace(
            cfg=cfg,
            device=torch.device("cpu"),
            model=Model(backbone, prompts, template=backbone.encode_texts(["a", "b"])),
        )
        trainer.losses = lambda batch, text, trainer=trainer, factor=factor: {
            "loss": factor * cross_entropy(trainer.model.logits(batch["img"], text), batch["target"])
        }
        images = torch.randint(256, (4, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        prompt_step(trainer)({"img": images, "target": torch.tensor([0, 1, 1, 1])})  # type: ignore[arg-type]
        gradients.append(prompts.tokens.grad)
    assert float(gradients[0].norm()) == pytest.approx(0.1, rel=1e-3)  # cut after the scale is taken out
    expected = torch.zeros_like(gradients[0]) if overflows else gradients[0]
    assert torch.allclose(gradients[1], expected, atol=1e-6)


def test_images_are_decoded_once(vit: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str):
    """A second run of the same images decodes none: neither for the table nor in training."""
    line = options(vit, cache, "multimodal", *SHOTS)
    assert isinstance(trained("CoOp", data, tmp_path / "one", *line).table, ImageTable)

    def fails(path: str) -> None:
        raise AssertionError(f"{path} is decoded again")

    monkeypatch.setattr("air_plugin.clip.views.load_rgb", fails)
    assert train.main(arguments("CoOp", data, tmp_path / "two", *line)) == 0


def test_zero_shot_rows_take_the_setting_of_their_table(vit: str, data: Path, cache: str, tmp_path: Path):
    """Nothing is learned, so the modality changes nothing, and one option serves all rows of an experiment."""
    accuracies = []
    for modality in ("text", "visual"):
        output = tmp_path / modality
        assert train.main(arguments("ZeroshotCLIP", data, output, *options(vit, cache, modality))) == 0
        accuracies.append(json.loads((output / "result.json").read_text())["heads"])
    assert accuracies[0] == accuracies[1]
