"""The scripts, as a person types them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from runs import ROOT, SHORT, arguments, bash, figures, python_that_prints_its_arguments, script, weights
from shared import copy_to_change
from small_models import write_pictures

from scripts.compose import config_file
from scripts.experiments import Row
from scripts.run import list_runs


def test_main_script_runs_every_seed_prints_the_table_and_skips_what_is_complete(data: Path, tmp_path: Path) -> None:
    places = {"DATA": str(data), "OUTPUT": str(tmp_path / "out"), "SEEDS": "1 2"}
    first = script("scripts/air/main.sh", "digits", *SHORT, **places)
    assert first.returncode == 0, first.stderr
    table = first.stdout[first.stdout.index("| method") :]
    assert [line.split()[1] for line in table.splitlines()[2:5]] == ["ZeroshotCLIP", "CPL", "AiR"]
    assert "difference to CPL" in table
    digits = tmp_path / "out" / "digits"
    assert table.splitlines()[5:] == [f"page: {digits / 'AiR.html'}", f"results: {digits}"]
    assert (digits / "AiR.html").is_file()
    results = sorted((tmp_path / "out" / "digits").glob("*/*/seed*/result.json"))
    assert len(results) == 6  # zero-shot, CPL and AiR, two seeds each
    assert (tmp_path / "out" / "digits" / "gallery.png").is_file()
    prototypes = {json.loads(p.read_text())["seed"]: p for p in results if "AiR" in p.parts}
    assert set(prototypes) == {1, 2}
    assert len(list((tmp_path / "out" / "cache" / "lora").glob("*/entry.json"))) == 2  # one a seed

    written = {path: path.stat().st_mtime_ns for path in results}
    second = script("scripts/air/main.sh", "digits", *SHORT, **places)
    assert second.returncode == 0
    assert {p: p.stat().st_mtime_ns for p in results} == written
    assert second.stdout == f"6 of 6 runs were complete\n{table}"


@pytest.mark.full
def test_the_ablation_is_one_table_of_titled_rows_whatever_the_number_of_jobs(data: Path, tmp_path: Path) -> None:
    places = {"DATA": str(data), "SEEDS": "1"}
    fewer = [
        "DATASET.SUBSAMPLE_CLASSES",
        "base",
        "OPTIM.MAX_EPOCH",
        "2",
        "TRAINER.CPL.PER_CLASS",
        "8",
        "AIR.M",
        "3",
        "AIR.K",
        "1",
        "AIR.LORA.STEPS",
        "2",
    ]
    tables = []
    for jobs, run in (("1", script), ("2", bash)):
        output = tmp_path / f"out{jobs}"
        done = run("scripts/air/ablation.sh", "digits", *SHORT, *fewer, **places, OUTPUT=str(output), JOBS=jobs)
        assert done.returncode == 0, done.stderr
        tables.append(done.stdout[done.stdout.index("| method") :].replace(str(output), ""))
        assert "+ both, LoRA: AiR" in (output / "digits" / "ablation.html").read_text()
        named = json.loads((output / "digits" / "methods.json").read_text())
        assert [row["title"] for row in named][:2] == ["CPL", "+ auxiliary classifier, without LoRA"]
    assert len(set(tables)) == 1
    assert "difference to CPL" in tables[0]
    assert tables[0].count("| + both, LoRA: AiR") == 1


@pytest.mark.full
def test_a_run_that_fails_ends_the_others_with_its_line(data: Path, tmp_path: Path) -> None:
    copy_to_change(data / "digits", tmp_path / "digits", "images/0007.png")
    (tmp_path / "digits" / "images" / "0007.png").write_bytes(b"no picture")
    for jobs, run in (("1", script), ("2", bash)):
        places = {"DATA": str(tmp_path), "OUTPUT": str(tmp_path / jobs), "SEEDS": "1 2", "JOBS": jobs}
        done = run("scripts/cpl/main.sh", "digits", *SHORT, **places)
        assert done.returncode == 2 and "0007.png" in done.stderr and "Traceback" not in done.stderr


def test_coops_six_arguments(data: Path, tmp_path: Path) -> None:
    places = {"DATA": str(data), "OUTPUT": str(tmp_path / "out"), "SEEDS": "1"}
    done = script(
        "scripts/coop/main.sh", "digits", "mini", "middle", "4", "2", "True", "OPTIM.MAX_EPOCH", "2", **places
    )
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "out").glob("digits/CoOp/*/seed1/result.json")
    settings = json.loads(path.read_text())["provenance"]["settings"]
    assert settings["TRAINER.PROMPT.CLASS_TOKEN_POSITION"] == "middle" and settings["TRAINER.PROMPT.CSC"] is True
    assert settings["TRAINER.PROMPT.N_CTX"] == 4 and settings["DATASET.NUM_SHOTS"] == 2
    few = script("scripts/coop/main.sh", "digits", "mini", "middle", "4", **places)
    assert few.returncode == 2 and "SHOTS" in few.stderr and few.stderr.count("\n") == 1


def test_options_that_change_nothing_are_the_same_run(data: Path, tmp_path: Path) -> None:
    places = {"DATA": str(data), "OUTPUT": str(tmp_path / "out"), "SEEDS": "1"}
    for options in ([], ["TRAINER.CPL.ALPHA", "0.60"], ["TRAINER.CPL.LOSS", "cc"]):
        assert script("scripts/cpl/main.sh", "digits", *SHORT, *options, **places).returncode == 0
    assert len(list((tmp_path / "out").glob("digits/CPL/*"))) == 1


def test_targets_are_run_one_after_another_until_one_fails(tmp_path: Path) -> None:
    places = {"PATH": python_that_prints_its_arguments(tmp_path / "calm"), "TARGETS": ""}
    sets = ["digits_inverted", "digits_rotated", "digits_noisy"]
    done = bash("scripts/air/targets.sh", **places)
    assert done.stdout.splitlines() == [f"<--experiment><targets><{name}>" for name in sets] and done.returncode == 0
    words = ["vit_b32+plus", "DATASET.TEMPLATE", "a photo of {}."]
    done = bash("scripts/air/targets.sh", *words, **{**places, "TARGETS": "digits dtd"})
    behind = "<vit_b32+plus><DATASET.TEMPLATE><a photo of {}.>"
    assert done.stdout.splitlines() == [f"<--experiment><targets><{name}>{behind}" for name in ("digits", "dtd")]
    failing = {"PATH": python_that_prints_its_arguments(tmp_path / "fails", fails_at=sets[1]), "TARGETS": ""}
    done = bash("scripts/air/targets.sh", **failing)
    assert len(done.stdout.splitlines()) == 2 and done.returncode == 2


def test_bad_names_and_places(tmp_path: Path) -> None:
    for args, environment, named in (
        (("digit",), {}, "digits"),
        (("digits", "minni"), {}, "mini"),
        (("digits",), {"DATA": str(tmp_path / "missing")}, "missing"),
        (("digits",), {"SEEDS": "one"}, "SEEDS"),
        (("digits",), {"JOBS": "0"}, "JOBS"),
    ):
        done = script("scripts/air/main.sh", *args, **{"OUTPUT": str(tmp_path), "DATA": str(tmp_path), **environment})
        assert done.returncode == 2
        assert done.stderr.startswith("error: ") and named in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["AIR.K", "61"], "AIR.K is 61; it must be at most AIR.M = 60"),
        (["AIR.FILTER_TOP", "2", "AIR.PROTOTYPES", "real"], "AIR.FILTER_TOP is 2; it must be 0"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_before_the_controls_run(
    data: Path, tmp_path: Path, options: list[str], says: str
) -> None:
    places = {"DATA": str(data), "OUTPUT": str(tmp_path / "out"), "SEEDS": "1"}
    done = script("scripts/air/main.sh", "digits", "mini", *options, **places)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {says}") and done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("out/**/result.json"))


def test_an_experiment_without_a_row_that_can_be_run_ends_with_one_line(tmp_path: Path) -> None:
    """All rows of drop_in learn from labels, which a person's folder lacks."""
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    (tmp_path / "train").mkdir()
    places = {"DATA": str(tmp_path), "OUTPUT": str(tmp_path / "out"), "SEEDS": "1"}
    done = script("scripts/air/drop_in.sh", "folder", "mini", **places)
    assert done.returncode == 2
    assert done.stdout.count("left out: CoOp") == 6 and done.stdout.count("needs training labels") == 6
    assert done.stderr == "error: nothing can be run on folder: every row was left out\n"
    assert not (tmp_path / "out").exists()


