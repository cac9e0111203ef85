"""Every YAML that is shipped: it names its command, merges, and its settings are valid."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from dassl.data.datasets import DATASET_REGISTRY
from PIL import Image
from runs import arguments

import scripts.compose
import train
from air_plugin.cli import main as air
from air_plugin.config import FROM_BACKBONE, AirSettings, add_air_config, flatten, merge_file, merge_options, validate
from air_plugin.mixin import AuxiliaryMixin
from air_plugin.settings import SECTIONS
from air_plugin.utils.errors import UserError
from air_plugin.utils.provenance import Stages
from air_plugin.utils.store import Store
from scripts import run
from scripts.compose import register_all, resolve, settings_of
from trainers.prompted_models import _require_what_goes_together
from trainers.tables import Tables

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
DATASETS = sorted((CONFIGS / "datasets").glob("*.yaml"))
TRAINERS = sorted((CONFIGS / "trainers").glob("*/*.yaml"))
SHARED = sorted((CONFIGS / "shared").glob("*.yaml"))
DEFAULTS = [path for path in TRAINERS if path.stem == "default"]
WHOLE = [path for path in TRAINERS if path.stem != "default"]  # with backbone and generator, as `mini`
BACKBONES = sorted((CONFIGS / "backbones").glob("*.yaml"))
GENERATORS = sorted((CONFIGS / "generators").glob("*.yaml"))
EMBEDDED = CONFIGS / "generators" / "mini.yaml"  # goes with the backbone of its name, in every config called mini
PARTS = [path for path in [*BACKBONES, *GENERATORS] if path != EMBEDDED]
EMBEDDED_BACKBONES = ("mini", "mini_vit")
EXPERIMENTS = sorted((CONFIGS / "experiments").glob("*.yaml"))
PRESETS = sorted((CONFIGS / "presets").glob("*.yaml"))


def label(path: Path) -> str:
    return path.relative_to(CONFIGS).as_posix()


def default() -> Any:
    from dassl.config import get_cfg_default

    cfg = get_cfg_default()
    add_air_config(cfg)
    return cfg


def merged(*paths: Path) -> Any:
    cfg = default()
    for path in paths:
        merge_file(cfg, path)
    return cfg


def comment(path: Path) -> list[str]:
    """The lines of comment that a file begins with."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    return lines


def experiment(name: str) -> dict[str, Any]:
    return yaml.safe_load((CONFIGS / "experiments" / f"{name}.yaml").read_text())


def trainers_of(script: str) -> list[str]:
    """The trainers that a script runs; of a method's own script, the one that CONFIG belongs to."""
    ((kind, names),) = re.findall(r"--(trainers|experiment) (\S+)", (ROOT / script).read_text())
    return names.split(",")[-1:] if kind == "trainers" else [row["trainer"] for row in experiment(names)["rows"]]


def bases(path: Path) -> list[Path]:
    """The files that a file is merged over."""
    named = yaml.safe_load(path.read_text()).get("_BASE_") or []
    return [(path.parent / name).resolve() for name in ([named] if isinstance(named, str) else named)]


def written(path: Path) -> set[str]:
    """The full keys that a file itself writes."""

    def leaves(tree: dict[str, Any], prefix: str = "") -> set[str]:
        return {
            key
            for name, value in tree.items()
            for key in (leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}"})
        }

    tree = yaml.safe_load(path.read_text())
    conditional = tree.pop("_WHERE_", {}).values()
    return {key for part in [tree, *conditional] for key in leaves(part)} - {"_BASE_"}


def test_there_are_configs():
    assert DATASETS and WHOLE and BACKBONES and GENERATORS and EXPERIMENTS and SHARED
    assert {path.parent for path in DEFAULTS} == {path.parent for path in TRAINERS}  # every trainer can be composed
    assert not {path.stem for path in WHOLE} & {path.stem for path in PARTS} and EMBEDDED in GENERATORS
    assert not {path.stem for path in BACKBONES} & {path.stem for path in GENERATORS}
    assert {path.suffix for path in CONFIGS.rglob("*") if path.is_file()} == {".yaml"}
    everything = [*DATASETS, *TRAINERS, *BACKBONES, *GENERATORS, *EXPERIMENTS, *PRESETS, *SHARED]
    assert sorted(everything) == sorted(CONFIGS.rglob("*.yaml"))  # none lies elsewhere


