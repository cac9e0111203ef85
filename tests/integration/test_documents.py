"""README and docs: their commands, snippets, links, paths, settings and words. What cannot run here is in NOT_RUN."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import os
import pkgutil
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import documents
import pytest
import torch
import yaml
from documents import PAGES, ROOT, Block, Command
from PIL import Image
from runs import SHORT
from small_models import air_settings, write_pictures

import air_plugin
from air_plugin.auxiliary.stages import Prototypes
from air_plugin.cli import main, parse
from air_plugin.config import add_air_config, flatten, merge_file, merge_options
from air_plugin.utils.errors import UserError
from air_plugin.utils.store import Store

README = ROOT / "README.md"
# Programs that these tests do not start. Everything else is run, or its arguments are checked by its own parser.
NOT_RUN = {
    "pip": "it needs a package index; extras are checked below",
    "mkdocs": "it needs the extra docs; .ci/run builds the site",
    "pytest": "it is what runs this; paths are checked below",
    "ruff": ".ci/run runs it",
    "mypy": ".ci/run runs it",
    "pre-commit": "it needs the network",
    "git": "it needs the network",
}
MADE_UP = {"CoOpAiR"}  # trainers of somebody's own
MADE_UP_DATA = "mine"  # the data set of docs/datasets.md
OLD_NAMES = ("CHANGELOG.md", "former_settings.py", "old_format.py", "docs/configuration.md", "test_documents.py")
NO_WORDS = r"[Ss]urest|SUREST|[Ll]ikeliest|\b[Ss]urer\b|[Hh]eadline|[Dd]rawn images?|[Ww]ording|look_back|fair_head"


def page_name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def every_command(tmp_path_factory: pytest.TempPathFactory) -> list[Command]:
    """What bash would start for each command line of each page."""
    lines = [(page, line) for page in PAGES for line in documents.shell_lines(page)]
    found = [
        command
        for page, line in dict.fromkeys(lines)
        for command in documents.commands(line, page_name(page), tmp_path_factory.mktemp("line"))
    ]
    assert len(found) > 80
    return found


def default_config() -> Any:
    from dassl.config import get_cfg_default

    cfg = get_cfg_default()
    add_air_config(cfg)
    return cfg


def options_in(words: list[str]) -> list[str]:
    """The KEY VALUE pairs at the end of a command."""
    first = next((i for i, word in enumerate(words) if re.fullmatch(r"[A-Z]+(\.[A-Z_0-9]+)+", word)), len(words))
    return words[first:]


def check_options(words: list[str], files: list[str]) -> None:
    """Files and options make a config: they are there, keys are known, values have their type."""
    cfg = default_config()
    for file in files:
        merge_file(cfg, ROOT / file)
    merge_options(cfg, options_in(words))


def values_of(flag: str, words: list[str]) -> list[str]:
    return [words[i + 1] for i, word in enumerate(words) if word == flag]


def check_script(words: list[str]) -> None:
    """scripts/run.py: data set, trainers or experiment, CONFIG and options exist."""
    assert (ROOT / words[0]).is_file()
    for experiment in values_of("--experiment", words):
        assert (ROOT / f"configs/experiments/{experiment}.yaml").is_file()
    trainers = ",".join(values_of("--trainers", words)).split(",")
    for trainer in filter(None, trainers):
        assert (ROOT / "configs/trainers" / trainer).is_dir()
    rest = words[3 + ("--coop-arguments" in words) :]
    dataset, *rest = rest
    if dataset != MADE_UP_DATA:
        check_options(rest, [f"configs/datasets/{dataset}.yaml"])
    for part in rest[0].split("+") if rest[: -len(options_in(rest)) or None] else []:
        assert list((ROOT / "configs").glob(f"*/{part}.yaml")) or list(
            (ROOT / "configs/trainers").glob(f"*/{part}.yaml")
        )


def help_of(target: str) -> str:
    """The help of a script or module of ours."""
    run = runpy.run_path if target.endswith(".py") else runpy.run_module
    name = str(ROOT / target) if target.endswith(".py") else target
    output = io.StringIO()
    with (
        mock.patch.object(sys, "argv", [target, "--help"]),
        mock.patch.object(sys, "path", [str(ROOT), *sys.path]),
        contextlib.redirect_stdout(output),
        pytest.raises(SystemExit) as end,
    ):
        sys.modules.pop(target, None)  # else runpy warns
        run(name, run_name="__main__")
    assert end.value.code == 0
    return output.getvalue()


def check_python(words: list[str]) -> None:
    """python train.py, prepare.py, scripts/run.py or -m MODULE: the target exists, and so do its flags."""
    if words[0].endswith("run.py"):
        return check_script(words)
    target = words[1] if words[0] == "-m" else words[0]
    flags = {word for word in words[1:] if word.startswith("--")}
    if target == "air_plugin.config":  # prints docs/configuration.md, and takes no arguments
        assert importlib.util.find_spec(target) and not flags
        return None
    assert flags <= set(re.findall(r"--[a-z0-9-]+", help_of(target)))
    if target == "train.py":
        files = values_of("--dataset-config-file", words) + values_of("--config-file", words)
        check_options(words, files)
        for trainer in set(values_of("--trainer", words)) - MADE_UP:
            assert (ROOT / "configs/trainers" / trainer).is_dir()
    if target == "prepare.py":
        assert words[1] == MADE_UP_DATA or (ROOT / f"datasets/{words[1]}.py").is_file()
    return None


def check_air(words: list[str]) -> None:
    """air ...: its own parser takes the arguments; files and settings exist."""
    if "--help" in words:
        with pytest.raises(SystemExit, match=r"^0$"):
            parse(words)
        return
    args = parse(words)
    if words[0] in ("lora", "generate", "prototypes"):
        check_options(words, [str(file) for file in args.config])


def check_not_run(words: list[str]) -> None:
    """Extras that pip is to install are in pyproject.toml; files that pytest is to run exist."""
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for extra in re.findall(r"\[([\w,]+)\]$", words[-1] if words else ""):
        assert all(re.search(rf"^{name} = \[", pyproject, flags=re.MULTILINE) for name in extra.split(","))
    for word in words:
        assert not word.startswith("tests/") or (ROOT / word.split("::")[0]).exists()


# The checks themselves


@pytest.mark.parametrize(
    "line",
    [
        "bash scripts/air/mian.sh digits",
        "bash scripts/air/main.sh digts",
        "bash scripts/air/main.sh digits mimi",
        "bash scripts/air/main.sh digits AIR.LAMDA 1",
        "bash scripts/air/main.sh digits AIR.M many",
        "python train.py --trainr AiR",
        "python train.py --trainer AIR",
        "python train.py --config-file configs/trainers/AiR/none.yaml",
        "python prepare.py eurosta",
        "python -m benchmarks.none",
        "python -m benchmarks.em --iteration-s 1",
        "air repot output",
        "air report output --cl95",
        "air lora photos --classes classes.txt AIR.KK 1",
        'pip install -e ".[trian]"',
        "pytest tests/none.py",
    ],
)
def test_a_wrong_command_is_found(line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((AssertionError, UserError, SystemExit, ImportError)):
        for command in documents.commands(line, "a page", tmp_path):
            check_command(command)


def test_blocks_placeholders_loops_and_continued_lines_are_read(tmp_path: Path) -> None:
    page = ROOT / "docs" / "page.md"
    text = (
        "Text\n\n    bash a.sh DATASET \\\n      [KEY VALUE ...]   # why\n    for x in 1; do\n      air x\n    done\n\n"
    )
    text += "1. a\n\n       import b\n\n```\nair y\n```\n"
    with mock.patch.object(Path, "read_text", return_value=text):
        assert documents.shell_lines(page) == [
            "bash a.sh DATASET [KEY VALUE ...]   # why",
            "for x in 1; do\n  air x\ndone",
            "air y",
        ]
        assert [block.text for block in documents.blocks(page) if block.is_python] == ["import b"]
    assert documents.filled('pip install "x[a]" DATASET [B ...]') == 'pip install "x[a]" digits '


# Commands


def check_command(command: Command) -> None:
    program, *words = command.words
    if program == "air" and command.is_excerpt:  # its setting is what matters
        with pytest.raises(SystemExit, match=r"^0$"):
            parse([words[0], "--help"])
        return check_options(words, [])
    checks = {"python": check_python, "air": check_air, **dict.fromkeys(NOT_RUN, check_not_run)}
    return checks[program](words)


def test_every_command_exists_with_its_files_flags_and_settings(
    every_command: list[Command], capsys: pytest.CaptureFixture[str]
) -> None:
    for command in every_command:
        try:
            check_command(command)
        except (AssertionError, UserError, SystemExit, ImportError) as error:
            pytest.fail(
                f"{command.page}: {command.line}\n{' '.join(command.words)}\n{error!r} {capsys.readouterr().err}"
            )


def test_commands_that_are_only_named_exist(capsys: pytest.CaptureFixture[str]) -> None:
    for name in {name for page in PAGES for name in documents.quoted_names(page)}:
        with pytest.raises(SystemExit) as end:
            parse([name, "--help"])
        assert end.value.code == 0, name


def flags_in_brackets() -> Iterator[tuple[list[str], str]]:
    """(command, flag) of the optional parts of lines that show how a command is used."""
    for page in PAGES:
        for line in documents.shell_lines(page):
            for part in re.findall(r"\s\[(--[a-z0-9-]+)", line):
                yield line.split()[:2], part


def test_optional_flags_exist(capsys: pytest.CaptureFixture[str]) -> None:
    found = list(flags_in_brackets())
    assert found
    for words, flag in found:
        assert words[0] == "air"
        with pytest.raises(SystemExit):
            parse([words[1], "--help"])
        assert flag in capsys.readouterr().out


def write_images(folder: Path, number: int) -> None:
    folder.mkdir(parents=True)
    for i in range(number):
        image = Image.new("RGB", (32, 32), ((40 * i) % 256, 90, 160))
        image.paste((255, 255, 255), (i % 16, 4, i % 16 + 8, 28))
        image.save(folder / f"{i}.png")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a reader: the repository's files, photos, and images of his own."""
    folder = tmp_path / "place"
    write_images(folder / "photos", 3)
    write_images(folder / "mine" / "train", 12)
    (folder / "mine" / "classes.txt").write_text("left\nright\n")
    for name in ("scripts", "configs", "train.py"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "bin").mkdir()
    (folder / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (folder / "bin" / "python").chmod(0o755)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def trained(place: Path, finished: Callable[..., Path]) -> Path:
    """The same after a run of AiR on digits."""
    run = place / "output" / "digits" / "AiR" / "mini" / "seed1"
    shutil.copytree(finished("AiR"), run, copy_function=os.link)
    return place


def type_line(line: str, place: Path, **environment: str) -> str:
    """Run a line in bash; returns what it prints."""
    path = f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}"
    places = {"OUTPUT": str(place / "output"), "SEEDS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-ec", line],
        cwd=place,
        env={**os.environ, "PATH": path, **places, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


def type_air(line: str) -> None:
    """Run a line that begins with `air` in this process; its output may go to a file."""
    command, _, file = line.partition("#")[0].partition(">")
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert main(shlex.split(command)[1:]) == 0
    if file:
        Path(file.strip()).write_text(output.getvalue())


def lines_of(page: Path, start: str) -> list[str]:
    found = [line for line in documents.shell_lines(page) if line.startswith(start)]
    assert found, f"{page} has no line that starts with: {start}"
    return found


def test_the_quick_start_gives_the_table_and_the_gallery(place: Path, data: Path) -> None:
    (line,) = lines_of(README, "bash scripts/air/main.sh digits")
    printed = type_line(f"{line} {' '.join(SHORT)}", place, DATA=str(data))
    assert all(f"\n| {method} " in printed for method in ("ZeroshotCLIP", "CPL", "AiR"))
    assert (place / "output" / "digits" / "gallery.png").is_file()


def test_a_finished_run_is_reported_and_used_as_documented(trained: Path) -> None:
    outputs = ROOT / "docs" / "outputs.md"
    for line in lines_of(outputs, "air report output "):
        type_air(line.replace("--baseline CPL", ""))  # there is no such run here
    for line in lines_of(outputs, "air predict "):
        type_air(line)
    assert Path("output/digits.html").stat().st_size > 10_000
    assert len(Path("labels.tsv").read_text().splitlines()) == 3
    assert len(Path("labels.csv").read_text().splitlines()) == 4


@pytest.mark.full
def test_ones_own_images_are_classified_as_in_the_quick_start(place: Path) -> None:
    (line,) = lines_of(README, "DATA=/my/images")
    line = line.replace("/my/images", str(place / "mine"))
    type_line(f"{line} mini {' '.join(SHORT)}", place)  # mini: the default needs a download
    (line,) = lines_of(README, "air predict output/")
    (made,) = Path("output/folder/AiR").iterdir()
    assert "output/folder/AiR/vit_b32/" in line
    type_air(line.replace("/my/photos", "photos").replace("output/folder/AiR/vit_b32", str(made)))
    labels = [row.split("\t")[1] for row in Path("labels.tsv").read_text().splitlines()]
    assert len(labels) == 3 and set(labels) <= {"left", "right"}


# Snippets


def small_features(number: int, classes: int) -> dict[str, Any]:
    backbone = air_plugin.load_backbone("mini")
    size = backbone.encode_texts(["a"]).shape[1]
    torch.manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(number, size), dim=1)
    return {"backbone": backbone, "features": features, "aux_probs": torch.rand(number, classes)}


