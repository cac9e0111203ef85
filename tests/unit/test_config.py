"""Settings: what is merged, what it becomes, and what people are told when it is wrong."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from yacs.config import CfgNode

from air_plugin import former_settings
from air_plugin.cli import main
from air_plugin.config import (
    AirSettings,
    add_air_config,
    describe,
    flatten,
    merge_file,
    merge_options,
    page,
    upgrade,
    upgrade_options,
    validate,
)
from air_plugin.functional.losses import CandidateForm
from air_plugin.settings import SECTIONS, CandidateLoss, LoraSettings, all_settings
from air_plugin.utils.checks import require_range
from air_plugin.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def cfg() -> CfgNode:
    """Our keys, and of Dassl's some of every type."""
    node = CfgNode(
        {
            "SEED": -1,
            "DATASET": {"NAME": "", "SOURCE_DOMAINS": ()},
            "TRAINER": {"NAME": ""},
            "INPUT": {"SIZE": (224, 224), "PIXEL_MEAN": [0.485, 0.456, 0.406]},
            "OPTIM": {"LR": 0.0003, "MAX_EPOCH": 10},
            "TEST": {"NO_TEST": False},
            "NOTHING": None,
        }
    )
    add_air_config(node)
    return node


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def message(raised: pytest.ExceptionInfo) -> str:
    text = str(raised.value)
    assert "\n" not in text
    return text


# The list of settings


def test_the_node_has_every_setting_once_with_its_default():
    keys = [one.key for one in all_settings()]
    assert len(set(keys)) == len(keys) > 60
    node = CfgNode({"DATASET": {}, "TRAINER": {}, "SEED": 0})
    add_air_config(node)
    add_air_config(node)  # a second call changes nothing
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in flatten(node).items()}
    assert {"SEED": 0, **{one.key: one.default for one in all_settings()}} == values


def test_choices_are_those_of_the_formula():
    assert get_args(CandidateLoss) == get_args(CandidateForm)  # twice, so that settings are read without torch


def test_lists_of_two_configs_are_not_one(cfg: CfgNode):
    cfg.AIR.LORA.TARGETS.append("mine")
    other = CfgNode()
    add_air_config(other)
    assert list(LoraSettings().targets) == other.AIR.LORA.TARGETS


def test_the_defaults_are_valid_and_of_their_type(cfg: CfgNode):
    validate(cfg, *{section.SECTION for section in SECTIONS})
    for one in all_settings():
        assert one.help and not one.help.endswith("."), one.key
        assert not one.choices or one.default in one.choices, one.key


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("TRAINER.PROMPT.VIEWS", 0, "at least 1"),
        ("TRAINER.PROMPT.ENSEMBLE", 0, "at least 1"),
        ("TRAINER.PROMPT.ROUNDS", 0, "at least 1"),
        ("TRAINER.PROMPT.CLASS_TOKEN_POSITION", "start", "one of end, middle, front"),
        ("TRAINER.CPL.ALPHA", 1.5, r"in \[0, 1\]"),
        ("TRAINER.CPL.BETA", -0.1, r"in \[0, 1\]"),
        ("TRAINER.CPL.GAMMA", -1.0, "at least 0"),
        ("TRAINER.CPL.LEVERAGE", float("nan"), "at least 0"),
        ("TRAINER.CPL.PER_CLASS", 0, "at least 1"),
        ("TRAINER.CPL.LOSS", "dd", "one of cc, rc, lw, cav"),
        ("TRAINER.UPL.PER_CLASS", 0, "at least 1"),
        ("TRAINER.AIR.LABELER", "FPL", "one of CPL, UPL"),
        ("DATASET.TEMPLATE", "a photo", "a template with one {}"),
        ("DATASET.NUM_MISSING_CLASSES", -1, "at least 0"),
        ("DATASET.IMBALANCE_RATIO", 0.5, "at least 1"),
    ],
)
def test_a_section_is_checked_by_itself(cfg: CfgNode, key: str, value: Any, said: str):
    cfg.merge_from_list([key, value])
    section = key.rpartition(".")[0]
    validate(cfg, *{other.SECTION for other in SECTIONS} - {section, "AIR"})
    with pytest.raises(UserError, match=rf"^{re.escape(key)} is '?{value}'?; it must be {said}"):
        validate(cfg, section)