def test_inheritance_is_two_levels_deep_and_every_shared_file_is_used():
    used = set()
    for path in CONFIGS.rglob("*.yaml"):
        used.update(bases(path))
        assert not [base for one in bases(path) for base in bases(one)], label(path)
    assert used >= {path.resolve() for path in SHARED}


@pytest.mark.parametrize("path", [path for path in CONFIGS.rglob("*.yaml") if path != EMBEDDED], ids=label)
def test_a_file_begins_with_its_command_and_what_to_expect(path: Path):
    command, expected = comment(path)[:2]
    assert expected == "expected: unmeasured" or re.match(
        r"expected: .*\d.*; .*(\d+ (s|min)|time unmeasured)", expected
    )
    _, script, *words = command.split()
    assert command.startswith("bash scripts/") and (ROOT / script).is_file()
    if path in EXPERIMENTS:
        assert f"--experiment {path.stem} " in (ROOT / script).read_text()
        return
    dataset, *config = words
    assert (CONFIGS / "datasets" / f"{dataset}.yaml").is_file()
    if path in DATASETS:
        assert dataset == path.stem
    elif path in TRAINERS:
        assert path.parent.name in trainers_of(script) and path in run.compose(path.parent.name, config[0])
    elif path in SHARED:
        assert path.resolve() in [base for one in run.compose(trainers_of(script)[0], config[0]) for base in bases(one)]
    else:
        assert script == "scripts/air/main.sh" and path in run.compose("AiR", config[0])


# Parts are independent of each other (the next test), so that it is enough to try each of them once in every place.


def test_parts_keep_to_what_is_theirs():
    """What comes later wins, so no published value may be in a backbone, a generator or a preset."""
    for path in DATASETS:
        assert written(path) <= {
            *("DATASET.NAME", "DATASET.TEMPLATE", "DATASET.DEFAULT_CONFIG"),
            *("TRAINER.CPL.ALPHA", "TRAINER.CPL.BETA", "TRAINER.CPL.GAMMA"),
        }, label(path)
    for path in BACKBONES:
        assert written(path) == {"MODEL.BACKBONE.NAME"}, label(path)
    for path in [*GENERATORS, *PRESETS]:
        assert all(key.startswith("AIR.") for key in written(path)), label(path)
    for path in [path for path in GENERATORS if path != EMBEDDED]:
        assert not written(path) & {f"AIR.{key}" for key in ("M", "K", "LAMBDA", "BETA", "LS", "PRIMARY")}, label(path)
    assert not {key for path in [*TRAINERS, *SHARED] for key in written(path)} & set(FROM_BACKBONE)


# alpha, beta (ul, ssl) and gamma (trzsl), for text and for visual prompts (arXiv 2406.10502 and its code).
PUBLISHED = {
    "eurosat": ((0.75, 0.80, 3.0), (0.90, 0.80, 2.0)),
    "oxford_flowers": ((0.60, 0.99, 1.0), (0.60, 0.99, 1.0)),
    "fgvc_aircraft": ((0.90, 0.97, 1.5), (0.90, 0.99, 2.0)),
    "cub": ((0.75, 0.99, 2.25), (0.60, 0.99, 2.5)),
    "dtd": ((0.75, 0.95, 2.0), (0.60, 0.97, 2.0)),
    "resisc45": ((0.90, 0.97, 2.0), (0.90, 0.97, 2.0)),
}


