"""`air`: quick to start, and one line for whoever mistypes."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from itertools import takewhile
from pathlib import Path

import pytest
import torch
from small_models import SIDE, make_backbone, make_generator

import air_plugin
from air_plugin.auxiliary import build as build_module
from air_plugin.auxiliary.classifier import AuxiliaryClassifier
from air_plugin.cli import main, parse
from air_plugin.cli.report import named
from air_plugin.cli.stages import settings_of
from air_plugin.clip import loading
from air_plugin.clip.backbone import Backbone
from air_plugin.diffusion.lora import WEIGHTS
from air_plugin.inference import bundle as bundle_module
from air_plugin.inference.bundle import save_bundle

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "torchvision", "diffusers", "open_clip", "transformers", "peft", "sklearn", "matplotlib")


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT)


# What is imported


def test_help_imports_nothing_heavy():
    code = "\n".join(
        [
            "import sys",
            "from air_plugin.cli import main",
            "try: main(['--help'])",
            "except SystemExit as end: code = end.code",
            f"print('heavy:', code, [name for name in {HEAVY} if name in sys.modules])",
        ]
    )
    done = python(code)
    assert done.stderr == "" and done.stdout.endswith("heavy: 0 []\n")
    assert all(command in done.stdout for command in ("lora", "generate", "prototypes", "predict", "export", "report"))


def test_importing_the_library_imports_nothing_heavy():
    done = python(f"import sys, air_plugin; print([name for name in {HEAVY} if name in sys.modules])")
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_importing_its_modules_leaves_the_model_libraries_out():
    modules = ["auxiliary.build", "clip.loading", "clip.prompts", "clip.features", "inference.bundle", "inference.onnx"]
    modules += ["config", "mixin", "report.formats", "report.results", "utils.store", "diffusion.lora"]
    imports = ", ".join(f"air_plugin.{name}" for name in modules)
    heavy = [name for name in HEAVY if name != "torch"]
    done = python(f"import sys, {imports}; print([name for name in {heavy} if name in sys.modules])")
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_every_public_name_is_there():
    import air_plugin

    assert all(getattr(air_plugin, name) is not None for name in air_plugin.__all__)
    assert dir(air_plugin) == air_plugin.__all__
    with pytest.raises(AttributeError, match="no_such_name"):
        air_plugin.no_such_name  # noqa: B018


# The command line


def test_options_may_follow_the_flags():
    for order in (["pictures", "--classes", "names.txt"], ["--classes", "names.txt", "pictures"]):
        args = parse(["generate", *order, "AIR.M", "60", "AIR.LORA.LR", "1e-3"])
        assert (args.images, args.classes) == (Path("pictures"), Path("names.txt"))
        assert args.options == ["AIR.M", "60", "AIR.LORA.LR", "1e-3"]
    args = parse(["lora", "pictures", "--classes", "names.txt", "--seed", "3", "--store", "here"])
    assert (args.seed, args.store, args.options) == (3, Path("here"), [])


def test_report_takes_several_rows_and_columns():
    args = parse(["report", "output", "--dataset", "a", "b", "--dataset", "c", "--method", "CoOp, 4 shots", "--ci95"])
    assert (args.output, args.ci95) == (Path("output"), True)
    assert (args.dataset, args.method) == (["a", "b", "c"], ["CoOp, 4 shots"])
    args = parse(["report", "output"])
    assert (args.dataset, args.method, args.format, args.out, args.details) == ([], [], "github", None, False)


def test_the_module_itself_runs_and_fails_in_one_line(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "air_plugin.cli", "report", str(tmp_path)], capture_output=True, text=True, cwd=ROOT
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: no results in {tmp_path}\n"


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    path = tmp_path / "names.txt"
    path.write_text("dog\nannual_crop land\n\n  sea \n", encoding="utf-8")
    return path


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The small random models instead of the embedded ones, and options that fit them."""
    monkeypatch.setattr(loading, "load_backbone", lambda *_, **__: make_backbone())
    monkeypatch.setattr(build_module, "load_generator", lambda *_, **__: make_generator())
    options = {"SIZE": SIDE, "STEPS": 1, "M": 3, "K": 2, "LORA.STEPS": 2, "LORA.RANK": 2, "LORA.BATCH": 2}
    return [word for key, value in options.items() for word in (f"AIR.{key}", str(value))]


