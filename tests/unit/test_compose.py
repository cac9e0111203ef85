"""From names to a config: facts of data sets, modules that are found, and settings of earlier versions."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import pytest

import scripts.compose
from air_plugin import merging
from air_plugin.merging import read_yaml
from air_plugin.utils.errors import UserError
from scripts.compose import ROOT, dataset_class, facts_of, register_all, resolve, settings_of
from scripts.identity import Inputs, claim, inputs_of

DIGITS = ROOT / "configs" / "datasets" / "digits.yaml"
MINI = ROOT / "configs" / "trainers" / "CPL" / "mini.yaml"
PARADIGMS = ["ul", "ssl", "trzsl"]


def test_published_templates():
    """CoOp's; those of RESISC45 and CUB, which CoOp has not, are GRIP's and CPL's."""
    expected = {
        "caltech101": "a photo of a {}.",
        "cub": "a photo of a {}",
        "digits": "a photo of the digit {}.",
        "digits_inverted": "a photo of the digit {}.",
        "digits_noisy": "a photo of the digit {}.",
        "digits_rotated": "a photo of the digit {}.",
        "dtd": "{} texture.",
        "eurosat": "a centered satellite photo of {}.",
        "fgvc_aircraft": "a photo of a {}, a type of aircraft.",
        "folder": "a photo of a {}.",
        "food101": "a photo of {}, a type of food.",
        "imagenet": "a photo of a {}.",
        "oxford_flowers": "a photo of a {}, a type of flower.",
        "oxford_pets": "a photo of a {}, a type of pet.",
        "resisc45": "a photo of a {}",
        "stanford_cars": "a photo of a {}.",
        "sun397": "a photo of a {}.",
        "ucf101": "a photo of a person doing {}.",
    }
    files = sorted((ROOT / "configs" / "datasets").glob("*.yaml"))
    assert {path.stem: resolve([], dataset_file=path)[0].DATASET.TEMPLATE for path in files} == expected


def test_a_file_or_an_option_sets_another_template(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text("DATASET: {NAME: EuroSAT, TEMPLATE: 'my {}.'}")
    assert resolve([], dataset_file=tmp_path / "mine.yaml")[0].DATASET.TEMPLATE == "my {}."
    cfg, label = resolve([MINI], dataset_file=tmp_path / "mine.yaml", options=["DATASET.TEMPLATE", "a {}"])
    assert cfg.DATASET.TEMPLATE == "a {}" and label.startswith("mini+DATASET.TEMPLATE=a_-")
    cfg, label = resolve([MINI], dataset_file=DIGITS, options=["DATASET.TEMPLATE", "a photo of the digit {}."])
    assert label == "mini"  # it is the data set's own anyway


def test_conditional_parts_follow_options_and_give_way_to_them(tmp_path: Path):
    """What a file has under `_WHERE_` is merged in the file's place: later files, flags and options win."""
    early, late = tmp_path / "early.yaml", tmp_path / "late.yaml"
    early.write_text(
        "_WHERE_:\n"
        "  TRAINER.CPL.LOSS rc: {AIR: {K: 7, M: 70, STEPS: 9}}\n"
        "  SEED 3: {AIR: {SIZE: 64}}\n"
        "  AIR.K 8: {AIR: {SIZE: 128}}\n"
    )
    late.write_text("AIR: {STEPS: 11}\n")

    def seen(*options: str, **flags: int) -> tuple[int, ...]:
        cfg, _ = resolve([early, late], dataset_file=DIGITS, options=options, flags=flags)
        return cfg.AIR.K, cfg.AIR.M, cfg.AIR.STEPS, cfg.AIR.SIZE

    assert seen() == (30, 120, 11, 256)
    assert seen("TRAINER.CPL.LOSS", "rc") == (7, 70, 11, 256)
    assert seen("TRAINER.CPL.LOSS", "rc", "AIR.K", "8", SEED=3) == (8, 70, 11, 128)
    assert seen("TRAINER.CPL.LOSS", "lw", SEED=3) == (30, 120, 11, 64)
    _, label = resolve([early, late], dataset_file=DIGITS, options=["TRAINER.CPL.LOSS", "rc"])
    assert label == "early+late+TRAINER.CPL.LOSS=rc"  # the option, not what follows from it


def test_a_file_is_parsed_once_and_configs_share_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "AIR: {LORA: {TARGETS: [to_q]}}\n_WHERE_: {TRAINER.CPL.LOSS rc: {AIR: {LORA: {TARGETS: [to_k]}}}}\n"
    )
    parsed: list[str] = []
    monkeypatch.setattr(merging, "read_yaml", lambda text: parsed.append(text) or read_yaml(text))
    for options, targets in ((["TRAINER.CPL.LOSS", "rc"], ["to_k"]), ([], ["to_q"])):
        for _ in range(2):
            cfg, _ = resolve([file], options=options)
            found = cfg.AIR.LORA.TARGETS
            assert found == targets
            found.append("to_v")
    assert parsed.count(file.read_text()) == 1
    file.write_text("AIR: {LORA: {TARGETS: [to_v]}}")
    assert resolve([file])[0].AIR.LORA.TARGETS == ["to_v"]