@pytest.mark.parametrize("dataset", PUBLISHED)
@pytest.mark.parametrize("trainer", ["CPL", "AiR"])
def test_paradigm_and_kind_of_prompt_choose_the_published_constants(trainer: str, dataset: str):
    file, files = CONFIGS / "datasets" / f"{dataset}.yaml", run.compose(trainer, "vit_b32")
    for modality, (alpha, beta, gamma) in zip(("text", "visual"), PUBLISHED[dataset], strict=True):
        for paradigm in ("ul", "ssl", "trzsl"):
            options = ["TRAINER.PROMPT.MODALITY", modality, "DATASET.PARADIGM", paradigm]
            cpl = resolve(files, dataset_file=file, options=options)[0].TRAINER.CPL
            assert (alpha, beta, gamma if paradigm == "trzsl" else 0.0) == (cpl.ALPHA, cpl.BETA, cpl.GAMMA)
            own = resolve(files, dataset_file=file, options=[*options, "TRAINER.CPL.GAMMA", "0.5"])[0].TRAINER.CPL
            assert own.GAMMA == 0.5
    both = [
        resolve(files, dataset_file=file, options=["TRAINER.PROMPT.MODALITY", kind, "DATASET.PARADIGM", "trzsl"])[0]
        for kind in ("visual", "multimodal")
    ]
    assert both[0].TRAINER.CPL == both[1].TRAINER.CPL


@pytest.mark.parametrize("path", DATASETS, ids=label)
def test_a_data_set_names_itself_and_a_config_of_every_trainer(path: Path):
    register_all("datasets")
    alone = merged(path)
    assert alone.DATASET.NAME in DATASET_REGISTRY.registered_names()
    for trainer in {path.parent.name for path in TRAINERS}:
        cfg = merged(path, *run.compose(trainer, alone.DATASET.DEFAULT_CONFIG))
        assert AirSettings.from_cfg(cfg).prompt == alone.DATASET.TEMPLATE and cfg.TRAINER.NAME == ""
    cfg = merged(path, *run.compose("AiR", "vit_b32"))  # what is published of a data set stays
    for key in ("TRAINER.CPL.ALPHA", "TRAINER.CPL.BETA", "TRAINER.CPL.GAMMA", "DATASET.TEMPLATE", "DATASET.NAME"):
        assert flatten(cfg)[key] == flatten(alone)[key]


@pytest.mark.parametrize("trainer", sorted({path.parent.name for path in TRAINERS}))
def test_a_trainer_goes_with_every_backbone_and_generator(trainer: str):
    from dassl.engine import TRAINER_REGISTRY

    register_all("trainers")
    assert trainer in TRAINER_REGISTRY.registered_names()
    dataset, some = DATASETS[0], "vit_b32"
    for config in [
        *EMBEDDED_BACKBONES,
        *(path.stem for path in BACKBONES),
        *(f"{some}+{path.stem}" for path in GENERATORS),
    ]:
        files = run.compose(trainer, config)
        cfg = merged(dataset, *files)
        validate(cfg, *{section.SECTION for section in SECTIONS} - {"AIR"})
        settings, (backbone, *generator) = AirSettings.from_cfg(cfg), config.split("+")
        embedded = backbone in EMBEDDED_BACKBONES
        own = backbone if embedded else merged(CONFIGS / "backbones" / f"{backbone}.yaml").MODEL.BACKBONE.NAME
        assert own == cfg.MODEL.BACKBONE.NAME and cfg.TRAINER.NAME == ""
        assert len(files) + len([base for one in files for base in bases(one)]) < 8
        if generator and not trainer.endswith("AiR"):
            assert files == run.compose(trainer, backbone)  # no generator, no run of its own
        elif generator:
            assert settings.generator == merged(CONFIGS / "generators" / f"{generator[0]}.yaml").AIR.GENERATOR
        else:
            assert (settings.generator == "mini") == embedded