BAD = {
    "no such folder": (["generate", "nowhere", "--classes", "{classes}"], "nowhere is missing"),
    "no images": (["generate", "{empty}", "--classes", "{classes}"], "no images below"),
    "no such class file": (["generate", "{pictures}", "--classes", "nowhere.txt"], "nowhere.txt"),
    "a folder for classes": (["generate", "{pictures}", "--classes", "{empty}"], "cannot read"),
    "a picture for classes": (["generate", "{pictures}", "--classes", "{picture}"], "cannot read"),
    "no classes": (["generate", "{pictures}", "--classes", "{nothing}"], "names 0 classes"),
    "one class": (["lora", "{pictures}", "--classes", "{alone}"], "names 1 classes; it must name at least 2"),
    "a class twice": (["generate", "{pictures}", "--classes", "{twice}"], "names 'dog' twice"),
    "a template without a place": (["lora", "{pictures}", "--classes", "{braces}"], "the template in "),
    "a template option without a place": (
        ["lora", "{pictures}", "--classes", "{classes}", "DATASET.TEMPLATE", "photo"],
        "DATASET.TEMPLATE is 'photo'",
    ),
    "images where none are generated": (
        ["generate", "{pictures}", "--classes", "{classes}", "AIR.PROTOTYPES", "real"],
        "AIR.PROTOTYPES is real; it must be synthetic",
    ),
    "an adapter where none is trained": (
        ["lora", "{pictures}", "--classes", "{classes}", "AIR.LORA.ENABLED", "False"],
        "AIR.LORA.ENABLED is False; it must be True",
    ),
    "no place for a classifier of real images": (
        ["prototypes", "{pictures}", "--classes", "{classes}", "AIR.PROTOTYPES", "real"],
        "name the classifier's file by --out",
    ),
    "unknown key": (["lora", "{pictures}", "--classes", "{classes}", "AIR.LAMDA", "1"], "did you mean AIR.LAMBDA"),
    "half an option": (["lora", "{pictures}", "--classes", "{classes}", "AIR.M"], "no partner"),
    "a value out of range": (["lora", "{pictures}", "--classes", "{classes}", "AIR.K", "121"], "AIR.K is 121"),
    "an ill-typed value": (["lora", "{pictures}", "--classes", "{classes}", "AIR.M", "x"], "AIR.M is 'x'"),
    "no such config": (["lora", "{pictures}", "--classes", "{classes}", "--config", "no.yaml"], "unknown config file"),
    "unknown backbone": (
        ["lora", "{pictures}", "--classes", "{classes}", "MODEL.BACKBONE.NAME", "RN-50"],
        "unknown backbone 'RN-50'",
    ),
    "unknown generator": (
        ["lora", "{pictures}", "--classes", "{classes}", "AIR.GENERATOR", "mni"],
        "AIR.GENERATOR is 'mni'",
    ),
    "unknown precision": (
        ["lora", "{pictures}", "--classes", "{classes}", "TRAINER.PROMPT.PREC", "fp15"],
        "precision 'fp15'",
    ),
    "unknown device": (["lora", "{pictures}", "--classes", "{classes}", "--device", "gpu"], "gpu"),
    "no file to convert": (["convert", "ViT-B-32:{empty}/none.pt"], "none.pt"),
    "no architecture to convert": (["convert", "{picture}"], "ARCHITECTURE:FILE"),
    "no bundle": (["predict", "{empty}", "{pictures}"], "no bundle in"),
    "no bundle to export": (["export", "{empty}", "x.onnx"], "no bundle in"),
    "unknown device for a bundle": (["predict", "{empty}", "{pictures}", "--device", "gpu"], "gpu"),
    "no results": (["report", "{empty}"], "no results"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_line_and_exit_code_2(
    kind: str,
    classes: Path,
    pictures: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    arguments, said = BAD[kind]
    if "generator" in kind:
        monkeypatch.setattr(loading, "load_backbone", lambda *_, **__: make_backbone())
    (tmp_path / "empty").mkdir()
    (tmp_path / "nothing.txt").write_text("\n")
    (tmp_path / "twice.txt").write_text("dog\ncat\ndog\n")
    (tmp_path / "alone.txt").write_text("dog\n")
    (tmp_path / "braces.txt").write_text("dog\ncat\ntemplate: a photo\n")
    places = {
        "classes": classes,
        "empty": tmp_path / "empty",
        "pictures": Path(pictures[0]).parent,
        "picture": pictures[0],
        **{name: tmp_path / f"{name}.txt" for name in ("nothing", "twice", "alone", "braces")},
    }
    monkeypatch.chdir(tmp_path)
    assert main([argument.format(**places) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n") and said in err
    assert out == ""


def test_stages_run_once_and_say_where_their_artifacts_lie(
    small: list[str], classes: Path, pictures: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
):
    folder = str(Path(pictures[0]).parent)
    common = [folder, "--classes", str(classes), "--store", str(tmp_path / "store"), *small]
    assert main(["lora", *common]) == 0
    (adapter,) = (mark.parent for mark in (tmp_path / "store" / "lora").glob("*/entry.json"))
    assert f"adapter: {adapter}\n" in capsys.readouterr().out and (adapter / WEIGHTS).is_file()
    assert main(["generate", *common]) == 0
    assert "(9, 9 generated now)" in capsys.readouterr().out
    assert main(["prototypes", *common]) == 0
    out = capsys.readouterr().out
    (made,) = (mark.parent for mark in (tmp_path / "store" / "prototypes").glob("*/entry.json"))
    assert "(9, 0 generated now)" in out and f"prototypes: {made}\n" in out
    names = json.loads((made / "provenance.json").read_text())["classes"]
    assert names == ["dog", "annual_crop land", "sea"]
    assert f"classifier: {made / 'classifier.safetensors'}\n" in out
    head = AuxiliaryClassifier.load(made / "classifier.safetensors", classnames=names, backbone=make_backbone())
    assert head.weight.shape == (3, 24) and head.fusion_weight == 2.0
    card = head.card
    assert (card["lora"], card["seed"], card["template"]) == (adapter.name, 0, "a photo of a {}.")
    assert (card["generator_fingerprint"], card["form"]) == (make_generator().fingerprint, "softmax")


def test_the_classifier_goes_where_it_is_wanted(
    small: list[str], classes: Path, pictures: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
):
    out = tmp_path / "new folder" / "mine.safetensors"
    line = [
        str(Path(pictures[0]).parent),
        "--classes",
        str(classes),
        "--store",
        str(tmp_path / "store"),
        "--out",
        str(out),
        *small,
        "AIR.LORA.ENABLED",
        "False",
        "AIR.LAMBDA",
        "0.5",
    ]
    assert main(["prototypes", *line]) == 0
    assert f"classifier: {out}\n" in capsys.readouterr().out
    head = AuxiliaryClassifier.load(out)
    assert (head.fusion_weight, head.card["lora"]) == (0.5, None)


def test_rounds_are_those_of_a_whole_build(
    small: list[str], classes: Path, pictures: list[str], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch
):
    monkeypatch.setattr(build_module.Round, "stable", False)
    monkeypatch.setattr(build_module, "finalize", turned(build_module.finalize))  # other labels after each round
    common = [str(Path(pictures[0]).parent), "--classes", str(classes), "--store", str(tmp_path / "store"), *small]
    adapters = {}
    for command in ("lora", "prototypes"):
        for rounds in ("1", "2"):
            assert main([command, *common, "AIR.ROUNDS", rounds]) == 0
            out = capsys.readouterr().out
            adapters[command, rounds] = next(line for line in out.splitlines() if line.startswith("adapter: "))
            assert ("round 1: " in out) == (rounds == "2") and ("images: " in out) == (command == "prototypes")
    assert adapters["lora", "2"] == adapters["prototypes", "2"] != adapters["lora", "1"] == adapters["prototypes", "1"]


def turned(finalize):
    def other(*args, **options):
        classifier, posterior_probs, metrics = finalize(*args, **options)
        return classifier, posterior_probs.roll(1, dims=1), metrics

    return other


def test_real_images_need_no_generator(
    small: list[str], classes: Path, pictures: list[str], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch
):
    monkeypatch.setattr(build_module, "load_generator", lambda *_, **__: pytest.fail("a generator was loaded"))
    line = [str(Path(pictures[0]).parent), "--classes", str(classes), "--store", str(tmp_path / "store")]
    options = ["AIR.PROTOTYPES", "real", "AIR.AUXILIARY", "gaussian", "AIR.REFINE", "em"]
    assert main(["prototypes", *line, "--out", str(tmp_path / "x.safetensors"), *small, *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"classifier: {tmp_path / 'x.safetensors'}"
    assert all(line.startswith(("stage ", "classifier: ")) for line in lines)
    assert AuxiliaryClassifier.load(tmp_path / "x.safetensors").card["generator"] is None


@pytest.mark.parametrize(
    ("line", "options", "text", "generated"),
    [
        ("", [], "a photo of a {}.", "a photo of a {}."),
        ("template: my {}.", [], "my {}.", "my {}."),
        ("template: my {}.", ["DATASET.TEMPLATE", "no {}."], "no {}.", "no {}."),
        ("template: my {}.", ["AIR.PROMPT", "draw {}."], "my {}.", "draw {}."),
    ],
)
def test_the_template_line_is_the_prompt_unless_an_option_says_otherwise(
    small: list[str],
    pictures: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    line: str,
    options: list[str],
    text: str,
    generated: str,
):
    (tmp_path / "names.txt").write_text(f"dog\ncat\n{line}\n")
    texts: list[str] = []
    monkeypatch.setattr(Backbone, "encode_texts", lambda _, some: texts.extend(some) or torch.eye(24)[: len(some)])
    folder, store = str(Path(pictures[0]).parent), tmp_path / "store"
    command = ["prototypes", folder, "--classes", str(tmp_path / "names.txt"), "--store", str(store)]
    assert main([*command, *small, *options]) == 0
    assert texts == [text.format("dog"), text.format("cat")]
    (made,) = (store / "prototypes").glob("*/classifier.safetensors")
    assert AuxiliaryClassifier.load(made).card["template"] == generated


def test_offline_is_told_before_anything_is_loaded(
    small: list[str], classes: Path, pictures: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("AIR_OFFLINE", "0")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    seen: list[bool] = []

    def load(*_, **__):
        seen.append(loading.is_offline())
        return make_backbone()

    monkeypatch.setattr(loading, "load_backbone", load)
    line = ["lora", str(Path(pictures[0]).parent), "--classes", str(classes), "--store", str(tmp_path / "s"), *small]
    for flag in ([], ["--offline"]):
        assert main([*line, *flag]) == 0
    assert seen == [False, True]
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # go_offline told it, too


def test_without_lora_no_adapter_is_trained(
    small: list[str], classes: Path, pictures: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
):
    folder = str(Path(pictures[0]).parent)
    options = [*small, "AIR.LORA.ENABLED", "False"]
    assert main(["generate", folder, "--classes", str(classes), "--store", str(tmp_path / "store"), *options]) == 0
    assert "adapter:" not in capsys.readouterr().out and not (tmp_path / "store" / "lora").exists()


def test_a_trainers_config_is_read_for_its_settings(tmp_path: Path):
    config = tmp_path / "x.yaml"
    config.write_text("AIR: {M: 7, K: 3}\nOPTIM: {LR: 5}\nINPUT: {SIZE: 3}\nTRAINER: {PROMPT: {N_CTX: 4}}\n")
    cfg = settings_of(parse(["lora", "p", "--classes", "c", "--config", str(config), "--seed", "4", "AIR.K", "2"]))
    assert (cfg.AIR.M, cfg.AIR.K, cfg.TRAINER.PROMPT.N_CTX, cfg.SEED) == (7, 2, 4, 4)
    assert cfg.AIR.SIZE == 256  # nothing of the embedded generator's settings


def test_configs_are_merged_in_their_order(tmp_path: Path):
    (tmp_path / "x.yaml").write_text("AIR: {M: 7, K: 3, STEPS: 5}\n")
    (tmp_path / "y.yaml").write_text("AIR: {M: 8, K: 4}\nMODEL: {BACKBONE: {NAME: RN50}}\n")
    files = ["--config", str(tmp_path / "x.yaml"), "--config", str(tmp_path / "y.yaml")]
    cfg = settings_of(parse(["lora", "p", "--classes", "c", *files, "AIR.K", "2"]))
    assert (cfg.AIR.M, cfg.AIR.K, cfg.AIR.STEPS, cfg.MODEL.BACKBONE.NAME) == (8, 2, 5, "RN50")


def test_without_a_config_the_embedded_generators_settings_are_taken():
    cfg = settings_of(parse(["lora", "p", "--classes", "c", "AIR.M", "9"]))
    assert (cfg.AIR.GENERATOR, cfg.AIR.SIZE, cfg.AIR.LORA.RANK, cfg.AIR.M) == ("mini", 32, 16, 9)
    other = settings_of(parse(["lora", "p", "--classes", "c", "AIR.GENERATOR", "owner/model"]))
    assert (other.AIR.SIZE, other.AIR.GUIDANCE) == (256, 2.0)


def test_the_packaged_settings_are_those_of_the_configs():
    line = ["lora", "p", "--classes", "c", "--config", str(ROOT / "configs/generators/mini.yaml")]
    assert settings_of(parse(line)).AIR == settings_of(parse(["lora", "p", "--classes", "c"])).AIR


# Bundles


@pytest.fixture
def bundle(tmp_path: Path, tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle of the small random model, whose backbone is found by its name."""
    folder = tmp_path / "run" / "bundle"
    head = AuxiliaryClassifier.from_prototypes(unit(3, 4, 24), scale=9.0)
    save_bundle(
        folder,
        backbone=tiny_backbone,
        classnames=["dog", "sea lion", "cat"],
        text=unit(3, 24),
        auxiliary=head,
        primary="fused",
        card={"transduction": "none"},
    )
    monkeypatch.setattr(bundle_module, "load_backbone", lambda *_, **__: tiny_backbone)
    return folder


def unit(*shape: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(0)), dim=-1)


def test_predictions_are_a_line_an_image_and_nothing_else(
    bundle: Path, pictures: list[str], tiny_backbone: Backbone, capsys: pytest.CaptureFixture
):
    folder = Path(pictures[0]).parent
    loaded = bundle_module.load_bundle(bundle)
    for options, head in ((["--top", "2"], "fused"), (["--top", "2", "--head", "text", "--batch", "3"], "text")):
        assert main(["predict", str(bundle), str(folder), *options]) == 0
        out, err = capsys.readouterr()
        rows = [line.split("\t") for line in out.splitlines()]
        assert err == "" and [row[0] for row in rows] == pictures
        for row, one in zip(rows, loaded.predict(folder, top=2, head=head), strict=True):
            assert row[1::2] == [label for label, _ in one.top]
            assert [float(value) for value in row[2::2]] == pytest.approx([p for _, p in one.top], abs=2e-6)


def test_a_table_has_a_header_and_takes_any_name(
    bundle: Path, pictures: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
):
    folder = Path(pictures[0]).parent
    odd = [folder / name for name in ('a,"b".png', "c\td.png", "e\nf.png", "\u00fc .png", "z\udcff.png")]
    for path in odd:
        shutil.copy(pictures[0], path)
    assert main(["predict", str(bundle), str(folder), "--csv", str(tmp_path / "out" / "x.csv"), "--top", "9"]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'out' / 'x.csv'}\n"
    text = (tmp_path / "out" / "x.csv").read_bytes().decode("utf-8", "surrogateescape")
    header, *rows = csv.reader(io.StringIO(text))
    assert header == ["path", "label", "probability", "label_2", "probability_2", "label_3", "probability_3"]
    assert {row[0] for row in rows} == {*pictures, *map(str, odd)} and {len(row) for row in rows} == {7}
    odd[4].unlink()  # pytest cannot read it from stdout
    assert main(["predict", str(bundle), str(folder)]) == 0
    lines = list(csv.reader(io.StringIO(capsys.readouterr().out), delimiter="\t"))
    assert {row[0] for row in lines} == {*pictures, *map(str, odd[:4])} and {len(row) for row in lines} == {3}


def test_one_unreadable_image_among_many_is_a_warning_and_alone_an_error(
    bundle: Path, pictures: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
):
    folder, broken = Path(pictures[0]).parent, Path(pictures[3])
    broken.write_bytes(broken.read_bytes()[:60])
    assert main(["predict", str(bundle), str(folder)]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 6 and err.count("\n") == 1
    assert err.startswith("warning: ") and str(broken) in err
    assert main(["predict", str(bundle), str(broken), "--csv", str(tmp_path / "x.csv")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and str(broken) in err
    for path in pictures:
        Path(path).write_bytes(b"")
    assert main(["predict", str(bundle), str(folder), "--csv", str(tmp_path / "x.csv")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines()[-1] == "error: none of the 7 images could be read"
    assert not (tmp_path / "x.csv").exists()


@pytest.mark.parametrize("card", [{"transclip": True}, {"transduction": "transclip"}])  # the first one is of 0.1
def test_a_refined_runs_bundle_says_that_it_is_not(
    card: dict, bundle: Path, pictures: list[str], tiny_backbone: Backbone, capsys: pytest.CaptureFixture
):
    save_bundle(
        bundle,
        backbone=tiny_backbone,
        classnames=["a", "b"],
        text=unit(2, 24),
        auxiliary=None,
        primary="text",
        card=card,
    )
    assert main(["predict", str(bundle), pictures[0]]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and err.count("\n") == 1 and "transclip" in err
    assert main(["predict", str(bundle), pictures[0], "--head", "fused"]) == 2
    assert "no fused head" in capsys.readouterr().err


def test_a_bundle_is_exported(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main(["export", str(bundle), str(tmp_path / "x.onnx")]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'x.onnx'}\n" and (tmp_path / "x.onnx").stat().st_size > 1000


def test_a_full_disk_is_one_line(
    classes: Path, pictures: list[str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    import errno

    def full(*_, **__):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RuntimeError("writing failed") from error

    monkeypatch.setattr(loading, "load_backbone", full)
    assert main(["lora", str(Path(pictures[0]).parent), "--classes", str(classes)]) == 2
    assert capsys.readouterr().err.startswith("error: the disk is full")


def test_a_fault_of_ours_is_not_hidden(classes: Path, pictures: list[str], monkeypatch: pytest.MonkeyPatch):
    def broken(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(loading, "load_backbone", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["lora", str(Path(pictures[0]).parent), "--classes", str(classes)])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["lora", "pictures", "--classes", "c", "--sed", "3", "--what"], "--what"),
        (["report", "output", "AIR.M", "3"], "AIR.M"),
        (["report", "output", "--format", "pdf"], "pdf"),
        (["report", "--dataset", "digits"], "FOLDER"),
        (["predict", "bundle"], "IMAGE_OR_DIR"),
        (["predict", "bundle", "pictures", "--head", "best"], "best"),
        (["predict", "bundle", "pictures", "AIR.M", "3"], "AIR.M"),
        (["export", "bundle"], "FILE.onnx"),
        (["lora", "pictures"], "--classes"),
        (["lorra", "pictures"], "lorra"),
        ([], "COMMAND"),
    ],
)
def test_a_wrong_command_line_is_told_by_argparse(arguments: list[str], said: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as raised:
        parse(arguments)
    assert raised.value.code == 2 and said in capsys.readouterr().err


# Manners


def commands() -> list[str]:
    with pytest.raises(SystemExit), redirect_stdout(io.StringIO()) as shown:
        main(["--help"])
    return re.findall(r"^    (\w+) ", shown.getvalue(), re.MULTILINE)


def help_of(*words: str) -> str:
    with pytest.raises(SystemExit) as ended, redirect_stdout(io.StringIO()) as shown:
        main([*words, "--help"])
    assert ended.value.code == 0
    return shown.getvalue()


def test_every_help_has_an_example_that_the_parser_takes():
    assert {"lora", "predict", "report", "settings"} <= {*commands()}
    for command in ([], *([name] for name in commands())):
        text = help_of(*command)
        examples = re.findall(r"^  (air .+)$", text, re.MULTILINE)
        assert examples, command
        for example in examples:
            parse([*takewhile(lambda word: word != ">", shlex.split(example)[1:])])
        if command:
            assert all(example.split()[1] == command[0] for example in examples)


def test_every_flag_of_a_help_is_explained_and_has_its_default():
    assert "images a forward pass; default 64" in help_of("predict").replace("\n" + " " * 24, " ")
    flags = re.findall(r"^  (--?\w[^\n]*)\n(?=  -|\n)", help_of("predict") + help_of("lora"), re.MULTILINE)
    assert not [flag for flag in flags if not re.search(r"\S  +\S", flag)]


def test_the_main_help_lists_the_exit_codes():
    text = help_of()
    assert re.findall(r"^  (\d+) +\w", text, re.MULTILINE) == ["0", "1", "2", "130"]


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"air {air_plugin.__version__}\n"


def test_the_shell_completes_commands_and_flags(tmp_path: Path):
    def completions(line: str) -> list[str]:
        asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}
        # The answer goes to file descriptor 8, as the shell's function asks for it.
        code = "import os, sys; os.dup2(1, 8); from air_plugin.cli import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **asked}
        )
        return [word.strip() for word in done.stdout.splitlines()]

    assert completions("air pro") == ["prototypes"]
    assert completions("air predict --he") == ["--help", "--head"]


def test_a_report_is_found_by_its_name_in_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "output" / "digits").mkdir(parents=True)
    assert named(Path("digits")) == Path("output/digits") and named(Path("nowhere")) == Path("nowhere")
    (tmp_path / "digits").mkdir()
    assert named(Path("digits")) == Path("digits")
