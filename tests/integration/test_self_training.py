"""CoOp, UPL, CPL and AiR over both: rounds, ensembles, losses, and what may not change any of them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import arguments, figures, weights
from safetensors.torch import load_file, save_file
from shared import copy_to_change

import train
from air_plugin.former_settings import ROUND_TENSORS
from trainers.self_training import SelfTraining
from trainers.transduction import stream

Finished = Callable[..., Path]


def run(trainer: str, data: Path, output: Path, cache: str, *options: str) -> Path:
    assert train.main(arguments(trainer, data, output, "AIR.CACHE", cache, *options)) == 0
    return output


def result(output: Path) -> dict[str, Any]:
    return json.loads((output / "result.json").read_text())


ITERATIVE = ["TRAINER.PROMPT.ROUNDS", "3", "OPTIM.MAX_EPOCH", "2", "TRAIN.CHECKPOINT_FREQ", "1"]
LABELERS = {"UPL": [], "CPL": [], "AiR": [], "AiR over UPL": ["TRAINER.AIR.LABELER", "UPL"]}


@pytest.mark.parametrize("name", LABELERS)
def test_rounds_grow_and_are_counted_one_by_one(name: str, finished: Finished) -> None:
    output = finished(name.split()[0], *ITERATIVE, *LABELERS[name])
    rounds = result(output)["rounds"]
    assert len(rounds) == 3 and rounds[-1] == result(output)["pseudo_labels"]
    for number, summary in enumerate(rounds, start=1):
        saved = load_file(output / "rounds" / f"{number}.safetensors")
        share = number * 333 // 10  # int(t * int(N / R) / C)
        assert summary["selected"] == len(saved["index"]) and 0 < summary["accuracy"] <= 100
        assert len(saved["index"]) <= 10 * share
        assert saved["mask"].gather(1, saved["top1"][:, None]).all()
        assert ("labels" in saved) == (number == 1 and "UPL" not in name)  # soft in CPL's first round alone
        if "UPL" in name:
            assert torch.equal(saved["mask"].sum(dim=1), torch.ones(len(saved["mask"])))
            assert int(saved["mask"].sum(dim=0).max()) <= share
    assert rounds[0]["selected"] < rounds[2]["selected"]
    assert len(list((output / "prompt_learner").glob("model.pth.tar-*"))) == 6


@pytest.mark.public_reports
@pytest.mark.parametrize("options", [[], ["TRAINER.CPL.LOSS", "rc"]])
def test_the_first_round_of_the_iterative_form_has_soft_labels(options: list[str], finished: Finished) -> None:
    output = finished("CPL", *ITERATIVE, *SEVERAL, *options)
    saved = load_file(output / "rounds" / "1.safetensors")
    labels, mask = saved["labels"], saved["mask"].bool()
    assert torch.equal(labels > 0, mask) and torch.allclose(labels.sum(dim=1), torch.ones(len(labels)))
    several = mask.sum(dim=1) > 1
    assert several.any() and (labels[several].amax(dim=1) < 1).all()
    assert "labels" not in load_file(finished("CPL", *SEVERAL) / "rounds" / "1.safetensors")


SEVERAL = ["TRAINER.CPL.ALPHA", "0.95", "TRAINER.CPL.BETA", "0.5"]  # candidate sets of several classes


class Killed(Exception):
    pass


@pytest.mark.parametrize(("epoch", "former"), [(2, False), (3, False), (5, False), (4, True)])
def test_a_kill_in_any_round_changes_nothing(
    epoch: int,
    former: bool,
    finished: Finished,
    data: Path,
    cache: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`former`: the rounds are as version 0.1 wrote them."""
    options = [*ITERATIVE[:4], "TRAIN.CHECKPOINT_FREQ", "0" if epoch == 3 else "1"]
    whole = finished("CPL", *options)
    run_epoch = SelfTraining.run_epoch

    def until(self: SelfTraining) -> None:
        if self.epoch == epoch:
            raise Killed
        run_epoch(self)

    arguments_ = arguments("CPL", data, tmp_path / "cut", "AIR.CACHE", cache, *options)
    with monkeypatch.context() as patch:
        patch.setattr(SelfTraining, "run_epoch", until)
        with pytest.raises(Killed):
            train.main(arguments_)
    assert not (tmp_path / "cut" / "result.json").exists()
    for path in (tmp_path / "cut" / "rounds").glob("*.safetensors") if former else ():
        names = {new: old for old, new in ROUND_TENSORS.items()}
        save_file({names.get(name, name): tensor for name, tensor in load_file(path).items()}, path)
    begun: list[int] = []

    def watched(self: SelfTraining) -> None:
        begun.append(self.epoch)
        run_epoch(self)

    monkeypatch.setattr(SelfTraining, "run_epoch", watched)
    assert train.main(arguments_) == 0
    assert begun[0] == (2 if epoch == 3 else epoch)  # without checkpoints inside a round: from the round's beginning
    first, second = weights(whole), weights(tmp_path / "cut")
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert figures(whole) == figures(tmp_path / "cut")