def test_visual_rows_of_a_backbone_without_a_vision_transformer_are_left_out_before_anything_runs(
    data: Path, tmp_path: Path
) -> None:
    """Zero-shot trains no prompts, so that MODALITY leaves it as it is."""
    (tmp_path / "paper.yaml").write_text(
        "baseline: zero-shot\n"
        "rows:\n"
        "  - {title: zero-shot, trainer: ZeroshotCLIP}\n"
        "  - {title: 'zero-shot, visual', trainer: ZeroshotCLIP, options: {TRAINER.PROMPT.MODALITY: visual}}\n"
        "  - {title: VPT, trainer: CPL, options: {TRAINER.PROMPT.MODALITY: visual}}\n"
        "  - {title: UPT, trainer: CPL, options: {TRAINER.PROMPT.MODALITY: multimodal}}\n"
    )
    places = {"DATA": str(data), "OUTPUT": str(tmp_path / "out"), "SEEDS": "1"}

    def from_here(folder: str, name: str, kind: str) -> Path:
        return tmp_path / "paper.yaml" if folder == "experiments" else config_file(folder, name, kind)

    with mock.patch("scripts.experiments.config_file", from_here):
        done = script("scripts/paper.sh", "digits", "mini", **places)
    assert done.returncode == 0, done.stderr
    left_out = (
        "left out: VPT; UPT: visual prompts need a vision transformer, and CONFIG mini has none; "
        "take for instance mini_vit, vit_b32 or vit_b16\n"
    )
    assert done.stdout.startswith(left_out) and done.stdout.count("left out") == 1
    rows = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("|")]
    assert rows[2:] == ["zero-shot", "zero-shot, visual"]


