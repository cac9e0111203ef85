"""Every YAML that is shipped: it names its command, merges, and its settings are valid."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from air_plugin.config import AirSettings, add_air_config, flatten, merge_file
from air_plugin.utils.errors import UserError
from scripts import run

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
DATASETS = sorted((CONFIGS / "datasets").glob("*.yaml"))
TRAINERS = sorted((CONFIGS / "trainers").glob("*/*.yaml"))
DEFAULTS = [path for path in TRAINERS if path.stem == "default"]
WHOLE = [path for path in TRAINERS if path.stem != "default"]  # with backbone and generator, as `mini`
BACKBONES = sorted((CONFIGS / "backbones").glob("*.yaml"))
GENERATORS = sorted((CONFIGS / "generators").glob("*.yaml"))
EMBEDDED = CONFIGS / "generators" / "mini.yaml"  # goes with the backbone of its name, in every config called mini
PARTS = [path for path in [*BACKBONES, *GENERATORS] if path != EMBEDDED]
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


def test_there_are_configs():
    assert DATASETS and WHOLE and BACKBONES and GENERATORS and EXPERIMENTS
    assert {path.parent for path in DEFAULTS} == {path.parent for path in TRAINERS}  # every trainer can be composed
    assert not {path.stem for path in WHOLE} & {path.stem for path in PARTS} and EMBEDDED in GENERATORS
    assert not {path.stem for path in BACKBONES} & {path.stem for path in GENERATORS}
    assert {path.suffix for path in CONFIGS.rglob("*") if path.is_file()} == {".yaml"}
    everything = [*DATASETS, *TRAINERS, *BACKBONES, *GENERATORS, *EXPERIMENTS, *PRESETS]
    assert sorted(everything) == sorted(CONFIGS.rglob("*.yaml"))  # none lies elsewhere


@pytest.mark.parametrize("path", [*DATASETS, *TRAINERS, *PARTS], ids=label)
def test_the_first_lines_name_the_command(path: Path):
    (command,) = [line for line in comment(path) if line.startswith("bash ")]
    _, script, dataset, *config = command.split()
    assert (CONFIGS / "datasets" / f"{dataset}.yaml").is_file()
    if path in DATASETS:
        assert dataset == path.stem and (ROOT / script).is_file()
    elif path in TRAINERS:
        assert path.parent.name in trainers_of(script)
        assert path in run.compose(path.parent.name, config[0])
    else:
        assert path in run.compose("AiR", config[0])
        assert script == "scripts/air/main.sh"


@pytest.mark.parametrize("path", [*TRAINERS, *BACKBONES, *GENERATORS], ids=label)
def test_a_trainers_config_states_what_to_expect(path: Path):
    (expected,) = [line for line in comment(path) if line.startswith("expected:")]
    assert expected == "expected: unmeasured" or re.search(r"\d", expected)


@pytest.mark.parametrize("dataset", DATASETS, ids=label)
@pytest.mark.parametrize("trainer", WHOLE, ids=label)
def test_configs_merge_and_their_settings_are_valid(dataset: Path, trainer: Path):
    cfg = merged(dataset, trainer)
    settings = AirSettings.from_cfg(cfg)
    assert settings.prompt == (cfg.AIR.PROMPT or cfg.DATASET.TEMPLATE)
    assert cfg.TRAINER.NAME == ""  # the command names the trainer, so that one file may serve several
    assert flatten(cfg) != flatten(default())


@pytest.mark.parametrize("dataset", DATASETS, ids=label)
@pytest.mark.parametrize("trainer", [path.parent.name for path in DEFAULTS])
def test_every_composition_merges_and_is_valid(dataset: Path, trainer: str):
    for backbone in BACKBONES:
        for generator in [None, *GENERATORS]:
            config = "+".join(path.stem for path in (backbone, generator) if path)
            files = run.compose(trainer, config)
            cfg = merged(dataset, *files)
            settings = AirSettings.from_cfg(cfg)
            own = yaml.safe_load(backbone.read_text())
            assert own["MODEL"]["BACKBONE"]["NAME"] == cfg.MODEL.BACKBONE.NAME and cfg.TRAINER.NAME == ""
            if not trainer.endswith("AiR"):
                assert files == run.compose(trainer, backbone.stem)  # no generator, no run of its own
            elif generator:
                assert settings.generator == merged(generator).AIR.GENERATOR
            else:
                assert settings.generator != "mini"


@pytest.mark.parametrize("path", [path for path in TRAINERS if path.stem == "mini"], ids=label)
def test_the_embedded_generators_settings_are_in_every_mini_config(path: Path):
    (command,) = [line for line in comment(EMBEDDED) if line.startswith("python train.py ")]
    named = re.search(r"--trainer (\S+)\+AiR --config-file configs/(\S+)", command)
    assert named and CONFIGS / named[2] in TRAINERS and named[2].split("/")[1] == named[1]
    own, before = flatten(merged(EMBEDDED)), flatten(default())
    changed = {key: value for key, value in own.items() if value != before[key]}
    assert {"AIR.M", "AIR.SIZE", "AIR.LORA.STEPS"} <= changed.keys()
    assert all(key.startswith("AIR.") for key in changed)
    everything = flatten(merged(path))
    assert {key: everything[key] for key in changed} == changed  # so that any trainer may be called with +AiR


@pytest.mark.parametrize("path", PARTS, ids=label)
def test_parts_keep_to_what_is_theirs(path: Path):
    """What a part writes wins over the trainer's and the data set's, so no published value may stand there."""
    written = set(yaml.safe_load(path.read_text()))
    assert written <= ({"MODEL", "INPUT", "TRAINER"} if path in BACKBONES else {"AIR", "_BASE_"})
    cfg, before = merged(path), default()
    changed = {key for key, value in flatten(cfg).items() if value != flatten(before)[key]}
    backbones = {"MODEL.BACKBONE.NAME", "INPUT.SIZE", "INPUT.PIXEL_MEAN", "INPUT.PIXEL_STD", "TRAINER.PROMPT.PREC"}
    assert changed <= backbones if path in BACKBONES else all(key.startswith("AIR.") for key in changed)
    assert not changed & {"AIR.M", "AIR.K", "AIR.LAMBDA", "AIR.BETA", "AIR.LS", "AIR.PRIMARY"}


@pytest.mark.parametrize("path", BACKBONES, ids=label)
def test_a_backbones_images_are_prepared_as_its_weights_were(path: Path):
    """Augmented views follow INPUT, plain ones follow the pretrained weights: they must agree."""
    import open_clip

    from air_plugin.clip.loading import _resolve

    cfg = merged(path)
    architecture, tag, _ = _resolve(cfg.MODEL.BACKBONE.NAME)
    weights = open_clip.get_pretrained_cfg(architecture, tag)
    assert tuple(cfg.INPUT.PIXEL_MEAN) == tuple(weights["mean"]) and tuple(cfg.INPUT.PIXEL_STD) == tuple(weights["std"])
    side = open_clip.get_model_config(architecture)["vision_cfg"]["image_size"]
    assert tuple(cfg.INPUT.SIZE) == (side, side)
    shared = merged(run.compose("ZeroshotCLIP", path.stem)[0])
    assert weights["interpolation"] == shared.INPUT.INTERPOLATION


@pytest.mark.parametrize("dataset", DATASETS, ids=label)
def test_a_data_sets_published_values_stay(dataset: Path):
    """Its CPL quantiles, its template and its name are its own business, whatever is put on top."""
    alone, cfg = merged(dataset), merged(dataset, *run.compose("AiR", "vit_b32"))
    for key in ("TRAINER.CPL.ALPHA", "TRAINER.CPL.BETA", "TRAINER.CPL.GAMMA", "DATASET.TEMPLATE", "DATASET.NAME"):
        assert flatten(cfg)[key] == flatten(alone)[key]


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


def test_the_preset_as_one_file_is_the_same():
    one = merged(CONFIGS / "trainers" / "AiR" / "mini_plus.yaml")
    assert flatten(one) == flatten(merged(*run.compose("AiR", "mini+plus")))


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
    import train

    digits = str(CONFIGS / "datasets" / "digits.yaml")

    def named(config: str, *options: str) -> str:
        return train.label([str(path) for path in run.compose("AiR", config)], digits, list(options))

    assert named("vit_b32") == "vit_b32"
    assert named("vit_b32+sd21") == "vit_b32+sd21"
    assert named("mini") == "mini"
    assert named("mini+plus", "AIR.PRIOR", "none") == "mini+plus+AIR.PRIOR=none"
    assert named("vit_b32+sd21", "AIR.M", "60") == "vit_b32+sd21+AIR.M=60"
    assert train.label([str(CONFIGS / "trainers" / "AiR" / "default.yaml")], digits, []) == "default"


@pytest.mark.parametrize("path", EXPERIMENTS, ids=label)
def test_an_experiment_names_its_command_and_its_rows_are_valid(path: Path):
    from air_plugin.config import merge_options

    (script,) = [line.split("bash ")[1].split()[0] for line in comment(path) if "bash " in line]
    assert f"--experiment {path.stem} " in (ROOT / script).read_text()
    rows, titles = experiment(path.stem)["rows"], [row["title"] for row in experiment(path.stem)["rows"]]
    assert len(set(titles)) == len(titles)
    assert experiment(path.stem).get("baseline", titles[0]) in titles
    for row in rows:
        assert set(row) <= {"title", "trainer", "preset", "options"}
    for row in run.experiment_of(path.stem, [])[0]:
        cfg = merged(DATASETS[0], *run.compose(row.trainer, row.config("mini")))
        merge_options(cfg, row.options)
        AirSettings.from_cfg(cfg)


def written_in(path: Path) -> set[tuple[str, Any]]:
    """The keys of a file with their values."""
    before, after = flatten(default()), flatten(merged(path))
    return {(key, value) for key, value in after.items() if value != before[key]}


@pytest.mark.parametrize("path", PRESETS, ids=label)
def test_no_experiment_writes_a_preset_out(path: Path):
    assert len(written_in(path)) > 3
    named = 0
    for name in (one.stem for one in EXPERIMENTS):
        for row in experiment(name)["rows"]:
            assert not written_in(path) <= set(row.get("options", {}).items()), row["title"]
            named += row.get("preset") == path.stem
    assert named > 10


@pytest.mark.parametrize(
    ("config", "whole"),
    [
        ("mini", "mini+plus"),
        ("mini+plus", "mini+plus"),
        ("mini_plus", "mini_plus"),
        ("vit_b32+sdxl", "vit_b32+sdxl+plus"),
        ("vit_b32+plus+sdxl", "vit_b32+plus+sdxl"),
        ("vit_b32_plus", "vit_b32_plus"),
    ],
)
def test_a_rows_preset_stands_behind_config_once(config: str, whole: str):
    assert run.Row("AiR", [], preset="plus").config(config) == whole
    assert run.Row("AiR", []).config(config) == config
    for trainer in ("AiR", "ZeroshotAiR"):
        preset = CONFIGS / "presets" / "plus.yaml"
        files = run.compose(trainer, whole)
        assert files.count(preset) == (0 if files == [CONFIGS / "trainers" / "AiR" / "mini_plus.yaml"] else 1)


def test_an_unknown_preset_in_an_experiment_is_an_error_for_people(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "presets").symlink_to(CONFIGS / "presets")
    (tmp_path / "configs" / "experiments").mkdir()
    (tmp_path / "configs" / "experiments" / "mine.yaml").write_text("rows: [{title: a, trainer: AiR, preset: pluss}]")
    monkeypatch.setattr(run, "ROOT", tmp_path)
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
    monkeypatch.setattr("air_plugin.report.formats.report", lambda *args, **options: 0)

    def of(*command: str) -> Cells:
        import train

        lines: dict[str, list[str]] = {}
        monkeypatch.setattr(run, "run_all", lambda given, at_once: lines.update(given) or 0)
        monkeypatch.setattr("sys.argv", ["run.py", *command])
        assert run.run(run.parse()) == 0
        found: Cells = {}
        for name, line in lines.items():
            cfg = train.setup_config(train.parse(line))
            folder = Path(cfg.OUTPUT_DIR).relative_to(tmp_path).as_posix()
            assert folder not in found, "two rows are the same cell"
            found[folder] = name.split(" / ")[1], train.resolved(cfg)
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


@pytest.mark.parametrize("config", ["mini", "mini+plus", "mini_plus"])
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
    found = cells("--experiment", "ablation_plus", "digits", "mini", "AIR.LORA.CAPTIONS", "all", "AIR.M", "6")
    captions = {title: settings["AIR.LORA.CAPTIONS"] for title, settings in found.values()}
    assert captions["+ gaussian, em, auto"] == "confident" and captions["+ captions"] == "above_median"
    assert captions["+ gaussian, em, auto, captions: AiR plus"] == "all"  # as main.sh digits mini+plus would have it
    assert {settings["AIR.M"] for _, settings in found.values()} == {6}


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
        for key, value in written_in(CONFIGS / "presets" / "plus.yaml"):
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


@pytest.mark.parametrize("path", DATASETS, ids=label)
def test_a_data_set_names_itself_and_a_config_of_every_trainer(path: Path):
    from dassl.data.datasets import DATASET_REGISTRY

    import train

    for name in train.DATASETS:
        __import__(f"datasets.{name}")
    cfg = merged(path)
    assert cfg.DATASET.NAME in DATASET_REGISTRY.registered_names()
    for folder in {trainer.parent for trainer in TRAINERS}:
        assert run.compose(folder.name, cfg.DATASET.DEFAULT_CONFIG), folder.name


@pytest.mark.parametrize("folder", sorted({path.parent.name for path in TRAINERS}))
def test_the_folder_is_a_registered_trainer(folder: str):
    from dassl.engine import TRAINER_REGISTRY

    import train

    for name in train.TRAINERS:
        __import__(f"trainers.{name}")
    assert folder in TRAINER_REGISTRY.registered_names()


@pytest.mark.parametrize("path", TRAINERS, ids=label)
def test_a_variant_holds_only_its_differences(path: Path):
    base = yaml.safe_load(path.read_text()).get("_BASE_")
    if base is None or "/" in str(base):
        return  # it stands at the beginning, or takes over what another method has; then plain values may be repeated
    before, after = flatten(merged(path.parent / base)), flatten(merged(path))
    changed = {key for key in after if after[key] != before[key]}

    def leaves(tree: dict, prefix: str = "") -> set[str]:
        return {
            key
            for name, value in tree.items()
            for key in (leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}"})
        }

    written = leaves(yaml.safe_load(path.read_text())) - {"_BASE_"}
    assert written == changed