def test_every_mini_config_has_the_settings_of_the_embedded_generator():
    (command,) = [line for line in comment(EMBEDDED) if line.startswith("python train.py ")]
    named = re.search(r"--trainer (\S+)\+AiR --config-file configs/(\S+)", command)
    assert named and CONFIGS / named[2] in TRAINERS and named[2].split("/")[1] == named[1]
    changed = written_in(EMBEDDED)
    assert {"AIR.M", "AIR.SIZE", "AIR.LORA.STEPS"} <= changed.keys()
    for path in [path for path in TRAINERS if path.stem in EMBEDDED_BACKBONES]:
        everything = flatten(merged(path))
        assert {key: everything[key] for key in changed} == changed, label(path)  # so that any trainer may have +AiR


def test_ours_is_trained_as_cpl_is():
    for name in ("mini", "vit_b32"):
        cpl, air, zero = (flatten(merged(*run.compose(path, name))) for path in ("CPL", "AiR", "ZeroshotAiR"))
        assert {key.split(".")[0] for key in cpl if air[key] != cpl[key]} == {"AIR"}
        assert {key for key in cpl if air[key] != zero[key]} == {"AIR.PRIMARY"}


def test_the_embedded_vit_is_used_by_every_trainer_of_mini_with_the_same_settings():
    trainers = {path.parent.name for path in TRAINERS if path.stem == "mini"}
    assert trainers == {path.parent.name for path in TRAINERS if path.stem == "mini_vit"}
    for trainer in trainers:
        resnet, vit = (flatten(merged(*run.compose(trainer, name))) for name in EMBEDDED_BACKBONES)
        assert {key for key in resnet if resnet[key] != vit[key]} == {"MODEL.BACKBONE.NAME"}, trainer


@pytest.mark.parametrize("path", BACKBONES, ids=label)
def test_a_backbones_images_are_read_as_its_weights_were_trained(path: Path):
    """Augmented views follow INPUT.INTERPOLATION, plain ones follow the pretrained weights: they must agree."""
    import open_clip

    from air_plugin.clip.loading import _resolve

    cfg = merged(*run.compose("CPL", path.stem))
    architecture, tag, _ = _resolve(cfg.MODEL.BACKBONE.NAME)
    assert open_clip.get_pretrained_cfg(architecture, tag)["interpolation"] == cfg.INPUT.INTERPOLATION


@pytest.mark.parametrize("named", [{}, {"SIZE": (16, 16), "PIXEL_MEAN": [0.5, 0.4, 0.3], "PIXEL_STD": [0.1, 0.2, 0.3]}])
def test_augmented_views_have_the_size_and_normalisation_of_the_backbone(named: dict[str, Any]):
    tables = augmenting(named)
    transform = tables._augmentation()
    (normalize,) = [step for step in transform.transforms if hasattr(step, "std")]
    assert (list(normalize.mean), list(normalize.std)) == ([0.5, 0.4, 0.3], [0.1, 0.2, 0.3])
    assert transform(Image.new("RGB", (40, 30))).shape == (3, 16, 16)
    assert tuple(tables.cfg.INPUT.SIZE) == named.get("SIZE", (224, 224))  # the config itself stays


@pytest.mark.parametrize("named", [{"SIZE": (32, 32)}, {"PIXEL_MEAN": [0.5, 0.4, 0.4]}, {"PIXEL_STD": [1.0, 1.0, 1.0]}])
def test_a_size_or_normalisation_of_another_backbone_is_refused(named: dict[str, Any]):
    with pytest.raises(UserError, match=f"^INPUT.{next(iter(named))} is .*; tiny takes"):
        augmenting(named)._augmentation()


@pytest.mark.parametrize("config", ["vit_b32", "mini_vit"])
@pytest.mark.parametrize("trainer", ["CoOp", "UPL", "GRIP", "CPL", "AiR"])
def test_every_modality_needs_no_other_option(trainer: str, config: str):
    """The numbers of tokens are the published ones, and nothing is set that a modality has no use for."""
    for modality, tokens in (("text", 16), ("visual", 16), ("multimodal", 4)):
        cfg, _ = resolve(
            run.compose(trainer, config),
            dataset_file=CONFIGS / "datasets" / "digits.yaml",
            options=["TRAINER.PROMPT.MODALITY", modality],
        )
        prompt = cfg.TRAINER.PROMPT
        found = {"text": prompt.N_CTX, "visual": prompt.N_VISUAL}
        assert found == dict.fromkeys(found, tokens)
        assert modality != "multimodal" or cfg.OPTIM.LR == 0.01
        if modality != "text":
            _require_what_goes_together(prompt, cfg.TRAINER.TRANSDUCTION)
            views = prompt.IMAGE_VIEWS
            assert views == (2 if trainer == "AiR" and cfg.AIR.LS == "consistency" else 1)