def test_a_methods_script_with_visual_prompts_and_no_vision_transformer_ends_before_its_controls_run(
    tmp_path: Path, data: Path
) -> None:
    places = {"DATA": str(data), "OUTPUT": str(tmp_path / "out"), "SEEDS": "1"}
    done = script("scripts/air/main.sh", "digits", "mini", "TRAINER.PROMPT.MODALITY", "visual", **places)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "visual prompts need a vision transformer, and CONFIG mini has none" in done.stderr
    assert not list(tmp_path.glob("out/**/result.json"))


@pytest.mark.parametrize("has_labels", [True, False])
def test_rows_with_batches_of_few_classes_are_left_out_where_there_are_no_test_labels(
    tmp_path: Path, has_labels: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    for place in ("train", "test/cat", "test/dog") if has_labels else ("train",):
        write_pictures(tmp_path / place, 2)
    batches = ["TRAINER.TRANSDUCTION.METHOD", "stata", "TRAINER.TRANSDUCTION.CLASSES_PER_BATCH", "1"]
    options = [[], batches, batches[2:], [*batches, "TRAINER.TRANSDUCTION.ON", "unlabelled"]]
    rows = [Row("ZeroshotCLIP", given, f"row {number}") for number, given in enumerate(options)]
    with mock.patch.dict(os.environ, {"DATA": str(tmp_path), "OUTPUT": str(tmp_path / "out"), "SEEDS": "1"}):
        runs, _ = list_runs(rows, "folder", "mini")
    assert [run.name.split(" / ")[1] for run in runs] == [f"row {row}" for row in range(4) if has_labels or row != 1]
    assert capsys.readouterr().out == ("" if has_labels else "left out: row 1, which needs test labels\n")


@pytest.mark.parametrize(("key", "name"), [("SEED", "SEEDS"), ("OUTPUT_DIR", "OUTPUT")])
def test_what_the_scripts_set_themselves_is_no_option(tmp_path: Path, key: str, name: str) -> None:
    places = {"DATA": str(tmp_path), "OUTPUT": str(tmp_path / "out"), "SEEDS": "1"}
    done = script("scripts/zeroshot/main.sh", "digits", "mini", key, "5", **places)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"{key} is no option of the scripts; set the environment's {name}" in done.stderr


@pytest.mark.full
def test_runs_side_by_side_one_after_another_and_alone_are_the_same(data: Path, tmp_path: Path) -> None:
    """Whatever process a run has, and whichever run was there before: equal weights and results, bit for bit."""
    short = [*SHORT, "AIR.LAMBDA", "auto"]
    for jobs, run in (("1", script), ("2", bash)):
        places = {"DATA": str(data), "OUTPUT": str(tmp_path / jobs), "SEEDS": "1 2", "JOBS": jobs}
        done = run("scripts/air/main.sh", "digits", *short, **places)
        assert done.returncode == 0, done.stderr
    folders = [path.parent for path in sorted((tmp_path / "1").glob("digits/*/*/seed*/result.json"))]
    assert len(folders) == 6
    for folder in folders:
        beside = tmp_path / "2" / folder.relative_to(tmp_path / "1")
        assert figures(folder) == figures(beside)
        if (folder / "prompt_learner").exists():
            assert torch.equal(weights(folder)["ctx"], weights(beside)["ctx"])
            assert (folder / "bundle/heads.safetensors").read_bytes() == (
                beside / "bundle/heads.safetensors"
            ).read_bytes()
    for trainer, seed in (("CPL", 2), ("AiR", 1)):
        alone = tmp_path / "alone" / trainer
        line = arguments(trainer, data, alone, *short, seed=seed)
        subprocess.run([sys.executable, str(ROOT / "train.py"), *line], check=True, capture_output=True)
        (folder,) = (tmp_path / "2" / "digits" / trainer).glob(f"*/seed{seed}")
        same = {**figures(alone), "config": figures(folder)["config"]}
        assert same == figures(folder)
        assert torch.equal(weights(alone)["ctx"], weights(folder)["ctx"])
