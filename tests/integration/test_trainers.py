"""Each trainer end to end, briefly, in this process."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import ROOT, arguments, figures, weights
from shared import copy_to_change

import train
from air_plugin.clip import backbone as backbone_module
from air_plugin.inference.bundle import load_bundle
from scripts.compose import settings_of
from scripts.identity import Inputs, claim


@pytest.fixture
def air(finished: Callable[..., Path]) -> Path:
    """A finished run of AiR."""
    return finished("AiR")


def test_the_result_has_every_head_stage_and_setting(air: Path) -> None:
    result = json.loads((air / "result.json").read_text())
    assert (result["trainer"], result["dataset"], result["seed"]) == ("AiR", "digits", 1)
    assert result["config"].startswith("mini+AIR.M=4+")
    assert result["primary"] in result["heads"]
    assert set(result["heads"]) == {"text", "fused"}
    for head in result["heads"].values():
        assert 0 <= head["accuracy"] <= 100
        assert len(head["per_class"]) == 10
    assert result["pseudo_labels"]["selected"] > 0
    names = [stage["name"] for stage in result["stages"]]
    assert [name for name in names if name in ("lora", "generation", "prototypes", "prompt training")] == [
        "lora",
        "generation",
        "prototypes",
        "prompt training",
    ]
    assert result["provenance"]["settings"]["AIR.M"] == 4
    for name in ("log.txt", "gallery.png", "prompt_learner/checkpoint"):
        assert (air / name).is_file()


def test_the_log_has_the_lines_that_scripts_parse(air: Path) -> None:
    log = (air / "log.txt").read_text()
    result = json.loads((air / "result.json").read_text())
    after = log[log.index("Finish training") :]
    last = [line for line in after.splitlines() if line.startswith("* accuracy:")][-1]
    assert last == f"* accuracy: {result['heads'][result['primary']]['accuracy']:.1f}%"


@pytest.mark.parametrize("trainer", sorted(path.parent.name for path in ROOT.glob("configs/trainers/*/mini_vit.yaml")))
def test_every_trainer_runs_with_the_embedded_vit(trainer: str, data: Path, cache: str, tmp_path: Path) -> None:
    assert (ROOT / "configs" / "trainers" / trainer / "mini.yaml").is_file()
    assert train.main(arguments(trainer, data, tmp_path, "AIR.CACHE", cache, config="mini_vit")) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["backbone"] == "mini_vit" and 0 < result["heads"]["text"]["accuracy"] <= 100


def test_a_complete_run_is_not_run_again(air: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (air / "result.json").stat().st_mtime_ns
    assert train.main(arguments("AiR", data, air)) == 0
    assert "complete" in capsys.readouterr().out
    assert (air / "result.json").stat().st_mtime_ns == before


def test_other_settings_do_not_pass_for_a_finished_run(
    air: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(arguments("AiR", data, air, "AIR.LAMBDA", "1")) == 2
    error = capsys.readouterr().err
    assert "AIR.LAMBDA" in error and error.count("\n") == 1


def test_evaluation_alone_gives_the_same_figures(
    air: Path, data: Path, cache: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = arguments("AiR", data, tmp_path / "eval", "AIR.CACHE", cache)
    assert train.main(["--eval-only", "--model-dir", str(air), *args]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("* accuracy:")]
    heads = json.loads((air / "result.json").read_text())["heads"]
    assert lines == [f"* accuracy: {heads[name]['accuracy']:.1f}%" for name in ("fused", "text")] or lines == [
        f"* accuracy: {heads[name]['accuracy']:.1f}%" for name in ("text", "fused")
    ]


def accuracy_lines(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if line.startswith("* accuracy:")]


@pytest.mark.public_reports
def test_a_shared_context_serves_other_classes(
    finished: Callable[..., Path], data: Path, cache: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Number 29: AiR trained on the base classes, evaluated on the new ones; the text head is right, and what becomes
    of the other head is logged."""
    base = finished("AiR", "DATASET.SUBSAMPLE_CLASSES", "base")
    new = ["DATASET.SUBSAMPLE_CLASSES", "new", "AIR.CACHE", str(tmp_path / "cache")]
    line = ["--eval-only", "--model-dir", str(base), *arguments("AiR", data, tmp_path / "eval", *new)]

    assert train.main(line) == 0
    shown = capsys.readouterr()
    assert "trained with 5 other classes (zero, one, two, three, four)" in shown.out
    (warning,) = (one for one in shown.err.splitlines() if one.startswith("warning: "))
    assert "the auxiliary classifier is left out, and the text head is the primary classifier" in warning
    assert not list((tmp_path / "cache").rglob("*.png"))
    (text,) = accuracy_lines(shown.out)
    assert text == f"* accuracy: {accuracy_of_context(base, data):.1f}%"

    assert train.main(arguments("ZeroshotAiR", data, tmp_path / "zeroshot", *new)) == 0  # fills the store
    capsys.readouterr()
    images = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.png")}
    assert train.main(line) == 0
    shown = capsys.readouterr()
    assert "the auxiliary classifier is of this run's 5 classes, from the store" in shown.out and not shown.err
    assert text in accuracy_lines(shown.out) and "Evaluate the fused head" in shown.out
    assert images == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.png")}