def augmenting(named: dict[str, Any]) -> Tables:
    """Tables with a backbone of 16 pixels, as far as augmentation needs one; `named` stands in the INPUT section."""
    import open_clip

    cfg = merged(*run.compose("CPL", "vit_b32"))
    for key, value in named.items():
        cfg.INPUT[key] = value
    cfg.freeze()
    preprocess = open_clip.image_transform(16, is_train=False, mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3))
    backbone: Any = SimpleNamespace(name="tiny", image_size=16, preprocess=preprocess)
    return Tables(backbone, cfg, Store("unused"), Stages())


# Compositions


def test_order_of_the_parts_does_not_matter():
    generator = GENERATORS[0].stem
    assert run.compose("AiR", f"{generator}+vit_b32") == run.compose("AiR", f"vit_b32+{generator}")


@pytest.mark.parametrize("config", ["mini", "vit_b32", "vit_b32+sdxl"])
def test_a_preset_stands_behind_any_config_and_controls_leave_it_out(config: str):
    preset = ROOT / "configs" / "presets" / "plus.yaml"
    assert run.compose("AiR", f"{config}+plus") == [*run.compose("AiR", config), preset]
    assert run.compose("ZeroshotAiR", f"{config}_plus") == run.compose("ZeroshotAiR", f"{config}+plus")
    assert run.compose("CPL", f"{config}+plus") == run.compose("CPL", config)
    air = merged(*run.compose("AiR", f"{config}+plus")).AIR
    assert (air.AUXILIARY, air.REFINE, air.LAMBDA, air.PRIMARY) == ("gaussian", "em", "auto", "fused")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("vit_b23", r"configs/trainers/AiR, configs/backbones, configs/generators.*did you mean vit_b32"),
        ("vit_b32+sd16", r"'sd16'; did you mean .*sd15"),
        ("default", "unknown config"),
        ("minni", "did you mean mini"),
        ("sd15", "must name one backbone"),
        ("mini+pluss", "did you mean plus"),
        ("plus", "unknown config"),
        ("vit_b32+vit_b16", "must name one backbone"),
        ("vit_b32+sd15+sd21", "one generator at the most"),
        ("", "unknown config"),
        ("../datasets/digits", "unknown config"),
    ],
)
def test_bad_compositions_are_errors_for_people(config: str, said: str):
    with pytest.raises(UserError, match=said) as raised:
        run.compose("AiR", config)
    assert "\n" not in str(raised.value)


def test_a_runs_label_is_its_parts():
    digits = CONFIGS / "datasets" / "digits.yaml"

    def named(config: str, *options: str) -> str:
        return resolve(run.compose("AiR", config), dataset_file=digits, options=options)[1]

    assert named("vit_b32") == "vit_b32"
    assert named("vit_b32+sd21") == "vit_b32+sd21"
    assert named("mini") == "mini"
    assert named("mini+plus", "AIR.PRIOR", "none") == "mini+plus+AIR.PRIOR=none"
    assert named("vit_b32+sd21", "AIR.M", "60") == "vit_b32+sd21+AIR.M=60"
    assert resolve([CONFIGS / "trainers" / "AiR" / "default.yaml"], dataset_file=digits)[1] == "default"