def save_classifier(folder: Path) -> dict[str, Any]:
    """What the snippet on AuxiliaryClassifier finds: its file, names, a backbone and somebody's logits."""
    given = small_features(4, 2)
    names, backbone = ["left", "right"], given["backbone"]
    card = {"classes": names, "backbone": backbone.name, "backbone_fingerprint": backbone.fingerprint}
    prototypes = given["features"].view(2, 2, -1)
    head = air_plugin.AuxiliaryClassifier.from_prototypes(prototypes, scale=2.0)
    air_plugin.AuxiliaryClassifier(head.weight, head.bias, head.scale, 2.0, card).save(
        folder / "classifier.safetensors"
    )
    return {**given, "names": names, "logits": torch.zeros(4, 2)}


def images_and_auxiliary(folder: Path) -> dict[str, Any]:
    """What the snippet on ten million images takes for granted, with six images."""
    given = small_features(6, 2)
    generated = given["features"].view(2, 3, -1)
    prototypes = Prototypes(generated[:, :2], [], torch.arange(2).expand(2, 2), generated)
    head = air_plugin.AuxiliaryClassifier.from_prototypes(prototypes.features, scale=2.0)
    return {
        "backbone": given["backbone"],
        "classnames": ["left", "right"],
        "paths": write_pictures(folder / "pictures", 6),
        "auxiliary": air_plugin.Auxiliary(head, prototypes),
        "settings": air_settings(AUXILIARY="gaussian", REFINE="em"),
        "store": Store(folder / "store"),
    }