def accuracy_of_context(run: Path, data: Path) -> float:
    """Of a run's context with the names of the new digits, on their test images, one image at a time."""
    from air_plugin.clip.loading import load_backbone
    from air_plugin.clip.prompts import PromptLearner
    from air_plugin.utils.images import load_rgb
    from datasets.digits import CLASSES

    backbone, names = load_backbone("mini"), CLASSES[5:]
    learner = PromptLearner(backbone, names, n_ctx=len(weights(run)["ctx"]))
    learner.ctx.data = weights(run)["ctx"]
    with torch.no_grad():
        text = backbone.text_encoder(*learner())
    text = text / text.norm(dim=1, keepdim=True)
    hits = []
    for name, label, _ in json.loads((data / "digits" / "split.json").read_text())["test"]:
        if label >= 5:
            image = load_rgb(data / "digits" / name)
            feature = backbone.encode_images(backbone.preprocess(image)[None])[0]
            hits.append(int((text @ feature).argmax()) == label - 5)
    return 100 * sum(hits) / len(hits)


@pytest.mark.public_reports
def test_training_is_not_resumed_with_other_classes(
    finished: Callable[..., Path], data: Path, cache: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Number 29: evaluation takes other names, training does not."""
    base = finished("CPL", "DATASET.SUBSAMPLE_CLASSES", "base")
    options = ["DATASET.SUBSAMPLE_CLASSES", "new", "AIR.CACHE", cache]
    assert train.main(["--resume", str(base), *arguments("CPL", data, tmp_path / "run", *options)]) == 2
    error = capsys.readouterr().err
    assert "other classes" in error and error.count("\n") == 1


@pytest.mark.public_reports
@pytest.mark.parametrize("subset", ["base", "new"])  # the same number of classes, and another one
def test_class_specific_contexts_serve_no_other_classes(
    subset: str,
    finished: Callable[..., Path],
    data: Path,
    cache: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Number 29: contexts of single classes stay refused, in one line."""
    trained_on = {"base": "all", "new": "base"}[subset]
    run = finished("CPL", "TRAINER.PROMPT.CSC", "True", "DATASET.SUBSAMPLE_CLASSES", trained_on)
    options = ["TRAINER.PROMPT.CSC", "True", "DATASET.SUBSAMPLE_CLASSES", subset, "AIR.CACHE", cache]
    assert (
        train.main(["--eval-only", "--model-dir", str(run), *arguments("CPL", data, tmp_path / "eval", *options)]) == 2
    )
    error = capsys.readouterr().err
    assert "TRAINER.PROMPT.CSC" in error and "serve no other classes" in error and error.count("\n") == 1


@pytest.mark.public_reports
def test_evaluation_on_the_same_classes_trains_nothing_anew(
    air: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Number 27: without the store of the training run, --eval-only does not adapt a generator."""
    line = arguments("AiR", data, tmp_path / "eval")
    assert train.main(["--eval-only", "--model-dir", str(air), *line]) == 2
    error = capsys.readouterr().err
    assert "AIR.CACHE" in error and "no lora" in error and error.count("\n") == 1


@pytest.mark.public_reports
def test_weights_that_do_not_fit_are_named_in_one_line(
    air: Path, data: Path, cache: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Number 28: a context of another length."""
    line = arguments("CPL", data, tmp_path / "eval", "TRAINER.PROMPT.CTX_INIT", "one more word", "AIR.CACHE", cache)
    assert train.main(["--eval-only", "--model-dir", str(air), *line]) == 2
    error = capsys.readouterr().err
    assert "does not fit TRAINER.PROMPT" in error and error.count("\n") == 1


def test_no_image_is_encoded_inside_an_epoch(
    data: Path, cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainers.cpl import CPL

    encode, run_epoch, inside = backbone_module.Backbone.encode_images, CPL.run_epoch, []

    def watched(self: backbone_module.Backbone, pixels: torch.Tensor) -> torch.Tensor:
        assert not inside, "the image encoder ran inside an epoch"
        return encode(self, pixels)

    epochs = []

    def epoch(self: CPL) -> None:
        inside.append(1)
        run_epoch(self)
        inside.pop()
        epochs.append(1)

    monkeypatch.setattr(backbone_module.Backbone, "encode_images", watched)
    monkeypatch.setattr(CPL, "run_epoch", epoch)
    assert train.main(arguments("CPL", data, tmp_path / "run", "AIR.CACHE", cache)) == 0
    assert len(epochs) == 3


@pytest.mark.parametrize("form", ["consistency", "synthetic"])
def test_both_forms_of_the_regulariser_train(form: str, finished: Callable[..., Path]) -> None:
    trained, without = (finished("AiR", "AIR.LS", form, "AIR.BETA", beta) for beta in ("5", "0"))
    assert not torch.equal(weights(trained)["ctx"], weights(without)["ctx"])


def test_beta_auto_weighs_both_losses_by_how_right_their_labels_are(
    air: Path, data: Path, cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainers.air import AiR

    slow = []

    def watched(self: AiR, index: torch.Tensor, candidates: torch.Tensor) -> float:
        real = [self.unlabelled.probs[i][row].sum().item() for i, row in zip(index, candidates, strict=True)]
        generated = [
            self.backbone.text_probs(image[None], self.template_features)[0, label].item()
            for label, images in enumerate(self.auxiliary.prototypes.features)
            for image in images
        ]
        odds = [math.log(share / (1 - share)) for share in (sum(generated) / len(generated), sum(real) / len(real))]
        slow.append(odds[0] / odds[1])
        return chosen(self, index, candidates)

    chosen = AiR._choose_beta
    monkeypatch.setattr(AiR, "_choose_beta", watched)
    options = ["AIR.BETA", "auto", "AIR.CACHE", cache]
    assert train.main(arguments("AiR", data, tmp_path / "auto", *options)) == 0
    beta = json.loads((tmp_path / "auto" / "result.json").read_text())["beta"]
    assert slow == [pytest.approx(beta, rel=1e-4)] and 0 < beta < 16
    assert not torch.equal(weights(tmp_path / "auto")["ctx"], weights(air)["ctx"])


def test_zero_shot_trains_nothing(finished: Callable[..., Path]) -> None:
    output = finished("ZeroshotCLIP")
    assert not (output / "prompt_learner").exists()
    assert figures(output)["heads"]["text"]["accuracy"] > 30  # far above chance: the backbone reads digits


def test_a_class_without_pseudo_labels_is_named_and_training_goes_on(
    data: Path, cache: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainers.cpl import CPL

    def without_nine(self: CPL) -> torch.Tensor:
        probs = self.unlabelled.probs.clone()
        probs[:, 9] = 0
        return probs / probs.sum(dim=1, keepdim=True)

    monkeypatch.setattr(CPL, "pseudo_probs", without_nine)
    options = ["TRAINER.CPL.BETA", "0.99", "AIR.CACHE", cache]
    assert train.main(arguments("CPL", data, tmp_path / "run", *options)) == 0
    assert "warning: no pseudo-label for 1 of 10 classes: nine" in capsys.readouterr().err


BAD = {
    "trainer": (["--trainer", "AirR"], "AiR"),
    "backbone": (["MODEL.BACKBONE.NAME", "ViT-B-23"], "ViT-B-32"),
    "key": (["AIR.LAMDA", "1"], "AIR.LAMBDA"),
    "type": (["AIR.M", "many"], "AIR.M"),
    "K above M": (["AIR.K", "9"], "AIR.K"),
    "lambda": (["AIR.LAMBDA", "-1"], "AIR.LAMBDA"),
    "data set": (["DATASET.NAME", "Digit"], "Digits"),
    "data root": (["DATASET.ROOT", "nowhere/at/all"], "nowhere/at/all"),
    "input size": (["INPUT.SIZE", "(64, 64)"], "INPUT.SIZE"),
    "odd": (["AIR.M"], "AIR.M"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_code_2(
    name: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, named = BAD[name]
    args = arguments("AiR", data, tmp_path / "run")
    args = [*options, *args] if options[0].startswith("--") else [*args, *options]
    if options[0] == "--trainer":
        args = arguments("AiR", data, tmp_path / "run")
        args[args.index("--trainer") + 1] = options[1]
    assert train.main(args) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and named in error and error.count("\n") == 1


def test_a_truncated_image_is_named(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy_to_change(data / "digits", tmp_path / "digits", "images/0007.png")
    broken = tmp_path / "digits" / "images" / "0007.png"
    broken.write_bytes(broken.read_bytes()[:100])
    assert train.main(arguments("CPL", tmp_path, tmp_path / "run")) == 2
    error = capsys.readouterr().err
    assert "0007.png" in error and error.count("\n") == 1


def test_the_first_run_of_all_samples_the_same_shots(tmp_path: Path):
    """It writes the images before it chooses."""
    from datasets.digits import Digits

    options = ["DATASET.NUM_SHOTS", "2"]
    cfg, _ = train.set_up(train.parse(arguments("CoOp", tmp_path, tmp_path / "run", *options)))
    shots = []
    for _ in range(2):
        random.seed(3)
        shots.append([item.impath for item in Digits(cfg).train_x])
    assert len(shots[0]) == 20 and shots[0] == shots[1]


def test_a_run_without_data_leaves_no_unfinished_run(tmp_path: Path):
    options = arguments("ZeroshotCLIP", tmp_path / "nowhere", tmp_path / "run")
    assert train.main(options) == 2
    assert not (tmp_path / "run" / "settings.json").exists()
    claim(tmp_path / "run", settings_of(train.set_up(train.parse(options))[0]), Inputs())  # by a run that had begun
    assert train.main(options) == 2 and (tmp_path / "run" / "settings.json").exists()


def test_a_finished_run_leaves_a_bundle(finished: Callable[..., Path], data: Path):
    run = finished("ZeroshotCLIP")
    bundle = load_bundle(run / "bundle")
    said = json.loads((run / "predictions.json").read_text())
    labels = [
        bundle.classnames.index(one.label) for one in bundle.predict([data / path for path in said["images"][:20]])
    ]
    assert labels == said["heads"]["text"]["predicted"][:20]
