"""Our settings in a host's config: stock yacs merges them, the host's own keys stay (reports 24, 26, 30, 31)."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import drop_in_trainers
import pytest
import torch
from dassl_small import tiny_cfg, write_images
from drop_in_trainers import CoOpShape, load_clip
from runs import arguments
from sources import ROOT
from yacs.config import CfgNode

import scripts.run
import train
from air_plugin import AuxiliaryMixin, add_air_config, augment, cli
from air_plugin.config import flatten, validate
from air_plugin.utils.errors import UserError

pytestmark = pytest.mark.public_reports


@pytest.fixture
def host(tmp_path: Path) -> CfgNode:
    """A host's config: Dassl's keys and its own, then ours."""
    from dassl.config import get_cfg_default

    cfg = get_cfg_default()
    cfg.TRAINER.COOP = CfgNode({"N_CTX": 16, "PREC": "fp16"})
    add_air_config(cfg)
    return cfg


# Stock yacs


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("AIR.LAMBDA", "4", 4.0),
        ("AIR.LAMBDA", 1, 1.0),
        ("AIR.LAMBDA", "auto", "auto"),
        ("AIR.BETA", "0", 0.0),
        ("AIR.GUIDANCE", "3", 3.0),
        ("AIR.GUIDANCE", 0, 0.0),
        ("AIR.AUX_SCALE", "1e1", 10.0),
        ("AIR.LORA.LR", "1", 1.0),
        ("AIR.M", "012", 12),
        ("AIR.REVISION", "1234567", "1234567"),
        ("AIR.REVISION", "12e5", "12e5"),
        ("AIR.LORA.ENABLED", "false", False),
        ("AIR.LORA.TARGETS", "(to_k,)", ["to_k"]),
        ("TRAINER.CPL.ALPHA", "1", 1.0),
        ("DATASET.IMBALANCE_RATIO", 5, 5.0),
    ],
)
def test_yacs_own_methods_take_what_ours_take(host: CfgNode, key: str, value: Any, expected: Any, tmp_path: Path):
    """26. From the command line and from a file, twice, and after a copy."""
    *sections, name = key.split(".")
    tree = "".join(f"{'  ' * depth}{section}:\n" for depth, section in enumerate(sections))
    (tmp_path / "one.yaml").write_text(f"{tree}{'  ' * len(sections)}{name}: {value!r}\n")
    before = flatten(host)
    copy, sent = host.clone(), pickle.loads(pickle.dumps(host))
    for cfg in (copy, sent):
        cfg.merge_from_list([key, value, "OPTIM.MAX_EPOCH", "3"])
        cfg.merge_from_list([key, value])
        assert flatten(cfg) == {**before, key: expected, "OPTIM.MAX_EPOCH": 3}
        assert type(flatten(cfg)[key]) is type(expected)
    host.merge_from_file(str(tmp_path / "one.yaml"))
    assert flatten(host) == {**before, key: expected} and type(flatten(host)[key]) is type(expected)
    host.freeze()
    with pytest.raises(AttributeError, match="immutable"):
        host.AIR.LAMBDA = 1.0


def test_auto_and_numbers_follow_each_other(host: CfgNode):
    """26."""
    for value, expected in (("auto", "auto"), ("2", 2.0), ("auto", "auto"), ("auto", "auto"), (0.25, 0.25), (7, 7.0)):
        host.merge_from_list(["AIR.LAMBDA", value])
        assert expected == host.AIR.LAMBDA and type(host.AIR.LAMBDA) is type(expected)


def test_presets_and_generators_are_merged_by_yacs(host: CfgNode):
    """26. Every file of them without `_BASE_`."""
    files = sorted((ROOT / "configs" / "generators").glob("*.yaml")) + sorted((ROOT / "configs/presets").glob("*.yaml"))
    files = [path for path in files if "\n_BASE_" not in path.read_text()]
    assert len(files) >= 5
    for path in files:
        host.merge_from_file(str(path))
    assert (host.AIR.LAMBDA, host.AIR.REFINE, host.AIR.LORA.CAPTIONS) == ("auto", "em", "above_median")
    validate(host, "AIR", "AIR.LORA")


def test_other_keys_are_yacs(host: CfgNode):
    """26."""
    with pytest.raises(ValueError, match="Type mismatch"):
        host.merge_from_list(["OPTIM.LR", "1"])
    with pytest.raises(AssertionError, match=r"Non-existent key: AIR\.LAMDA"):
        host.merge_from_list(["AIR.LAMDA", "1"])
    with pytest.raises(AssertionError, match="odd length"):
        host.merge_from_list(["AIR.K", "1", "AIR.M"])
    with pytest.raises(UserError, match=r"^AIR\.LAMBDA is 'some'"):
        host.merge_from_list(["AIR.LAMBDA", "some"])
    host.merge_from_list(["TRAINER.COOP.N_CTX", "4", "INPUT.SIZE", "(64, 64)"])
    assert host.TRAINER.COOP.N_CTX == 4 and host.INPUT.SIZE == (64, 64)


# A host's own keys


def own_keys(cfg: CfgNode) -> None:
    """Names of ours with other meanings."""
    cfg.TRAINER.PROMPT = CfgNode({"N_CTX": [2, 2], "PREC": "amp", "DEPTH": 9})
    cfg.TRAINER.CPL = "off"
    cfg.TRAINER.UPL = CfgNode({"PER_CLASS": -5})
    cfg.TRAINER.AIR = CfgNode({"LABELER": 3})
    cfg.DATASET.TEMPLATE = ["a photo of a {}.", "an image of a {}."]
    cfg.DATASET.NUM_MISSING_CLASSES = -1


def test_a_hosts_own_keys_stay(tmp_path: Path):
    """30."""
    from dassl.config import get_cfg_default

    cfg, plain = get_cfg_default(), get_cfg_default()
    own_keys(cfg)
    before = flatten(cfg)
    add_air_config(cfg), add_air_config(plain)
    added = {key: value for key, value in flatten(plain).items() if key.startswith("AIR.")}
    assert {key: flatten(cfg)[key] for key in (*before, *added)} == {**before, **added}
    cfg.merge_from_list(["TRAINER.PROMPT.N_CTX", "(4, 4)", "TRAINER.CPL", "on", "AIR.K", "7"])
    assert cfg.TRAINER.PROMPT.N_CTX == [4, 4] and cfg.TRAINER.CPL == "on" and cfg.AIR.K == 7
    with pytest.raises(ValueError, match="Type mismatch"):  # its type is the host's
        cfg.merge_from_list(["DATASET.TEMPLATE", "a {}"])


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., CfgNode]:
    """A config of a small run; every one has the same store."""
    write_images(tmp_path / "colours")
    write_images(tmp_path / "colours" / "apart")

    def config(before: Callable[[CfgNode], None] = lambda cfg: None) -> CfgNode:
        cfg = tiny_cfg(tmp_path / "colours", tmp_path / "run")
        before(cfg)
        add_air_config(cfg)
        cfg.MODEL.BACKBONE.NAME, cfg.DATASET.NAME = "mini", "TinyApart"
        cfg.INPUT.SIZE = (32, 32)
        small = {"CACHE": str(tmp_path / "cache"), "PROTOTYPES": "real", "M": 4, "K": 2, "TEMPLATE": "a {} thing"}
        cfg.merge_from_list([part for key, value in small.items() for part in (f"AIR.{key}", value)])
        return cfg

    return config


class Mine(AuxiliaryMixin, CoOpShape):
    """A drop-in."""


def test_the_drop_in_reads_none_of_a_hosts_keys(make: Callable[..., CfgNode]):
    """30. Neither where they mean something else nor where `clean_cfg` has removed them."""
    from dassl.config import clean_cfg

    cleaned = make()
    clean_cfg(cleaned, "Mine")
    assert sorted(cleaned.TRAINER) == ["NAME"]
    own, plain = make(own_keys), make()
    weights = [Mine(cfg).auxiliary.classifier.weight for cfg in (plain, own, cleaned)]
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])
    cfgs = make(), make()
    cfgs[1].AIR.TEMPLATE = "the sound of {}"
    first, second = map(Mine, cfgs)
    assert first.auxiliary and second.auxiliary
    assert not torch.equal(first.unlabelled.probs, second.unlabelled.probs)  # the template counts
    own.AIR.TEMPLATE = ""
    with pytest.raises(UserError, match=r"^DATASET\.TEMPLATE is \['a photo"):
        Mine(own)


def test_our_trainers_name_what_clean_cfg_removed(make: Callable[..., CfgNode]):
    """30. Defaults in the place of what was set would be another run."""
    from dassl.config import clean_cfg

    from trainers.air import AiR

    cfg = make()
    clean_cfg(cfg, "AiR")
    with pytest.raises(UserError, match=r"no section TRAINER\.PROMPT .* leave out Dassl's clean_cfg"):
        AiR(cfg)


# Names


class ReadsItsName(CoOpShape):
    """A trainer that works under its own name alone, as PromptKD does."""

    def check_cfg(self, cfg: Any) -> None:
        super().check_cfg(cfg)
        assert cfg.TRAINER.NAME == "ReadsItsName"


def test_a_trainer_keeps_its_name(make: Callable[..., CfgNode], monkeypatch: pytest.MonkeyPatch):
    """31."""
    from dassl.engine import TRAINER_REGISTRY, build_trainer

    monkeypatch.setattr(TRAINER_REGISTRY, "_obj_map", {**TRAINER_REGISTRY._obj_map, "ReadsItsName": ReadsItsName})
    TRAINER_REGISTRY.register(augment(ReadsItsName, name="ReadsItsName"), force=True)
    cfg = make()
    cfg.TRAINER.NAME = "ReadsItsName"
    trainer = build_trainer(cfg)
    assert isinstance(trainer, AuxiliaryMixin) and type(trainer).__name__ == "ReadsItsName"
    assert augment(ReadsItsName).__name__ == "ReadsItsName+AiR"


def test_our_backbone_may_have_another_name_than_the_hosts(
    make: Callable[..., CfgNode], monkeypatch: pytest.MonkeyPatch
):
    """31."""

    def by_their_name(cfg: Any) -> Any:
        assert cfg.MODEL.BACKBONE.NAME == "their/name"
        return load_clip(make())

    monkeypatch.setattr(drop_in_trainers, "load_clip", by_their_name)
    cfg, plain = make(), make()
    cfg.MODEL.BACKBONE.NAME, cfg.AIR.BACKBONE = "their/name", "mini"
    mine = Mine(cfg).auxiliary.classifier.weight
    monkeypatch.undo()
    assert torch.equal(mine, Mine(plain).auxiliary.classifier.weight)
    cfg.AIR.BACKBONE_PRECISION = "fp64"
    with pytest.raises(UserError, match=r"^AIR\.BACKBONE_PRECISION is 'fp64'; it must be one of fp32, fp16, bf16"):
        Mine(cfg)


@pytest.mark.parametrize(
    ("key", "value", "instead"),
    [
        ("AIR.BACKBONE", "mini", "MODEL.BACKBONE.NAME"),
        ("AIR.BACKBONE_PRECISION", "bf16", "TRAINER.PROMPT.PREC"),
        ("AIR.TEMPLATE", "a {}", "DATASET.TEMPLATE"),
    ],
)
def test_what_only_a_drop_in_reads_is_refused_elsewhere(
    key: str, value: str, instead: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """30, 31. It would change nothing, in silence."""
    (tmp_path / "classes.txt").write_text("one\ntwo\n")
    stage = ["lora", str(tmp_path), "--classes", str(tmp_path / "classes.txt"), key, value]
    for main, words in ((train.main, arguments("AiR", tmp_path, tmp_path / "run", key, value)), (cli.main, stage)):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert f"error: {key} is {value}; it must be left out" in error and f"set {instead}\n" in error


# Messages


def test_a_missing_trainer_or_data_set_is_called_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """24."""
    words = arguments("UPL", tmp_path, tmp_path / "run")
    at = words.index("--trainer")
    assert train.main(words[:at] + words[at + 2 :]) == 2
    assert "error: no trainer is named; give one, for instance --trainer AiR\n" in capsys.readouterr().err
    at = words.index("--dataset-config-file")
    assert train.main(words[:at] + words[at + 2 :]) == 2
    assert "error: no data set is named; give one, for instance --dataset-config-file" in capsys.readouterr().err
    assert not (tmp_path / "run" / "settings.json").exists()


@pytest.mark.parametrize("trainer", ["UPL", "AiR", "CoOp", "CoOp+AiR"])
def test_shots_of_images_without_labels(trainer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """24. A trainer without labels was told to use itself."""
    write_images(tmp_path / "train")
    (tmp_path / "classes.txt").write_text("red\ngreen\nblue\n")
    words = arguments(trainer, tmp_path, tmp_path / "run", "DATASET.NUM_SHOTS", "2")
    words[words.index("--dataset-config-file") + 1] = str(ROOT / "configs" / "datasets" / "folder.yaml")
    assert train.main(words) == 2
    error = capsys.readouterr().err
    assert ("use UPL, CPL or AiR" in error) is trainer.startswith("CoOp")
    assert (f"{trainer} needs none; leave it out" in error) is not trainer.startswith("CoOp")


def test_scripts_leave_out_what_learns_from_labels_alone(tmp_path: Path):
    """24."""
    write_images(tmp_path / "train")
    (tmp_path / "classes.txt").write_text("red\ngreen\nblue\n")
    shots = ["DATASET.NUM_SHOTS", "2"]
    found = {
        name: scripts.run.resolve_row(
            scripts.run.Row(name, shots), "folder", "mini", root=tmp_path, output=tmp_path / "output"
        )
        for name in ("CoOp", "CoOp+AiR", "CPL")
    }
    assert [name for name, row in found.items() if row is None] == ["CoOp", "CoOp+AiR"]