@pytest.mark.parametrize("path", EXPERIMENTS, ids=label)
def test_the_rows_of_an_experiment_are_valid(path: Path):
    rows, titles = experiment(path.stem)["rows"], [row["title"] for row in experiment(path.stem)["rows"]]
    assert len(set(titles)) == len(titles)
    assert experiment(path.stem).get("baseline", titles[0]) in titles
    for row in rows:
        assert set(row) <= {"title", "trainer", "preset", "options", "tables"}
    for row in run.experiment_of(path.stem, [])[0]:
        cfg = merged(DATASETS[0], *run.compose(row.trainer, row.config("mini")))
        merge_options(cfg, row.options)
        AirSettings.from_cfg(cfg)


def written_in(path: Path) -> dict[str, Any]:
    """The settings that a file with its bases changes."""
    before, after = flatten(default()), flatten(merged(path))
    return {key: value for key, value in after.items() if value != before[key]}


@pytest.mark.parametrize("path", PRESETS, ids=label)
def test_no_experiment_writes_a_preset_out(path: Path):
    assert len(written_in(path)) > 3
    named = 0
    for name in (one.stem for one in EXPERIMENTS):
        for row in experiment(name)["rows"]:
            assert not written_in(path).items() <= row.get("options", {}).items(), row["title"]
            named += row.get("preset") == path.stem
    assert named > 10


@pytest.mark.parametrize(
    ("config", "whole"),
    [
        ("mini", "mini+plus"),
        ("mini+plus", "mini+plus"),
        ("mini_plus", "mini_plus"),  # the former name
        ("vit_b32+sdxl", "vit_b32+sdxl+plus"),
        ("vit_b32+plus+sdxl", "vit_b32+plus+sdxl"),
        ("vit_b32_plus", "vit_b32_plus"),
    ],
)
def test_a_rows_preset_stands_behind_config_once(config: str, whole: str):
    assert run.Row("AiR", [], preset="plus").config(config) == whole
    assert run.Row("AiR", []).config(config) == config
    for trainer in ("AiR", "ZeroshotAiR"):
        assert run.compose(trainer, whole).count(CONFIGS / "presets" / "plus.yaml") == 1


def test_an_unknown_preset_in_an_experiment_is_an_error_for_people(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "presets").symlink_to(CONFIGS / "presets")
    (tmp_path / "configs" / "experiments").mkdir()
    (tmp_path / "configs" / "experiments" / "mine.yaml").write_text("rows: [{title: a, trainer: AiR, preset: pluss}]")
    monkeypatch.setattr(scripts.compose, "ROOT", tmp_path)
    with pytest.raises(UserError, match=r"unknown preset 'pluss'; did you mean plus\?") as raised:
        run.experiment_of("mine", [])
    assert "\n" not in str(raised.value)


Cells = dict[str, tuple[str, dict[str, Any]]]


@pytest.fixture
def cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Cells]:
    """What a command would run for one seed: folder of the result -> title and settings. Nothing is run."""
    monkeypatch.setenv("DATA", str(tmp_path))
    monkeypatch.setenv("OUTPUT", str(tmp_path))
    monkeypatch.setenv("SEEDS", "1")
    monkeypatch.setattr("air_plugin.report.summary.summarize_results", lambda *args, **options: "")

    def of(*command: str) -> Cells:
        runs: list[run.Run] = []
        monkeypatch.setattr("scripts.parallel.run_all", lambda given, **_: runs.extend(given) or 0)
        monkeypatch.setattr("sys.argv", ["run.py", *command])
        assert run.run(run.parse()) == 0
        found: Cells = {}
        for one in runs:
            folder = Path(one.cfg.OUTPUT_DIR).relative_to(tmp_path).as_posix()
            assert folder not in found, "two rows are the same cell"
            found[folder] = one.name.split(" / ")[1], settings_of(one.cfg)
        return found

    return of