HOSTS = ("CoOp", "MaPLe", "ZeroshotCLIP", "PLOT", "UPLTrainer")  # trainers that docs/drop-in.md extends


def names_for(block: Block, folder: Path) -> dict[str, Any]:
    """What a snippet takes for granted."""
    from dassl.utils import Registry

    trainer = {name: type(name, (), {}) for name in HOSTS}
    given = {"TRAINER_REGISTRY": Registry("TRAINER"), "AuxiliaryMixin": air_plugin.AuxiliaryMixin, **trainer}
    if "AuxiliaryClassifier.load" in block.text:
        return save_classifier(folder)
    if "candidate_sets" in block.text:
        return small_features(8, 2)
    if "finalize_shards" in block.text:
        return images_and_auxiliary(folder)
    return {**given, "cfg": default_config()}


@pytest.mark.parametrize("block", documents.snippets(), ids=lambda block: f"{block.page}-{block.text[:40]}")
def test_every_snippet_runs(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    from dassl.data.datasets import DATASET_REGISTRY

    monkeypatch.chdir(tmp_path)
    for image in ("train/cat", "train/dog", "test/cat", "test/dog"):  # of docs/datasets.md
        (tmp_path / "mine" / image).mkdir(parents=True)
        (tmp_path / "mine" / image / "0.jpg").touch()
    if "output/digits/" in block.text:
        request.getfixturevalue("trained")
    before = dict(DATASET_REGISTRY._obj_map)
    names = names_for(block, tmp_path)
    text = block.text.replace('"ViT-B/32", device="cuda"', '"mini"')  # no download, no GPU
    if "AiRClassifier(" in text:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
        write_images(tmp_path / "photos", 6)
        text = text.replace('light"])', 'light"], settings={"AIR.LORA.STEPS": 1, "AIR.M": 1, "AIR.K": 1})')
    try:
        exec(compile(text, block.page, "exec"), names)
    finally:
        new = DATASET_REGISTRY._obj_map.keys() - before
        DATASET_REGISTRY._obj_map = before
    for name in new:  # a data set of the page on data sets
        cfg = default_config()
        cfg.DATASET.ROOT = str(tmp_path)
        data = names[name](cfg)
        assert data.classnames == names["CLASSES"] and data.train_u and data.test


def test_snippets_import_the_public_api_only() -> None:
    found = [(block, module, name) for block in documents.snippets() for module, name in documents.imports(block)]
    for block, module, name in found:
        if module.startswith("air_plugin"):
            assert module == "air_plugin" and name in air_plugin.__all__, f"{block.page}: {block.text}"
    assert {module for _, module, _ in found} >= {"air_plugin"}


def test_the_page_on_data_sets_has_a_config_that_can_be_merged(tmp_path: Path) -> None:
    (block,) = (
        b
        for b in documents.blocks(ROOT / "docs" / "datasets.md")
        if b.text.startswith("# bash scripts/air/main.sh mine")
    )
    (tmp_path / "mine.yaml").write_text(block.text)
    cfg = default_config()
    merge_file(cfg, tmp_path / "mine.yaml")
    assert cfg.DATASET.NAME == "Mine" == yaml.safe_load(block.text)["DATASET"]["NAME"]


def test_the_api_page_has_every_public_name_where_it_is_defined() -> None:
    row = re.compile(r"^\| \[`(\w+)`\]\((\w+)\.md#([\w.]+)\) \| `([\w.]+)` \|$", re.MULTILINE)
    rows = row.findall((ROOT / "docs/api/index.md").read_text())
    assert sorted(name for name, *_ in rows) == sorted(set(air_plugin.__all__) - {"__version__"})
    for name, page, anchor, module in rows:
        assert getattr(air_plugin, name).__module__ == module and anchor == f"{module}.{name}"
        assert (
            f"::: {module.rpartition('.')[0] if module.count('.') > 1 else module}\n"
            in (ROOT / f"docs/api/{page}.md").read_text()
        )


# Pages


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"], ids=page_name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in documents.links(page):
        target, _, anchor = link.partition("#")
        file = (page.parent / target) if target else page
        assert file.exists(), link
        if anchor.startswith("air_plugin."):  # of an API page
            assert pkgutil.resolve_name(anchor), link
        elif anchor:
            assert anchor in documents.anchors(file), link


def test_the_site_has_every_page() -> None:
    listed = re.findall(r"([\w/-]+\.md)", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(
        page.relative_to(ROOT / "docs").as_posix() for page in PAGES if "docs/" in page_name(page)
    )


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_paths_exist(page: Path) -> None:
    for path in documents.quoted_paths(page):
        places = (ROOT, ROOT / "air_plugin", ROOT / "trainers", ROOT / "tests")
        assert (
            any((place / path).exists() or list(place.glob(path)) for place in places)
            or path == "datasets/mine.py"
            or path in THEIRS
        ), path


THEIRS = {"train.py", "coop.py", "cocoop.py", "parse_test_res.py", "trainers/coop.py", "configs/datasets/mine.yaml"}


def test_trainers_that_are_to_be_copied_need_no_others() -> None:
    (names,) = re.findall(r"`trainers/\{([\w,]+)\}\.py`", (ROOT / "docs" / "drop-in.md").read_text(encoding="utf-8"))
    copied = names.split(",")
    for name in copied:
        needed = re.findall(r"^from trainers\.(\w+) import", (ROOT / f"trainers/{name}.py").read_text(), re.MULTILINE)
        assert set(needed) <= set(copied)
    assert "air" in copied and not {"coop", "zsclip"} & set(copied)  # CoOp has files with these names


def test_the_map_of_the_readme_is_right() -> None:
    (tree,) = (block.text for block in documents.blocks(README) if block.text.startswith("train.py"))
    for line in tree.splitlines():
        base = ROOT / "air_plugin" if line.startswith("  ") else ROOT
        names = re.split(r"\s{2,}", line.strip())
        found = [name for part in names for name in part.split() if re.fullmatch(r"\w+(/|\.py)", name)]
        assert found and all((base / name).exists() for name in found), line


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_settings_exist(page: Path) -> None:
    known = flatten(default_config())
    text = page.read_text(encoding="utf-8").partition("## Former names")[0]
    for key in documents.setting_keys(text):
        assert key in known or any(name.startswith(f"{key}.") for name in known), key


def test_three_questions_have_an_answer_each() -> None:
    """Where is the fusion, what does AIR.K do, how is a data set added."""
    assert "`functional/fusion.py`" in README.read_text() and "lambda" in ast.get_docstring(
        ast.parse((ROOT / "air_plugin/functional/fusion.py").read_text())
    )
    assert re.search(r"^\| `AIR\.K` \|", (ROOT / "docs/configuration.md").read_text(), re.MULTILINE)
    section = (ROOT / "docs/datasets.md").read_text().partition("## Add a data set")[2].partition("\n## ")[0]
    assert 20 < len(section.splitlines()) < 60


def test_words_are_the_fields() -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "*.md", "*.py"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    assert len(tracked) > 100
    found = []
    for name in tracked:
        if not name.endswith(OLD_NAMES) and (ROOT / name).exists():
            text = re.sub(r"([\"'])headline\1", "", (ROOT / name).read_text(encoding="utf-8"))  # a key in old files
            found += [f"{name}: {word}" for word in re.findall(NO_WORDS, text)]
    assert not found