def test_a_class_of_somebody_elses_has_the_default_facts(monkeypatch: pytest.MonkeyPatch):
    from dassl.data.datasets import DATASET_REGISTRY

    foreign = type("Foreign", (), {})
    monkeypatch.setitem(DATASET_REGISTRY._obj_map, "Foreign", foreign)
    cfg, _ = resolve([MINI], options=["DATASET.NAME", "Foreign"])
    assert dataset_class("Foreign") is foreign
    assert cfg.DATASET.TEMPLATE == "a photo of a {}." and facts_of(cfg).has_training_labels
    assert set(inputs_of(cfg).digests) <= {"backbone", "generator"}


def test_an_unknown_data_set_is_an_error_with_near_matches():
    with pytest.raises(UserError, match="unknown data set 'Digit'; did you mean Digits"):
        resolve([], options=["DATASET.NAME", "Digit"])


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import no_such_module_anywhere", r"mine\.py, line 1 cannot be imported \(ModuleNotFoundError: "),
        ("x = 1\n\ny = x.z", r"mine\.py, line 3 cannot be imported \(AttributeError: "),
        ("def f(:", r"mine\.py cannot be imported \(SyntaxError: "),
    ],
)
def test_a_module_that_cannot_be_imported_is_named(
    code: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    package = tmp_path / f"found_{len(code)}"  # none of them is imported already
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "mine.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(scripts.compose, "ROOT", tmp_path)
    with pytest.raises(UserError, match=says) as raised:
        register_all(package.name)
    assert "\n" not in str(raised.value)
    (package / "mine.py").write_text("READ = True")
    register_all(package.name)
    assert sys.modules[f"{package.name}.mine"].READ


def test_a_config_goes_to_another_process_and_comes_back():
    cfg, _ = resolve([MINI], dataset_file=DIGITS, options=["AIR.LAMBDA", "auto"])
    again = pickle.loads(pickle.dumps(cfg))
    assert again == cfg and again.AIR.LAMBDA == "auto" and settings_of(again) == settings_of(cfg)


def test_paradigms_have_folders_of_their_own():
    labels = [resolve([MINI], dataset_file=DIGITS, options=["DATASET.PARADIGM", name])[1] for name in PARADIGMS]
    assert labels == ["mini", "mini+DATASET.PARADIGM=ssl", "mini+DATASET.PARADIGM=trzsl"]


@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_a_run_from_before_paradigms_is_an_unsupervised_one(paradigm: str, tmp_path: Path):
    settings = settings_of(resolve([MINI], dataset_file=DIGITS, options=["DATASET.PARADIGM", paradigm])[0])
    new = ("PARADIGM", "LABELS_PER_CLASS", "SPLIT_SEED", "SEEN_LABELLED")
    old = {key: value for key, value in settings.items() if key not in {f"DATASET.{name}" for name in new}}
    assert len(old) == len(settings) - 4
    (tmp_path / "settings.json").write_text(json.dumps(old))
    (tmp_path / "result.json").write_text('{"a": 1}')
    if paradigm == "ul":
        assert claim(tmp_path, settings, Inputs())
        return
    with pytest.raises(UserError, match=f"DATASET.PARADIGM 'ul' -> '{paradigm}'"):
        claim(tmp_path, settings, Inputs())


@pytest.mark.parametrize(
    ("options", "former"),
    [
        (["AIR.PRIMARY", "text", "AIR.M", "61"], "mini+AIR.HEADLINE=text+AIR.M=61"),
        (["AIR.REFINE", "em", "AIR.PRIOR", "none"], "mini+AIR.REFINE=em+AIR.SOURCE=none"),
        (["AIR.PRIOR", "none", "AIR.PROTOTYPES", "real"], "mini+AIR.SOURCE=none"),
        (["AIR.PROTOTYPES", "real"], "mini+AIR.SOURCE=real"),
        (["AIR.LORA.CAPTIONS", "above_median"], "mini+AIR.LORA.CAPTIONS=surer_half"),
        (["DATASET.NUM_MISSING_CLASSES", "2"], "mini+DATASET.MISSING=2"),
        (["DATASET.IMBALANCE_RATIO", "10"], "mini+DATASET.RARER=10"),
    ],
)
def test_a_folder_in_former_names_is_taken_until_there_is_one_in_todays(
    options: list[str], former: str, tmp_path: Path
):
    def label() -> str:
        return resolve([MINI], dataset_file=DIGITS, options=options, taken=tmp_path)[1]

    today = label()
    assert today not in ("mini", former) and all(f"{key}=" in today for key in options[::2])
    (tmp_path / former).mkdir()
    assert label() == former
    (tmp_path / today).mkdir()
    assert label() == today


def old_settings(settings: dict[str, object]) -> dict[str, object]:
    """As the version before saved them: former names, and nothing of a setting that is new."""
    old = json.loads(json.dumps(settings))
    old["AIR.HEADLINE"] = old.pop("AIR.PRIMARY")
    old["DATASET.MISSING"] = old.pop("DATASET.NUM_MISSING_CLASSES")
    del old["TRAINER.CPL.LEVERAGE"]
    return old


@pytest.mark.parametrize("trainer", ["ZeroshotCLIP", "UPL", "CoOp+AiR"])
def test_a_complete_run_of_the_version_before_is_complete(trainer: str, tmp_path: Path):
    settings = {**settings_of(resolve([MINI], dataset_file=DIGITS)[0]), "TRAINER.NAME": trainer}
    (tmp_path / "settings.json").write_text(json.dumps(old_settings(settings)))
    assert not claim(tmp_path, settings, Inputs())
    (tmp_path / "result.json").write_text('{"a": 1}')
    assert claim(tmp_path, settings, Inputs())
    with pytest.raises(UserError, match=r"other settings \(AIR.PRIMARY "):
        claim(tmp_path, {**settings, "AIR.PRIMARY": "another"}, Inputs())


@pytest.mark.parametrize("refined", [True, False])
def test_no_run_with_the_former_transclip_is_complete(refined: bool, tmp_path: Path):
    options = ["TRAINER.TRANSDUCTION.METHOD", "transclip" if refined else "none"]
    settings = settings_of(resolve([MINI], dataset_file=DIGITS, options=options)[0]) | {"TRAINER.NAME": "ZeroshotCLIP"}
    old = {key: value for key, value in settings.items() if not key.startswith("TRAINER.TRANSDUCTION")}
    (tmp_path / "settings.json").write_text(json.dumps({**old, "TRAINER.TRANSCLIP.ENABLED": refined}))
    (tmp_path / "result.json").write_text('{"a": 1}')
    if not refined:
        assert claim(tmp_path, settings, Inputs())
        return
    with pytest.raises(UserError, match=r"'transclip of version 0\.1' -> 'transclip'"):
        claim(tmp_path, settings, Inputs())


@pytest.mark.parametrize(("trainer", "labeler"), [("CPL", "UPL"), ("AiR", "CPL"), ("AiR", "UPL")])
@pytest.mark.parametrize("saved", [True, False])
def test_no_run_with_the_former_selection_of_cpl_is_complete(trainer: str, labeler: str, saved: bool, tmp_path: Path):
    settings = settings_of(resolve([MINI], dataset_file=DIGITS)[0])
    settings |= {"TRAINER.NAME": trainer, "TRAINER.AIR.LABELER": labeler}
    old = {**settings, "TRAINER.CPL.LEVERAGE": 1.0} if saved else old_settings(settings)
    (tmp_path / "settings.json").write_text(json.dumps(old))
    (tmp_path / "result.json").write_text('{"a": 1}')
    if (trainer, labeler) == ("AiR", "UPL"):
        assert claim(tmp_path, settings, Inputs())
        return
    with pytest.raises(UserError, match=r"other settings \(TRAINER.CPL.LEVERAGE 1.0 -> 2.0\)"):
        claim(tmp_path, settings, Inputs())
