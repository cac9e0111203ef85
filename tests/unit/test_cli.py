"""`air`: quick to start, and one line for whoever mistypes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from small_models import SIDE, make_backbone, make_generator

from air_plugin import backbone as backbone_module
from air_plugin.cli import main, parse
from air_plugin.diffusion import pipeline as pipeline_module
from air_plugin.diffusion.lora import WEIGHTS

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "torchvision", "diffusers", "open_clip", "transformers", "peft", "sklearn", "matplotlib")


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT)


# What is imported


def test_help_imports_nothing_heavy():
    code = "\n".join([
        "import sys",
        "from air_plugin.cli import main",
        "try: main(['--help'])",
        "except SystemExit as end: code = end.code",
        f"print('heavy:', code, [name for name in {HEAVY} if name in sys.modules])",
    ])  # fmt: skip
    done = python(code)
    assert done.stderr == "" and done.stdout.endswith("heavy: 0 []\n")
    assert all(command in done.stdout for command in ("lora", "generate", "prototypes", "report"))


def test_importing_the_library_imports_nothing_heavy():
    done = python(f"import sys, air_plugin; print([name for name in {HEAVY} if name in sys.modules])")
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_importing_its_modules_leaves_the_model_libraries_out():
    modules = ["auxiliary", "backbone", "config", "features", "mixin", "prompts", "report", "results", "store",
               "diffusion.lora"]  # fmt: skip
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
    monkeypatch.setattr(backbone_module, "load_backbone", lambda *_, **__: make_backbone())
    monkeypatch.setattr(pipeline_module, "load_generator", lambda *_, **__: make_generator())
    options = {"SIZE": SIDE, "STEPS": 1, "M": 3, "K": 2, "LORA.STEPS": 2, "LORA.RANK": 2, "LORA.BATCH": 2}
    return [word for key, value in options.items() for word in (f"AIR.{key}", str(value))]


BAD = {
    "no such folder": (["generate", "nowhere", "--classes", "{classes}"], "nowhere is missing"),
    "no images": (["generate", "{empty}", "--classes", "{classes}"], "no images below"),
    "no such class file": (["generate", "{pictures}", "--classes", "nowhere.txt"], "nowhere.txt"),
    "a folder for classes": (["generate", "{pictures}", "--classes", "{empty}"], "cannot read"),
    "a picture for classes": (["generate", "{pictures}", "--classes", "{picture}"], "cannot read"),
    "no classes": (["generate", "{pictures}", "--classes", "{nothing}"], "class names"),
    "a class twice": (["generate", "{pictures}", "--classes", "{twice}"], "each once"),
    "unknown key": (["lora", "{pictures}", "--classes", "{classes}", "AIR.LAMDA", "1"], "did you mean AIR.LAMBDA"),
    "half an option": (["lora", "{pictures}", "--classes", "{classes}", "AIR.M"], "no partner"),
    "a value out of range": (["lora", "{pictures}", "--classes", "{classes}", "AIR.K", "121"], "AIR.K is 121"),
    "an ill-typed value": (["lora", "{pictures}", "--classes", "{classes}", "AIR.M", "x"], "AIR.M is 'x'"),
    "no such config": (["lora", "{pictures}", "--classes", "{classes}", "--config", "no.yaml"], "unknown config file"),
    "unknown backbone": (
        ["lora", "{pictures}", "--classes", "{classes}", "MODEL.BACKBONE.NAME", "RN-50"], "unknown backbone 'RN-50'",
    ),
    "unknown generator": (
        ["lora", "{pictures}", "--classes", "{classes}", "AIR.GENERATOR", "mni"], "AIR.GENERATOR is 'mni'",
    ),
    "unknown precision": (
        ["lora", "{pictures}", "--classes", "{classes}", "TRAINER.PROMPT.PREC", "fp15"], "precision 'fp15'",
    ),
    "unknown device": (["lora", "{pictures}", "--classes", "{classes}", "--device", "gpu"], "gpu"),
    "no results": (["report", "{empty}"], "no results"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_line_and_exit_code_2(
    kind: str, classes: Path, pictures: list[str], tmp_path: Path, capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    arguments, said = BAD[kind]
    if "generator" in kind:
        monkeypatch.setattr(backbone_module, "load_backbone", lambda *_, **__: make_backbone())
    (tmp_path / "empty").mkdir()
    (tmp_path / "nothing.txt").write_text("\n")
    (tmp_path / "twice.txt").write_text("dog\ncat\ndog\n")
    places = {
        "classes": classes, "empty": tmp_path / "empty", "pictures": Path(pictures[0]).parent, "picture": pictures[0],
        "nothing": tmp_path / "nothing.txt", "twice": tmp_path / "twice.txt",
    }  # fmt: skip
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
    assert "(9, 9 drawn now)" in capsys.readouterr().out
    assert main(["prototypes", *common]) == 0
    out = capsys.readouterr().out
    (made,) = (mark.parent for mark in (tmp_path / "store" / "prototypes").glob("*/entry.json"))
    assert "(9, 0 drawn now)" in out and f"prototypes: {made}\n" in out
    names = json.loads((made / "provenance.json").read_text())["classes"]
    assert names == ["dog", "annual_crop land", "sea"]


def test_without_lora_no_adapter_is_trained(
    small: list[str], classes: Path, pictures: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
):
    folder = str(Path(pictures[0]).parent)
    options = [*small, "AIR.LORA.ENABLED", "False"]
    assert main(["generate", folder, "--classes", str(classes), "--store", str(tmp_path / "store"), *options]) == 0
    assert "adapter:" not in capsys.readouterr().out and not (tmp_path / "store" / "lora").exists()


def test_a_trainers_config_is_read_for_its_settings(tmp_path: Path):
    from air_plugin.cli import settings_of

    config = tmp_path / "x.yaml"
    config.write_text("AIR: {M: 7, K: 3}\nOPTIM: {LR: 5}\nINPUT: {SIZE: 3}\nTRAINER: {PROMPT: {N_CTX: 4}}\n")
    cfg = settings_of(parse(["lora", "p", "--classes", "c", "--config", str(config), "--seed", "4", "AIR.K", "2"]))
    assert (cfg.AIR.M, cfg.AIR.K, cfg.TRAINER.PROMPT.N_CTX, cfg.SEED) == (7, 2, 4, 4)


def test_a_full_disk_is_one_line(
    classes: Path, pictures: list[str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    import errno

    def full(*_, **__):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RuntimeError("writing failed") from error

    monkeypatch.setattr(backbone_module, "load_backbone", full)
    assert main(["lora", str(Path(pictures[0]).parent), "--classes", str(classes)]) == 2
    assert capsys.readouterr().err.startswith("error: the disk is full")


def test_a_fault_of_ours_is_not_hidden(
    classes: Path, pictures: list[str], monkeypatch: pytest.MonkeyPatch
):
    def broken(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(backbone_module, "load_backbone", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["lora", str(Path(pictures[0]).parent), "--classes", str(classes)])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["lora", "pictures", "--classes", "c", "--sed", "3", "--what"], "--what"),
        (["report", "output", "AIR.M", "3"], "AIR.M"),
        (["report", "output", "--format", "pdf"], "pdf"),
        (["report", "--dataset", "digits"], "OUTPUT"),
        (["lora", "pictures"], "--classes"),
        (["lorra", "pictures"], "lorra"),
        ([], "COMMAND"),
    ],
)
def test_a_wrong_command_line_is_told_by_argparse(arguments: list[str], said: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as raised:
        parse(arguments)
    assert raised.value.code == 2 and said in capsys.readouterr().err