def test_rows_with_a_preset_are_the_cells_of_main(cells: Callable[..., Cells]):
    benchmark = cells("--experiment", "benchmark", "digits", "mini")
    preset = cells("--trainers", "AiR", "digits", "mini+plus")
    without = cells("--trainers", "AiR", "digits", "mini+plus", "AIR.PROTOTYPES", "real", "AIR.PRIOR", "none")
    ((folder, (_, settings)),) = preset.items()
    assert folder == "digits/AiR/mini+plus/seed1" and benchmark[folder] == ("AiR plus", settings)
    ((folder, (_, settings)),) = without.items()
    assert benchmark[folder] == ("EM without diffusion, prompts trained", settings)
    assert cells("--experiment", "ablation_plus", "digits")[folder][1] == settings
    assert settings["AIR.PRIOR"] == "none" and settings["AIR.REFINE"] == "em"
    folder = "digits/ZeroshotAiR/mini+plus/seed1"
    assert benchmark[folder][0] == "AiR plus, no prompt trained"
    assert cells("--experiment", "incomplete", "digits")[folder] == ("AiR plus, all classes", benchmark[folder][1])


def test_a_control_without_images_is_left_out_where_the_anchors_of_a_rival_are_images(
    cells: Callable[..., Cells], capsys: pytest.CaptureFixture[str]
):
    rival = ["TRAINER.TRANSDUCTION.METHOD", "stata", "TRAINER.TRANSDUCTION.ANCHORS"]
    assert len(cells("--trainers", "CPL,AiR", "digits", "mini", *rival, "text")) == 2
    capsys.readouterr()
    (folder,) = cells("--trainers", "CPL,AiR", "digits", "mini", *rival, "images")
    assert folder.startswith("digits/AiR/")
    assert "left out: CPL, which makes no images as anchors of stata\n" in capsys.readouterr().out


@pytest.mark.parametrize("config", ["mini", "mini+plus"])
def test_cells_and_titles_are_clear_over_all_experiments(config: str, cells: Callable[..., Cells]):
    """A folder has the same settings in every experiment, and a title never stands for two folders."""
    settings: dict[str, Any] = {}
    folders: dict[str, str] = {}
    for name in (path.stem for path in EXPERIMENTS):
        for folder, (title, own) in cells("--experiment", name, "digits", config).items():
            assert settings.setdefault(folder, own) == own
            if config == "mini":
                assert folders.setdefault(title, folder) == folder
    assert len(settings) > 30


def test_where_config_names_the_preset_rows_that_differ_in_it_alone_are_one(cells: Callable[..., Cells]):
    same = {"targets": {"AiR plus"}, "benchmark": {"AiR plus", "AiR plus, no prompt trained"}}  # as rows before them
    for name, rows in same.items():
        plain, plus = (cells("--experiment", name, "digits", config) for config in ("mini", "mini+plus"))
        assert {title for title, _ in plain.values()} == {row["title"] for row in experiment(name)["rows"]}
        assert {title for title, _ in plain.values()} - {title for title, _ in plus.values()} == rows


def test_options_of_a_row_come_after_the_preset_and_the_command_line(cells: Callable[..., Cells]):
    found = cells("--experiment", "ablation_plus", "digits", "mini", "AIR.LORA.CAPTIONS", "all", "AIR.M", "70")
    captions = {title: settings["AIR.LORA.CAPTIONS"] for title, settings in found.values()}
    assert captions["+ gaussian, em, auto"] == "confident" and captions["+ captions"] == "above_median"
    assert captions["+ gaussian, em, auto, captions: AiR plus"] == "all"  # as main.sh digits mini+plus would have it
    assert {settings["AIR.M"] for _, settings in found.values()} == {70}


def test_the_parts_of_the_preset_alone_and_together(cells: Callable[..., Cells]):
    """What a title of the ablation names is what differs from its first row, and nothing else."""
    found = dict(cells("--experiment", "ablation_plus", "digits", "mini").values())
    base = found[experiment("ablation_plus")["baseline"]]
    parts = {
        "auto": ("AIR.LAMBDA", "auto"),
        "gaussian": ("AIR.AUXILIARY", "gaussian"),
        "em": ("AIR.REFINE", "em"),
        "captions": ("AIR.LORA.CAPTIONS", "above_median"),
        "rounds": ("AIR.ROUNDS", 2),
        "beta": ("AIR.BETA", "auto"),
    }
    seen = set()
    for title, settings in found.items():
        if title.startswith("+ "):
            names = title[2:].split(":")[0].split(", ")
            changed = {(key, value) for key, value in settings.items() if value != base[key]}
            assert changed == {parts[name] for name in names}, title
            seen.add(frozenset(names))
    assert {frozenset({name}) for name in parts} - seen == {frozenset({"em"})}  # it needs Gaussian classes
    assert {frozenset(parts) - {"beta"}, frozenset(parts) - {"beta", "rounds"}} <= seen