def test_the_page_of_settings_is_current():
    """Else: python -m air_plugin.config > docs/configuration.md."""
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert text == page()
    for one in all_settings():
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{one.key}` |")]
        assert one.help.replace("|", "") in row.replace("\\|", "")


def test_what_does_k_do():
    text = "AIR.K 30  (whole number, at least 1)\n    images kept a class, the most typical ones: the prototypes"
    assert describe("AIR.K") == describe("air.k") == describe("K") == text
    assert [line for line in describe("BETA").splitlines() if line[0] != " "] == [
        "TRAINER.CPL.BETA 0.9  (number, in [0, 1])",
        "AIR.BETA 1.0  (number, at least 0, or auto)",
    ]
    assert describe("WORDING").startswith("DATASET.CLASS_NAMES coop") and describe("lora.*rank") == describe("RANK")
    assert "AIR.GUIDANCE" in describe("classifier-free") and describe().count("\n    ") == len(all_settings())
    with pytest.raises(UserError, match=r"unknown setting 'AIR\.LAMDA'; did you mean AIR\.LAMBDA"):
        describe("AIR.LAMDA")


def test_air_settings_shows_them(capsys: pytest.CaptureFixture[str]):
    assert main(["settings", "AIR.K"]) == 0 and capsys.readouterr().out == f"{describe('AIR.K')}\n"
    assert main(["settings"]) == 0 and capsys.readouterr().out == f"{describe()}\n"
    assert main(["settings", "AIR.LAMDA"]) == 2 and "did you mean AIR.LAMBDA" in capsys.readouterr().err


# Former names


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """What was warned of by now; former names are as if none was met before."""
    former_settings.warn_once.cache_clear()
    yield lambda: [record.getMessage().split(";")[0] for record in caplog.records if record.levelname == "WARNING"]
    former_settings.warn_once.cache_clear()


FORMER = [
    ("AIR.HEADLINE", "text", {"AIR.PRIMARY": "text"}, "AIR.HEADLINE is now AIR.PRIMARY"),
    ("DATASET.WORDING", "grip", {"DATASET.CLASS_NAMES": "grip"}, "DATASET.WORDING is now DATASET.CLASS_NAMES"),
    ("DATASET.MISSING", 4, {"DATASET.NUM_MISSING_CLASSES": 4}, "DATASET.MISSING is now DATASET.NUM_MISSING_CLASSES"),
    ("DATASET.RARER", 10.0, {"DATASET.IMBALANCE_RATIO": 10.0}, "DATASET.RARER is now DATASET.IMBALANCE_RATIO"),
    (
        "AIR.LORA.CAPTIONS",
        "surer_half",
        {"AIR.LORA.CAPTIONS": "above_median"},
        "AIR.LORA.CAPTIONS surer_half is now AIR.LORA.CAPTIONS above_median",
    ),
    *(
        (
            "AIR.SOURCE",
            old,
            {"AIR.PROTOTYPES": prototypes, "AIR.PRIOR": prior},
            "AIR.SOURCE is now AIR.PROTOTYPES and AIR.PRIOR",
        )
        for old, prototypes, prior in (
            ("synthetic", "synthetic", "prototypes"),
            ("real", "real", "prototypes"),
            ("none", "real", "none"),
        )
    ),
]


@pytest.mark.parametrize(("key", "value", "today", "warning"), FORMER)
def test_a_former_name_works_everywhere_and_is_warned_of_once(
    cfg: CfgNode, tmp_path: Path, warnings: Any, key: str, value: Any, today: dict[str, Any], warning: str
):
    other = cfg.clone()
    merge_options(cfg, [key, str(value), key, str(value)])
    assert {name: flatten(cfg)[name] for name in today} == today
    tree: Any = value
    for part in reversed(key.split(".")):
        tree = {part: tree}
    merge_file(other, write(tmp_path, "old.yaml", yaml.safe_dump(tree)))
    assert flatten(other) == flatten(cfg)
    expected = [str(part) for pair in today.items() for part in pair]
    assert upgrade_options(["AIR.M", "60", key, str(value)]) == ["AIR.M", "60", *expected]
    assert warnings() == [warning]
    assert upgrade({"AIR.M": 60, key: value, "INPUT.SIZE": [32, 32]}) == {"AIR.M": 60, **today}  # in silence
    assert warnings() == [warning]


@pytest.mark.parametrize(("value", "method"), [(True, "transclip"), (False, "none")])
def test_the_former_switch_of_transclip_is_a_method(
    cfg: CfgNode, tmp_path: Path, warnings: Any, value: bool, method: str
):
    key, today = "TRAINER.TRANSCLIP.ENABLED", "TRAINER.TRANSDUCTION.METHOD"
    other = cfg.clone()
    merge_options(cfg, [key, str(value)])
    tree = {"TRAINER": {"TRANSCLIP": {"ENABLED": value}, "TRANSDUCTION": {"ANCHORS": "images"}}}
    merge_file(other, write(tmp_path, "old.yaml", yaml.safe_dump(tree)))
    assert flatten(cfg)[today] == flatten(other)[today] == method
    assert flatten(other)["TRAINER.TRANSDUCTION.ANCHORS"] == "images"
    assert warnings() == [f"{key} is now {today}"]
    assert upgrade({key: value}) == {today: "transclip of version 0.1" if value else "none"}


def test_todays_names_pass_unchanged_and_in_silence(cfg: CfgNode, warnings: Any):
    settings = {key: value for key, value in flatten(cfg).items() if not key.startswith("INPUT.")}
    assert upgrade(settings) == settings
    options = [str(part) for pair in settings.items() for part in pair]
    assert upgrade_options(options) == options and upgrade_options(["AIR.M"]) == ["AIR.M"]
    assert warnings() == []


def test_todays_name_wins_over_a_former_one_in_a_file(cfg: CfgNode, tmp_path: Path):
    merge_file(
        cfg, write(tmp_path, "both.yaml", "AIR: {PRIMARY: text, HEADLINE: fused, SOURCE: none, PRIOR: prototypes}")
    )
    assert (cfg.AIR.PRIMARY, cfg.AIR.PROTOTYPES, cfg.AIR.PRIOR) == ("text", "real", "prototypes")


@pytest.mark.parametrize("options", [["AIR.SOURCE", "web"], ["AIR.SOURCE", "[real]"]])
def test_a_bad_value_of_a_former_name_is_refused_by_todays(cfg: CfgNode, options: list[str]):
    with pytest.raises(UserError, match=r"^AIR\.PROTOTYPES is "):
        merge_options(cfg, options)
        AirSettings.from_cfg(cfg)


def test_plain_yacs_names_todays_key(cfg: CfgNode):
    with pytest.raises(KeyError, match=r"AIR\.HEADLINE was renamed to AIR\.PRIMARY"):
        cfg.merge_from_list(["AIR.HEADLINE", "text"])
    with pytest.raises(KeyError, match=r"renamed to AIR\.PROTOTYPES and AIR\.PRIOR"):
        cfg.merge_from_list(["AIR.SOURCE", "real"])


# AirSettings


def test_the_defaults_are_valid_and_read_by_name(cfg: CfgNode):
    cfg.AIR.M, cfg.AIR.K, cfg.AIR.LAMBDA, cfg.AIR.PROMPT = 50, 7, 0.5, "a drawing of a {}"
    cfg.AIR.LORA.TARGETS = ["to_q"]
    cfg.AIR.PROTOTYPES, cfg.AIR.AUXILIARY, cfg.AIR.REFINE, cfg.AIR.PRIOR = "real", "gaussian", "em", "none"
    settings = AirSettings.from_cfg(cfg)
    assert (settings.images_per_class, settings.kept_per_class, settings.weight) == (50, 7, 0.5)
    assert settings.prompt == "a drawing of a {}" and settings.lora.targets == ("to_q",)
    assert (settings.prototypes, settings.auxiliary, settings.refine, settings.prior) == (
        "real",
        "gaussian",
        "em",
        "none",
    )
    flat = flatten(cfg.AIR)
    named = {
        "primary": "PRIMARY",
        "beta": "BETA",
        "loss": "LS",
        "form": "AUX_FORM",
        "scale": "AUX_SCALE",
        "generator": "GENERATOR",
        "precision": "PRECISION",
        "steps": "STEPS",
        "guidance": "GUIDANCE",
        "size": "SIZE",
        "batch": "BATCH",
    }
    assert all(getattr(settings, field) == flat[key] for field, key in named.items())
    lora = {key.removeprefix("LORA."): value for key, value in flat.items() if key.startswith("LORA.")}
    for key, value in lora.items():
        assert getattr(settings.lora, key.lower()) == (tuple(value) if key == "TARGETS" else value)


def test_the_data_sets_template_serves_where_no_prompt_is_given(cfg: CfgNode):
    cfg.DATASET.TEMPLATE = "a satellite photo of {}."
    assert AirSettings.from_cfg(cfg).prompt == "a satellite photo of {}."
    cfg.DATASET.TEMPLATE = "a satellite photo"
    with pytest.raises(UserError, match=r"^DATASET\.TEMPLATE is 'a satellite photo'"):
        AirSettings.from_cfg(cfg)


@pytest.mark.parametrize(
    ("per_seed", "seed", "generation_seed", "expected"), [(False, 5, 9, 9), (True, 5, 9, 5), (True, -1, 9, 0)]
)
def test_the_seed_of_generation(cfg: CfgNode, per_seed: bool, seed: int, generation_seed: int, expected: int):
    cfg.SEED, cfg.AIR.GENERATION_PER_SEED, cfg.AIR.GENERATION_SEED = seed, per_seed, generation_seed
    assert AirSettings.from_cfg(cfg).seed == expected


def test_settings_are_frozen(cfg: CfgNode):
    with pytest.raises(AttributeError):
        AirSettings.from_cfg(cfg).steps = 3


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("AIR.K", 121, "120"),
        ("AIR.K", 0, "at least 1"),
        ("AIR.LAMBDA", -0.1, "at least 0"),
        ("AIR.LAMBDA", float("nan"), "at least 0"),
        ("AIR.BETA", -1.0, "at least 0"),
        ("AIR.AUX_SCALE", 0.0, "greater than 0"),
        ("AIR.GUIDANCE", -1.0, "at least 0"),
        ("AIR.STEPS", 0, "in [1, 1000]"),
        ("AIR.SIZE", 0, "at least 1"),
        ("AIR.BATCH", 0, "at least 1"),
        ("AIR.PRIMARY", "fusd", "text, fused"),
        ("AIR.LS", "none", "consistency, synthetic"),
        ("AIR.AUX_FORM", "", "softmax, raw"),
        ("AIR.PROMPT", "a photo", "{}"),
        ("AIR.PROMPT", "a {} and a {}", "{}"),
        ("AIR.PROMPT", "a {} {name}", "{}"),
        ("AIR.PROMPT", "a {} {", "{}"),
        ("AIR.LORA.RANK", 0, "at least 1"),
        ("AIR.LORA.STEPS", 0, "at least 1"),
        ("AIR.LORA.BATCH", 0, "at least 1"),
        ("AIR.LORA.PER_CLASS", 0, "at least 1"),
        ("AIR.LORA.CHECKPOINT", 0, "at least 1"),
        ("AIR.LORA.LR", 0.0, "greater than 0"),
        ("AIR.LORA.TARGETS", [], "at least one"),
        ("AIR.LORA.CAPTIONS", "true", "confident, above_median, all, generic"),
    ],
)
def test_bad_values_are_errors_that_name_key_and_value(cfg: CfgNode, key: str, value: Any, named: str):
    cfg.merge_from_list([key, value])
    with pytest.raises(UserError) as raised:
        AirSettings.from_cfg(cfg)
    said = message(raised)
    assert said.startswith(f"{key} is ") and named in said
    if value not in ("", []):
        assert str(value) in said


@pytest.mark.parametrize(
    ("key", "value"),
    [("AIR.K", 120), ("AIR.LAMBDA", 0.0), ("AIR.BETA", 0.0), ("AIR.GUIDANCE", 0.0), ("AIR.PROMPT", "{{}} {}")],
)
def test_values_on_the_edge_are_valid(cfg: CfgNode, key: str, value: Any):
    cfg.merge_from_list([key, value])
    AirSettings.from_cfg(cfg)


@pytest.mark.parametrize(("value", "good"), [(0, True), (1, True), (0.5, True), (-0.01, False), (1.01, False)])
def test_require_range(value: float, good: bool):
    if good:
        require_range("TRAINER.CPL.ALPHA", value, 0, 1)
    else:
        with pytest.raises(UserError, match=r"TRAINER\.CPL\.ALPHA is .* in \[0, 1\]"):
            require_range("TRAINER.CPL.ALPHA", value, 0, 1)


# merge_options


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("AIR.M", "60", 60),
        ("AIR.LAMBDA", "2", 2.0),
        ("AIR.LAMBDA", "0.5", 0.5),
        ("AIR.LORA.LR", "1e-4", 1e-4),
        ("AIR.LORA.LR", "2.5E-3", 2.5e-3),
        ("AIR.LORA.ENABLED", "False", False),
        ("AIR.LORA.ENABLED", "true", True),
        ("AIR.LORA.TARGETS", "[to_q, to_out.0]", ["to_q", "to_out.0"]),
        ("AIR.LORA.TARGETS", "(to_q, to_v)", ["to_q", "to_v"]),
        ("INPUT.SIZE", "(32, 32)", (32, 32)),
        ("INPUT.SIZE", "[32, 32]", (32, 32)),
        ("DATASET.SOURCE_DOMAINS", "()", ()),
        ("INPUT.PIXEL_MEAN", "[0.5, 0.5, 0.5]", [0.5, 0.5, 0.5]),
        ("AIR.GENERATOR", "owner/model", "owner/model"),
        ("DATASET.TEMPLATE", "a photo of a {}.", "a photo of a {}."),
        ("DATASET.TEMPLATE", "{}", "{}"),
        ("AIR.PROMPT", "style: a {}", "style: a {}"),
        ("AIR.PROMPT", "{}, a type of pet", "{}, a type of pet"),
        ("AIR.PROMPT", "", ""),
        ("AIR.LORA.GENERIC", "no", "no"),
        ("AIR.LORA.GENERIC", "12", "12"),
        ("AIR.LORA.GENERIC", "1e5", "1e5"),
        ("AIR.GENERATOR", "a: b: c", "a: b: c"),
        ("NOTHING", "5", 5),
    ],
)
def test_options_become_the_type_of_their_key(cfg: CfgNode, key: str, text: str, value: Any):
    merge_options(cfg, ["AIR.STEPS", "5", key, text])
    assert flatten(cfg)[key] == value and type(flatten(cfg)[key]) is type(value)
    assert cfg.AIR.STEPS == 5


def test_the_last_of_two_options_wins_and_none_is_none(cfg: CfgNode):
    before = flatten(cfg)
    merge_options(cfg, [])
    assert flatten(cfg) == before
    merge_options(cfg, ["AIR.M", "60", "AIR.M", "70"])
    assert cfg.AIR.M == 70


@pytest.mark.parametrize(
    ("key", "text", "kind"),
    [
        ("AIR.M", "many", "a whole number"),
        ("AIR.M", "60.5", "a whole number"),
        ("AIR.M", "True", "a whole number"),
        ("AIR.M", "[60]", "a whole number"),
        ("AIR.M", "", "a whole number"),
        ("AIR.LAMBDA", "True", "a number"),
        ("AIR.LAMBDA", "two", "a number"),
        ("AIR.LORA.ENABLED", "1", "True or False"),
        ("AIR.LORA.ENABLED", "maybe", "True or False"),
        ("INPUT.SIZE", "32", "a list: (A, B)"),
        ("INPUT.SIZE", "([)", "a list: (A, B)"),
        ("AIR.LORA.TARGETS", "to_q", "a list: [A, B]"),
    ],
)
def test_ill_typed_options_are_errors_that_name_key_value_and_type(cfg: CfgNode, key: str, text: str, kind: str):
    with pytest.raises(UserError) as raised:
        merge_options(cfg, [key, text])
    assert message(raised).startswith(f"{key} is ") and message(raised).endswith(f"; it must be {kind}")


def test_a_key_without_its_value_is_an_error(cfg: CfgNode):
    with pytest.raises(UserError, match=r"'AIR\.K' has no partner"):
        merge_options(cfg, ["AIR.M", "60", "AIR.K"])


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("AIR.LAMDA", "AIR.LAMBDA"),
        ("AIR.LORA.RANKS", "AIR.LORA.RANK"),
        ("air.m", "AIR.M"),
        ("AIR.LORRA.RANK", "AIR.LORA.RANK"),
        ("TRAINER.CPL.ALFA", "TRAINER.CPL.ALPHA"),
    ],
)
def test_unknown_keys_are_errors_with_near_matches(cfg: CfgNode, key: str, near: str):
    with pytest.raises(UserError) as raised:
        merge_options(cfg, [key, "1"])
    said = message(raised)
    assert f"'{key}" in said or said.startswith("unknown config key")
    assert re.search(rf"did you mean .*{re.escape(near)}\b", said)


@pytest.mark.parametrize("key", ["AIR", "AIR.LORA"])
def test_a_section_is_no_value(cfg: CfgNode, key: str):
    with pytest.raises(UserError, match=rf"{re.escape(key)} is a section"):
        merge_options(cfg, [key, "5"])


def test_a_value_is_no_section(cfg: CfgNode):
    with pytest.raises(UserError, match=r"AIR\.M"):
        merge_options(cfg, ["AIR.M.X", "5"])


# merge_file


def test_a_file_is_merged_over_its_base(cfg: CfgNode, tmp_path: Path):
    write(tmp_path, "zero/plain.yaml", "AIR: {M: 10, K: 2}\nOPTIM: {LR: 1e-2}\n")
    write(tmp_path, "middle.yaml", "_BASE_: zero/plain.yaml\nAIR: {K: 3}\nINPUT:\n  SIZE: (32, 32)\n")
    path = write(tmp_path, "one/top.yaml", "# comment\n_BASE_: ../middle.yaml\nAIR: {STEPS: 4}\n")
    merge_file(cfg, path)
    assert (cfg.AIR.M, cfg.AIR.K, cfg.AIR.STEPS, cfg.OPTIM.LR, cfg.INPUT.SIZE) == (10, 3, 4, 0.01, (32, 32))


def test_only_the_asked_sections_are_read_bases_included(cfg: CfgNode, tmp_path: Path):
    write(tmp_path, "base.yaml", "AIR: {M: 10}\nOPTIM: {LR: 1.0}\nFOREIGN: {KEY: 1}\n")
    path = write(tmp_path, "top.yaml", "_BASE_: base.yaml\nAIR: {K: 2}\nMODEL: {NAME: x}\n")
    merge_file(cfg, path, sections=("AIR", "TRAINER"))
    assert (cfg.AIR.M, cfg.AIR.K, cfg.OPTIM.LR) == (10, 2, 0.0003)


CONDITIONAL = """
AIR: {K: 3}
_WHERE_:
  TRAINER.CPL.LOSS cc|rc:
    AIR: {K: 4, STEPS: 5}
  TRAINER.CPL.LOSS rc AIR.REFINE none:
    AIR: {K: 6}
  TRAINER.CPL.LOSS lw:
    OPTIM: {LR: 1.0}
"""


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({"TRAINER.CPL.LOSS": "cc", "AIR.REFINE": "none"}, (4, 5, 0.0003)),
        ({"TRAINER.CPL.LOSS": "rc", "AIR.REFINE": "none"}, (6, 5, 0.0003)),
        ({"TRAINER.CPL.LOSS": "rc", "AIR.REFINE": "em"}, (4, 5, 0.0003)),
        ({"TRAINER.CPL.LOSS": "lw", "AIR.REFINE": "none"}, (3, 20, 1.0)),
        (None, (4, 5, 0.0003)),  # the config's own: cc
        ({}, (3, 20, 0.0003)),
    ],
)
def test_conditional_parts_are_merged_where_all_their_pairs_hold(
    cfg: CfgNode, tmp_path: Path, where: dict[str, str] | None, expected: tuple[int, int, float]
):
    path = write(tmp_path, "top.yaml", f"_BASE_: base.yaml\n{CONDITIONAL}")
    write(tmp_path, "base.yaml", "AIR: {K: 2}\n")
    only = cfg.clone()
    merge_file(cfg, path, where=where)
    assert expected == (cfg.AIR.K, cfg.AIR.STEPS, cfg.OPTIM.LR)
    merge_file(only, path, sections=("AIR",), where=where)
    assert (*expected[:2], 0.0003) == (only.AIR.K, only.AIR.STEPS, only.OPTIM.LR)


def test_an_empty_file_changes_nothing(cfg: CfgNode, tmp_path: Path):
    before = flatten(cfg)
    merge_file(cfg, write(tmp_path, "empty.yaml", "# only a comment\n"))
    assert flatten(cfg) == before


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("AIR: {LAMDA: 1}", "AIR.LAMBDA"),
        ("AIR: {M: many}", "AIR.M"),
        ("AIR: 5", "AIR"),
        ("5: 6", "'5'"),
        ("AIR: {5: 6}", "'AIR.5'"),
        ("AIR: [unclosed", "cannot be read"),
        ("- a\n- b", "no mapping"),
        ("text", "no mapping"),
        ("AIR: {M: 1}\n\tK: 2", "cannot be read"),
        ("_BASE_: other.yaml", "other"),
        ("_BASE_: 5", "unknown config file"),
        ("_WHERE_: 5", "_WHERE_"),
        ("_WHERE_: {TRAINER.CPL.LOSS: {AIR: {K: 1}}}", "'TRAINER.CPL.LOSS' is no condition"),
        ("_WHERE_: {TRAINER.CPL.LOSS cc: 5}", "'TRAINER.CPL.LOSS cc' holds no mapping"),
        ("_WHERE_: {TRAINER.CPL.LOS cc: {AIR: {K: 1}}}", "TRAINER.CPL.LOSS"),
        ("_WHERE_: {TRAINER.CPL.LOSS cc: {AIR: {KK: 1}}}", "AIR.K"),
    ],
)
def test_bad_files_are_errors_that_name_file_and_fault(cfg: CfgNode, tmp_path: Path, text: str, named: str):
    path = write(tmp_path, "bad.yaml", text)
    with pytest.raises(UserError) as raised:
        merge_file(cfg, path)
    assert named in message(raised) and ("bad.yaml" in message(raised) or "_BASE_" in text)


def test_a_file_that_is_no_text_is_an_error(cfg: CfgNode, tmp_path: Path):
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(UserError, match=r"binary\.yaml cannot be read"):
        merge_file(cfg, path)
    with pytest.raises(UserError, match="cannot be read"):
        merge_file(cfg, tmp_path)


def test_a_base_that_leads_back_is_an_error(cfg: CfgNode, tmp_path: Path):
    path = write(tmp_path, "a.yaml", "_BASE_: b.yaml\n")
    write(tmp_path, "b.yaml", "_BASE_: a.yaml\n")
    with pytest.raises(UserError, match="_BASE_"):
        merge_file(cfg, path)


def test_a_missing_file_is_an_error_with_near_matches(cfg: CfgNode, tmp_path: Path):
    write(tmp_path, "mini.yaml", "")
    with pytest.raises(UserError, match="did you mean mini"):
        merge_file(cfg, tmp_path / "mni.yaml")


def test_flatten_gives_full_keys(cfg: CfgNode):
    flat = flatten(cfg)
    assert flat["AIR.LORA.RANK"] == 16 and flat["SEED"] == -1 and flat["INPUT.SIZE"] == (224, 224)
    assert not any(isinstance(value, CfgNode) for value in flat.values())


# What may be chosen without labels


@pytest.mark.parametrize("text", ["auto", "'auto'"])
@pytest.mark.parametrize(("key", "field"), [("LAMBDA", "weight"), ("BETA", "beta")])
def test_what_may_be_auto_may_be_a_number_again(cfg: CfgNode, text: str, key: str, field: str):
    cfg.AIR.LS = "synthetic"
    merge_options(cfg, [f"AIR.{key}", text])
    assert getattr(AirSettings.from_cfg(cfg), field) is None
    merge_options(cfg, [f"AIR.{key}", "auto"])
    merge_options(cfg, [f"AIR.{key}", "3"])
    assert cfg.AIR[key] == 3.0 and isinstance(cfg.AIR[key], float)


@pytest.mark.parametrize("options", [["AIR.LAMBDA", "aut"], ["AIR.AUX_SCALE", "auto"]])
def test_no_other_word_and_no_other_key_is_auto(cfg: CfgNode, options: list[str]):
    with pytest.raises(UserError, match=options[0]):
        merge_options(cfg, options)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        (["AIR.REFINE", "em"], "AIR.AUXILIARY"),
        (["AIR.PRIOR", "none"], "AIR.REFINE"),
        (["AIR.PRIOR_STRENGTH", "data"], "AIR.PRIOR_STRENGTH"),
        (["AIR.ROUNDS", "0"], "AIR.ROUNDS"),
        (["AIR.ROUNDS", "2", "AIR.PROTOTYPES", "real"], "AIR.ROUNDS"),
        (["AIR.ROUNDS", "2", "AIR.LORA.ENABLED", "False"], "AIR.ROUNDS"),
        (["AIR.LAMBDA", "auto", "AIR.AUX_FORM", "raw"], "AIR.AUX_FORM"),
        (["AIR.BETA", "auto", "AIR.LS", "consistency"], "AIR.LS"),
        (["AIR.AUXILIARY", "gaussian", "AIR.AUX_FORM", "raw"], "AIR.AUX_FORM"),
        (["AIR.AUXILIARY", "lda"], "AIR.AUXILIARY"),
    ],
)
def test_what_does_not_go_together_is_refused_by_its_key(cfg: CfgNode, options: list[str], key: str):
    merge_options(cfg, options)
    with pytest.raises(UserError) as raised:
        AirSettings.from_cfg(cfg)
    assert message(raised).startswith(key)
