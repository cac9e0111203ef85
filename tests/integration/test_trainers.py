"""Each trainer end to end, briefly, in this process."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import ROOT, arguments, figures, weights

import train
from air_plugin.clip import backbone as backbone_module
from air_plugin.inference.bundle import load_bundle


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of AiR, looked at by several tests."""
    output = tmp_path_factory.mktemp("finished") / "AiR" / "mini" / "seed1"
    assert train.main(arguments("AiR", data, output)) == 0
    return output


def test_result_says_what_issue_a_promises(finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
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
        assert (finished / name).is_file()


def test_the_log_has_the_lines_that_scripts_parse(finished: Path) -> None:
    log = (finished / "log.txt").read_text()
    result = json.loads((finished / "result.json").read_text())
    after = log[log.index("Finish training") :]
    last = [line for line in after.splitlines() if line.startswith("* accuracy:")][-1]
    assert last == f"* accuracy: {result['heads'][result['primary']]['accuracy']:.1f}%"


def test_a_complete_run_is_not_run_again(finished: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / "result.json").stat().st_mtime_ns
    assert train.main(arguments("AiR", data, finished)) == 0
    assert "complete" in capsys.readouterr().out
    assert (finished / "result.json").stat().st_mtime_ns == before


def test_other_settings_do_not_pass_for_a_finished_run(
    finished: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(arguments("AiR", data, finished, "AIR.LAMBDA", "1")) == 2
    error = capsys.readouterr().err
    assert "AIR.LAMBDA" in error and error.count("\n") == 1


def test_evaluation_alone_gives_the_same_figures(
    finished: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = str(finished / "cache")
    args = arguments("AiR", data, tmp_path / "eval", "AIR.CACHE", cache)
    assert train.main(["--eval-only", "--model-dir", str(finished), *args]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("* accuracy:")]
    heads = json.loads((finished / "result.json").read_text())["heads"]
    assert lines == [f"* accuracy: {heads[name]['accuracy']:.1f}%" for name in ("fused", "text")] or lines == [
        f"* accuracy: {heads[name]['accuracy']:.1f}%" for name in ("text", "fused")
    ]


def test_checkpoint_of_other_classes_is_refused(
    finished: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import digits

    monkeypatch.setattr(digits, "CLASSES", [name.upper() for name in digits.CLASSES])
    args = arguments("CPL", data, tmp_path / "eval")
    assert train.main(["--eval-only", "--model-dir", str(finished), *args]) == 2
    error = capsys.readouterr().err
    assert "other classes" in error and error.count("\n") == 1


def permute_training_labels(data: Path) -> None:
    split = data / "digits" / "split.json"
    items = json.loads(split.read_text())
    labels = [item[1:] for item in items["train"]]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).tolist()
    items["train"] = [[item[0], *labels[i]] for item, i in zip(items["train"], order, strict=True)]
    split.write_text(json.dumps(items))


@pytest.mark.parametrize("trainer", ["CPL", "AiR"])
def test_hidden_labels_change_no_bit_of_the_weights(trainer: str, data: Path, tmp_path: Path) -> None:
    blind = tmp_path / "data"
    from datasets.digits import write_digits

    write_digits(blind / "digits")
    assert train.main(arguments(trainer, blind, tmp_path / "true")) == 0
    permute_training_labels(blind)
    assert train.main(arguments(trainer, blind, tmp_path / "permuted")) == 0
    first, second = weights(tmp_path / "true"), weights(tmp_path / "permuted")
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    left, right = figures(tmp_path / "true"), figures(tmp_path / "permuted")
    assert left["pseudo_labels"]["accuracy"] != right["pseudo_labels"]["accuracy"]  # the labels did change
    assert left["heads"] == right["heads"]


def test_no_image_is_encoded_inside_an_epoch(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert train.main(arguments("CPL", data, tmp_path / "run")) == 0
    assert len(epochs) == 3


@pytest.mark.parametrize("form", ["consistency", "synthetic"])
def test_both_forms_of_the_regulariser_train(form: str, finished: Path, data: Path, tmp_path: Path) -> None:
    options = ["AIR.LS", form, "AIR.CACHE", str(finished / "cache")]
    assert train.main(arguments("AiR", data, tmp_path / "with", *options, "AIR.BETA", "5")) == 0
    assert train.main(arguments("AiR", data, tmp_path / "without", *options, "AIR.BETA", "0")) == 0
    assert not torch.equal(weights(tmp_path / "with")["ctx"], weights(tmp_path / "without")["ctx"])


def test_beta_auto_weighs_both_losses_by_how_right_their_labels_are(
    finished: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainers.air import AiR

    slow = []

    def watched(self: AiR, index: torch.Tensor, candidates: torch.Tensor) -> float:
        real = [self.zero_shot_probs[i][row].sum().item() for i, row in zip(index, candidates, strict=True)]
        generated = [
            self.backbone.text_probs(image[None], self.template_features)[0, label].item()
            for label, images in enumerate(self.auxiliary.prototypes)
            for image in images
        ]
        odds = [math.log(share / (1 - share)) for share in (sum(generated) / len(generated), sum(real) / len(real))]
        slow.append(odds[0] / odds[1])
        return chosen(self, index, candidates)

    chosen = AiR._choose_beta
    monkeypatch.setattr(AiR, "_choose_beta", watched)
    options = ["AIR.BETA", "auto", "AIR.CACHE", str(finished / "cache")]
    assert train.main(arguments("AiR", data, tmp_path / "auto", *options)) == 0
    beta = json.loads((tmp_path / "auto" / "result.json").read_text())["beta"]
    assert slow == [pytest.approx(beta, rel=1e-4)] and 0 < beta < 16
    assert not torch.equal(weights(tmp_path / "auto")["ctx"], weights(finished)["ctx"])


def test_zero_shot_trains_nothing(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "ZeroshotCLIP" / "mini" / "seed1"
    assert train.main(arguments("ZeroshotCLIP", data, output)) == 0
    assert not (output / "prompt_learner").exists()
    assert figures(output)["heads"]["text"]["accuracy"] > 30  # far above chance: the backbone reads digits


def test_a_class_without_pseudo_labels_is_named_and_training_goes_on(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainers.cpl import CPL

    def without_nine(self: CPL) -> torch.Tensor:
        probs = self.zero_shot_probs.clone()
        probs[:, 9] = 0
        return probs / probs.sum(dim=1, keepdim=True)

    monkeypatch.setattr(CPL, "pseudo_probs", without_nine)
    assert train.main(arguments("CPL", data, tmp_path / "run", "TRAINER.CPL.BETA", "0.99")) == 0
    assert "no pseudo-label for" in capsys.readouterr().out


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


def test_a_truncated_image_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from datasets.digits import write_digits

    write_digits(tmp_path / "digits")
    broken = tmp_path / "digits" / "images" / "0007.png"
    broken.write_bytes(broken.read_bytes()[:100])
    assert train.main(arguments("CPL", tmp_path, tmp_path / "run")) == 2
    error = capsys.readouterr().err
    assert "0007.png" in error and error.count("\n") == 1


def test_the_first_run_of_all_draws_the_same_shots(tmp_path: Path):
    script = """
import random, sys
sys.path.append("compat")
from datasets.digits import Digits
from dassl.config import get_cfg_default
from air_plugin.config import add_air_config
cfg = get_cfg_default()
add_air_config(cfg)
cfg.DATASET.ROOT, cfg.DATASET.NUM_SHOTS = sys.argv[1], 2
random.seed(3)
print([item.impath for item in Digits(cfg).train_x])
"""
    line = [sys.executable, "-c", script, str(tmp_path)]
    first, second = (subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True) for _ in range(2))
    assert first.stdout.splitlines()[-1] == second.stdout.splitlines()[-1]


def test_a_run_without_data_leaves_no_unfinished_run(tmp_path: Path):
    options = arguments("ZeroshotCLIP", tmp_path / "nowhere", tmp_path / "run")
    assert train.main(options) == 2
    assert not (tmp_path / "run" / "settings.json").exists()
    train.claim(tmp_path / "run", train.resolved(train.setup_config(train.parse(options))))  # by a run that had begun
    assert train.main(options) == 2 and (tmp_path / "run" / "settings.json").exists()


def test_a_finished_run_leaves_a_bundle(tmp_path: Path):
    assert train.main(arguments("ZeroshotCLIP", tmp_path, tmp_path / "run")) == 0
    bundle = load_bundle(tmp_path / "run" / "bundle")
    said = json.loads((tmp_path / "run" / "predictions.json").read_text())
    paths = [tmp_path / path for path in said["images"][:20]]
    labels = [bundle.classnames.index(one.label) for one in bundle.predict(paths)]
    assert labels == said["heads"]["text"]["predicted"][:20]