def test_targets_show_the_preset_unchanged(cells: Callable[..., Cells]):
    for target in ("digits_inverted", "digits_rotated", "digits_noisy"):
        found = dict(cells("--experiment", "targets", target).values())
        *published, alone, without, untrained, plus = found
        assert published == ["zero-shot", "CPL", "AiR over CPL"] and experiment("targets")["baseline"] == "zero-shot"
        assert [alone, untrained] == ["EM without diffusion", "AiR plus, no prompt trained"]
        assert [without, plus] == ["EM without diffusion, prompts trained", "AiR plus"]
        for key, value in written_in(CONFIGS / "presets" / "plus.yaml").items():
            assert found[untrained][key] == found[plus][key] == value
        for one, other in ((alone, untrained), (without, plus)):
            assert {key for key, value in found[one].items() if value != found[other][key]} == {
                "AIR.PROTOTYPES",
                "AIR.PRIOR",
            }
        assert {settings["DATASET.NAME"].lower() for settings in found.values()} == {target.replace("_", "")}


def test_coop_beside_coop_with_the_auxiliary_classifier():
    """Rows come in pairs that differ in nothing else; what AiR alone reads reaches the second of each pair."""
    options = ["AIR.M", "6", "DATASET.TEMPLATE", "a {}."]
    rows, baseline = run.experiment_of("drop_in", options)
    assert baseline is None and [row.trainer for row in rows] == ["CoOp", "CoOp+AiR"] * 3
    for plain, plus in zip(rows[::2], rows[1::2], strict=True):
        assert plus.options == ["AIR.M", "6", *plain.options] and "AIR.M" not in plain.options
        assert plus.title == plain.title.replace("CoOp", "CoOp+AiR")
        assert run.compose(plus.trainer, "mini") == run.compose(plain.trainer, "mini")
    epochs = {
        row["options"]["DATASET.NUM_SHOTS"]: row["options"]["OPTIM.MAX_EPOCH"] for row in experiment("drop_in")["rows"]
    }
    assert epochs == {1: 50, 4: 100, 16: 200}
    assert run.compose("CoOp+AiR", "vit_b32+sd21")[-1] == CONFIGS / "generators" / "sd21.yaml"
    assert run.compose("CoOp", "vit_b32+sd21") == run.compose("CoOp", "vit_b32")


@pytest.mark.parametrize(("options", "expected"), [([], True), (["TRAINER.PROMPT.AUTOCAST", "False"], False)])
def test_every_command_passes_autocast_on(
    options: list[str], expected: bool, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A drop-in never uses it: its backbone is compared with the host's tower."""
    asked: list[bool] = []

    def load(name: str, *, autocast: bool, **others: Any) -> None:
        asked.append(autocast)
        raise UserError("enough")

    for place in ("trainers.prompt_trainer", "air_plugin.clip.loading", "air_plugin.mixin"):
        monkeypatch.setattr(f"{place}.load_backbone", load)
    classes = tmp_path / "classes.txt"
    classes.write_text("one\ntwo\n")
    assert train.main(arguments("UPL", data, tmp_path / "run", *options)) == 2
    images = str(data / "digits" / "images")
    assert air(["lora", images, "--classes", str(classes), "--store", str(tmp_path / "store"), *options]) == 2
    assert asked == [expected, expected]
    with pytest.raises(UserError, match="enough"):
        AuxiliaryMixin._load_backbone(SimpleNamespace(cfg=default(), device="cpu"))
    assert asked[2:] == [False]