def test_a_lost_round_is_named(
    finished: Finished, data: Path, cache: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = copy_to_change(finished("CPL", *ITERATIVE), tmp_path / "run", "log.txt", "rounds/2.safetensors")
    (output / "result.json").unlink()
    broken = output / "rounds" / "2.safetensors"
    broken.write_bytes(broken.read_bytes()[:50])
    assert train.main(arguments("CPL", data, output, "AIR.CACHE", cache, *ITERATIVE)) == 2
    error = capsys.readouterr().err
    assert "2.safetensors" in error and error.count("\n") == 1


def test_every_loss_of_cpl_trains_and_each_in_its_own_way(finished: Finished) -> None:
    outputs = [finished("CPL", *SEVERAL, "TRAINER.CPL.LOSS", name) for name in ("cc", "rc", "lw", "cav")]
    assert all(result(output)["pseudo_labels"]["candidates"] > 1.2 for output in outputs)
    for one, other in itertools.combinations(outputs, 2):
        assert not torch.equal(weights(one)["ctx"], weights(other)["ctx"])


def test_lagging_weights_survive_a_resume(
    finished: Finished, data: Path, cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*SEVERAL, "TRAINER.CPL.LOSS", "rc"]
    whole = finished("CPL", *options)
    run_epoch = SelfTraining.run_epoch

    def until(self: SelfTraining) -> None:
        if self.epoch == 2:
            raise Killed
        run_epoch(self)

    with monkeypatch.context() as patch:
        patch.setattr(SelfTraining, "run_epoch", until)
        with pytest.raises(Killed):
            train.main(arguments("CPL", data, tmp_path / "cut", "AIR.CACHE", cache, *options))
    cut = run("CPL", data, tmp_path / "cut", cache, *options)
    assert torch.equal(weights(whole)["ctx"], weights(cut)["ctx"])


def test_gamma_is_another_way_to_say_beta(finished: Finished) -> None:
    with_beta = finished("CPL", "TRAINER.CPL.BETA", "0.85")
    with_gamma = finished("CPL", "TRAINER.CPL.GAMMA", "1.5")  # 10 (1 - 0.85)
    assert torch.equal(weights(with_beta)["ctx"], weights(with_gamma)["ctx"])


def test_an_ensemble_averages_prompts_of_several_seeds(finished: Finished) -> None:
    ensemble, single = finished("UPL", "TRAINER.PROMPT.ENSEMBLE", "3"), finished("UPL")
    contexts = [weights(ensemble)[f"members.{member}.ctx"] for member in range(3)]
    assert torch.allclose(contexts[0], weights(single)["ctx"], atol=1e-4)  # the first member is the single prompt
    assert not torch.allclose(contexts[0], contexts[1], atol=1e-4)


def with_permuted_labels(data: Path, target: Path) -> Path:
    """A copy of the data root in which every training image has another one's label."""
    copy_to_change(data / "digits", target / "digits", "split.json")
    items = json.loads((target / "digits" / "split.json").read_text())
    labels = [item[1:] for item in items["train"]]
    items["train"] = [[item[0], *label] for item, label in zip(items["train"], labels[::-1], strict=True)]
    (target / "digits" / "split.json").write_text(json.dumps(items))
    return target


BLIND = {
    "CPL": ("CPL", []),
    "AiR": ("AiR", []),
    "UPL": ("UPL", []),
    "UPL, ensemble": ("UPL", ["TRAINER.PROMPT.ENSEMBLE", "2"]),
    "CPL, iterative": ("CPL", ITERATIVE),
    "AiR over UPL, iterative": ("AiR", [*ITERATIVE, "TRAINER.AIR.LABELER", "UPL"]),
    "AiR, real prototypes": ("AiR", ["AIR.PROTOTYPES", "real"]),
    "CPL, rc": ("CPL", ["TRAINER.CPL.LOSS", "rc"]),
}


@pytest.mark.parametrize("name", BLIND)
def test_hidden_labels_change_no_bit_of_the_weights(
    name: str, finished: Finished, data: Path, cache: str, tmp_path: Path
) -> None:
    trainer, options = BLIND[name]
    first = finished(trainer, *options)
    second = run(trainer, with_permuted_labels(data, tmp_path / "data"), tmp_path / "permuted", cache, *options)
    left, right = weights(first), weights(second)
    assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
    assert result(first)["heads"] == result(second)["heads"]
    assert result(first)["pseudo_labels"]["accuracy"] != result(second)["pseudo_labels"]["accuracy"]


def test_coop_uses_labels_and_no_more_shots_than_it_was_given(
    finished: Finished, data: Path, cache: str, tmp_path: Path
) -> None:
    options = ["DATASET.NUM_SHOTS", "4", "OPTIM.MAX_EPOCH", "20"]
    true = finished("CoOp", *options)
    wrong = run("CoOp", with_permuted_labels(data, tmp_path / "data"), tmp_path / "wrong", cache, *options)
    assert result(true)["heads"]["text"]["accuracy"] > result(wrong)["heads"]["text"]["accuracy"] + 10
    assert result(true)["pseudo_labels"]["selected"] == 0


def test_controls_without_training(finished: Finished) -> None:
    transclip = ["TRAINER.TRANSDUCTION.METHOD", "transclip"]
    plain, refined = result(finished("ZeroshotCLIP")), result(finished("ZeroshotCLIP", *transclip))
    fused, both = result(finished("ZeroshotAiR")), result(finished("ZeroshotAiR", *transclip))
    assert fused["primary"] == "fused" and plain["primary"] == "text"
    assert fused["heads"]["text"] == plain["heads"]["text"]
    assert both["heads"]["text"] == refined["heads"]["text"] != plain["heads"]["text"]
    assert both["heads"]["fused"] != fused["heads"]["fused"]
    assert dict(map(tuple, fused["by_lambda"]))[0.0] == pytest.approx(plain["heads"]["text"]["accuracy"])
    assert dict(map(tuple, fused["by_lambda"]))[2.0] == pytest.approx(fused["heads"]["fused"]["accuracy"])
    assert both["by_lambda"] == []  # would be of another head
    assert not (finished("ZeroshotAiR") / "prompt_learner").exists()


METHOD, ON, ANCHORS = (f"TRAINER.TRANSDUCTION.{key}" for key in ("METHOD", "ON", "ANCHORS"))


@pytest.mark.parametrize(
    "options",
    [
        [METHOD, "transclip"],
        [METHOD, "stata"],
        [METHOD, "stata", ANCHORS, "images"],
        [METHOD, "zlap", ANCHORS, "images"],
    ],
)
def test_rivals_refine_every_head(options: list[str], finished: Finished) -> None:
    """ON unlabelled: fitted to these images, so that test images are classified one by one."""
    plain = result(finished("ZeroshotAiR"))["heads"]
    together, alone = (result(finished("ZeroshotAiR", *options, ON, on))["heads"] for on in ("test", "unlabelled"))
    for name in ("text", "fused"):
        assert plain[name] != together[name] != alone[name] != plain[name]
        assert min(together[name]["accuracy"], alone[name]["accuracy"]) > 50  # of ten classes


def test_batches_of_few_classes_are_refined_by_themselves(finished: Finished) -> None:
    plain = result(finished("ZeroshotCLIP", METHOD, "stata"))["heads"]
    few = result(finished("ZeroshotCLIP", METHOD, "stata", "TRAINER.TRANSDUCTION.CLASSES_PER_BATCH", "2"))["heads"]
    assert few != plain and few["text"]["accuracy"] > 50


def test_a_stream_has_every_image_once_and_few_classes_a_batch() -> None:
    labels = torch.arange(100) % 7
    batches = stream(labels, classes=3, size=8, seed=1)
    assert torch.cat(batches).sort().values.tolist() == list(range(100))
    assert all(len(batch) <= 8 and len(set(labels[batch].tolist())) <= 3 for batch in batches)
    assert max(len(set(labels[batch].tolist())) for batch in batches) > 1
    again, other = (torch.cat(stream(labels, classes=3, size=8, seed=seed)).tolist() for seed in (1, 2))
    assert again == torch.cat(batches).tolist() != other


def test_anchors_of_images_need_an_auxiliary_classifier(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    options = [METHOD, "stata", ANCHORS, "images"]
    assert train.main(arguments("ZeroshotCLIP", data, tmp_path / "run", *options)) == 2
    assert "ZeroshotCLIP has no auxiliary classifier" in capsys.readouterr().err


def test_fewer_images_a_class_are_taken_from_more(data: Path, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    run("ZeroshotAiR", data, tmp_path / "four", cache, "AIR.M", "4")
    fewer = result(run("ZeroshotAiR", data, tmp_path / "three", cache, "AIR.M", "3"))
    assert {stage["name"]: stage["cached"] for stage in fewer["stages"]}["generation"] is True
    alone = result(run("ZeroshotAiR", data, tmp_path / "alone", str(tmp_path / "other"), "AIR.M", "3"))
    assert fewer["heads"] == alone["heads"]


@pytest.mark.parametrize("auxiliary", ["cosine", "gaussian"])
def test_filtered_images_make_another_classifier(auxiliary: str, finished: Finished) -> None:
    options = ["AIR.AUXILIARY", auxiliary, "AIR.LORA.ENABLED", "False"]
    plain, same, other = (
        result(finished("ZeroshotAiR", *options, "AIR.FILTER_TOP", top))["heads"] for top in ("0", "10", "1")
    )
    assert plain == same  # of ten classes each is among the first ten
    assert plain["text"] == other["text"] and plain["fused"] != other["fused"]


def test_real_prototypes_need_no_generator(data: Path, tmp_path: Path) -> None:
    output = run("AiR", data, tmp_path / "real", str(tmp_path / "cache"), "AIR.PROTOTYPES", "real")
    assert not (tmp_path / "cache" / "images").exists() and not (tmp_path / "cache" / "lora").exists()
    assert (output / "gallery.png").is_file()
    assert "generation" not in [stage["name"] for stage in result(output)["stages"]]


def test_predictions_agree_with_the_result(finished: Finished) -> None:
    output = finished("AiR")
    said = json.loads((output / "predictions.json").read_text())
    assert len(said["images"]) == len(said["labels"]) == 797
    assert all((Path(said["root"]) / image).is_file() for image in said["images"])
    for name, head in result(output)["heads"].items():
        right = [p == t for p, t in zip(said["heads"][name]["predicted"], said["labels"], strict=True)]
        assert 100 * sum(right) / len(right) == pytest.approx(head["accuracy"])
        assert all(0 <= value <= 1 for value in said["heads"][name]["confidence"])


BAD = {
    "labeler": (["TRAINER.AIR.LABELER", "FPL"], "TRAINER.AIR.LABELER"),
    "loss": (["TRAINER.CPL.LOSS", "dd"], "TRAINER.CPL.LOSS"),
    "prototypes": (["AIR.PROTOTYPES", "web"], "AIR.PROTOTYPES"),
    "rounds": (["TRAINER.PROMPT.ROUNDS", "0"], "TRAINER.PROMPT.ROUNDS"),
    "ensemble": (["TRAINER.PROMPT.ENSEMBLE", "0"], "TRAINER.PROMPT.ENSEMBLE"),
    "gamma": (["TRAINER.CPL.GAMMA", "-1"], "TRAINER.CPL.GAMMA"),
    "ensemble with lagging weights": (["TRAINER.PROMPT.ENSEMBLE", "2", "TRAINER.CPL.LOSS", "rc"], "TRAINER.CPL.LOSS"),
    "epochs": (["OPTIM.MAX_EPOCH", "0"], "OPTIM.MAX_EPOCH"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_are_one_line_and_exit_code_2(
    name: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, named = BAD[name]
    assert train.main([*arguments("AiR", data, tmp_path / "run"), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and named in error and error.count("\n") == 1
