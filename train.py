"""Train and evaluate one trainer on one data set, with Dassl's usual command line."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent
sys.path.append(str(ROOT / "compat"))  # last: an installed Dassl wins, the stand-in serves where there is none

from air_plugin.config import FROM_BACKBONE, upgrade, upgrade_options  # noqa: E402
from air_plugin.utils.errors import UserError, exit_code, unknown  # noqa: E402
from air_plugin.utils.logs import show_logs  # noqa: E402

if TYPE_CHECKING:
    from air_plugin.report.predictions import Predictions
    from air_plugin.report.record import RunResult

TRAINERS = ("zsclip", "coop", "upl", "cpl", "air")
DATASETS = (
    "digits",
    "eurosat",
    "resisc45",
    "oxford_flowers",
    "dtd",
    "cub",
    "fgvc_aircraft",
    "caltech101",
    "oxford_pets",
    "stanford_cars",
    "food101",
    "sun397",
    "ucf101",
    "imagenet",
    "folder",
)
# What may differ between two runs of the same settings.
WHERE = ("OUTPUT_DIR", "RESUME", "DATASET.ROOT", "AIR.CACHE", *FROM_BACKBONE)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", default="", help="folder of the data sets")
    parser.add_argument("--output-dir", default="./output/run", help="folder of this run")
    parser.add_argument("--resume", default="", help="folder of a run to go on from; --output-dir does so itself")
    parser.add_argument("--seed", type=int, default=-1, help="0 or more fixes every random choice")
    parser.add_argument("--source-domains", nargs="+")
    parser.add_argument("--target-domains", nargs="+")
    parser.add_argument("--transforms", nargs="+", help="names of training transforms (INPUT.TRANSFORMS)")
    parser.add_argument(
        "--config-file",
        action="append",
        default=[],
        help="trainer's YAML; more may follow, each with its own --config-file, and are merged in that order",
    )
    parser.add_argument("--dataset-config-file", default="", help="data set's YAML")
    parser.add_argument(
        "--trainer",
        default="",
        help="registered name, for instance AiR; with +AiR behind it (CoOp+AiR) it gains the auxiliary classifier",
    )
    parser.add_argument("--backbone", default="", help="MODEL.BACKBONE.NAME")
    parser.add_argument("--head", default="", help="MODEL.HEAD.NAME")
    parser.add_argument("--eval-only", action="store_true")
    parser.add_argument("--model-dir", default="", help="folder of a run, for --eval-only")
    parser.add_argument("--load-epoch", type=int, help="epoch to load, 1-based")
    parser.add_argument("--no-train", action="store_true")
    parser.add_argument("--offline", action="store_true", help="never use the network; the same as AIR_OFFLINE=1")
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="settings; `air settings` explains ours"
    )
    args = parser.parse_args(argv)
    args.opts = upgrade_options(args.opts[1:] if args.opts[:1] == ["--"] else args.opts)
    return args


def setup_config(args: argparse.Namespace) -> Any:
    """Defaults, then the data set's file, the trainer's files, the flags and the options, as Dassl's clients do."""
    from dassl.config import get_cfg_default

    from air_plugin.config import add_air_config, merge_file, merge_options

    cfg = get_cfg_default()
    add_air_config(cfg)
    for path in (args.dataset_config_file, *args.config_file):
        if path:
            merge_file(cfg, path)
    flags = {
        ("DATASET", "ROOT"): args.root,
        ("DATASET", "SOURCE_DOMAINS"): args.source_domains,
        ("DATASET", "TARGET_DOMAINS"): args.target_domains,
        ("INPUT", "TRANSFORMS"): args.transforms,
        ("TRAINER", "NAME"): args.trainer,
        ("MODEL", "BACKBONE", "NAME"): args.backbone,
        ("MODEL", "HEAD", "NAME"): args.head,
        ("OUTPUT_DIR",): args.output_dir,
        ("RESUME",): args.resume,
    }
    for key, value in flags.items():
        if value:
            node = cfg
            for part in key[:-1]:
                node = node[part]
            node[key[-1]] = value
    if args.seed >= 0:
        cfg.SEED = args.seed
    merge_options(cfg, args.opts)
    if cfg.DATASET.NAME == "Folder" and cfg.DATASET.ROOT and "DATASET.TEMPLATE" not in args.opts[::2]:
        from datasets.folder import template_of

        cfg.DATASET.TEMPLATE = template_of(cfg.DATASET.ROOT) or cfg.DATASET.TEMPLATE
    return cfg


def resolved(cfg: Any) -> dict[str, Any]:
    """A config as plain values by full key, without where things lie; of a person's folder, a mark of its contents."""
    from air_plugin.config import flatten

    settings = {key: value for key, value in flatten(cfg).items() if key not in WHERE}
    if cfg.DATASET.NAME == "Folder" and cfg.DATASET.ROOT:  # everybody's has the same name
        from datasets.folder import contents

        settings["DATASET.CONTENTS"] = contents(cfg.DATASET.ROOT)
    return settings


def claim(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Take a run's folder; its result where it is complete.

    Raises:
        UserError: the folder holds a run of other settings.
    """
    from air_plugin.utils.files import write_atomically

    mark = folder / "settings.json"
    plain = json.loads(json.dumps(settings))
    try:
        known = upgrade(json.loads(mark.read_text()))
    except (FileNotFoundError, ValueError):
        known = plain
        write_atomically(mark, json.dumps(plain, indent=1, sort_keys=True).encode(), durable=True)
    differing = sorted(key for key in plain.keys() | known.keys() if plain.get(key) != known.get(key))
    if differing:
        change = ", ".join(f"{key} {known.get(key)!r} -> {plain.get(key)!r}" for key in differing[:3])
        raise UserError(
            f"{folder} holds a run of other settings ({change}); remove it or choose another --output-dir "
            "(scripts: OUTPUT)"
        )
    try:
        return json.loads((folder / "result.json").read_text())
    except (FileNotFoundError, ValueError):
        return None


def build(cfg: Any) -> Any:
    """The trainer; registers ours first."""
    from importlib import import_module

    import torch
    from dassl.data.datasets import DATASET_REGISTRY
    from dassl.engine import TRAINER_REGISTRY, build_trainer
    from dassl.utils import set_random_seed

    from air_plugin.mixin import augment

    for package, names in (("trainers", TRAINERS), ("datasets", DATASETS)):
        for name in names:
            import_module(f"{package}.{name}")
    base = cfg.TRAINER.NAME.removesuffix("+AiR")
    known = TRAINER_REGISTRY.registered_names()
    if base in known and cfg.TRAINER.NAME not in known:
        TRAINER_REGISTRY.register(augment(TRAINER_REGISTRY.get(base)))
    for kind, name, registry in (
        ("trainer", cfg.TRAINER.NAME, TRAINER_REGISTRY),
        ("data set", cfg.DATASET.NAME, DATASET_REGISTRY),
    ):
        if name not in registry.registered_names():
            raise unknown(kind, name, registry.registered_names())
    if not cfg.DATASET.ROOT:
        raise UserError("no data root; name the folder of the data sets with --root")
    if cfg.SEED >= 0:
        set_random_seed(cfg.SEED)
    if cfg.AIR.THREADS > 0:
        torch.set_num_threads(cfg.AIR.THREADS)
    if torch.cuda.is_available() and cfg.USE_CUDA:
        torch.backends.cudnn.benchmark = True
    return build_trainer(cfg)


def label(config_files: list[str], dataset_config_file: str, options: list[str]) -> str:
    """A config's name: its files' and what the command line changes in them (but not where things lie).

    A trainer's default.yaml is not named where another file is: vit_b32, vit_b32+sdxl.
    """
    from air_plugin.config import flatten, merge_options

    files = [part for file in config_files for part in ("--config-file", file)]
    cfg = setup_config(parse([*files, "--dataset-config-file", dataset_config_file]))
    before = flatten(cfg)
    merge_options(cfg, options)
    changed = {key: value for key, value in flatten(cfg).items() if value != before[key] and key not in WHERE}
    texts = dict(zip(options[::2], options[1::2], strict=True))
    parts = [Path(file).stem for file in config_files]
    parts = [part for part in parts if part != "default"] or parts
    name = "+".join([*parts, *(f"{key}={text}" for key, text in texts.items() if key in changed)])
    name = re.sub(r"[^\w.=,+-]+", "_", name)
    return name if len(name) <= 100 else f"{name[:90]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def predictions(trainer: Any) -> Predictions:
    """The predictions of every head for every test image, images relative to the data root."""
    from air_plugin.report.predictions import Predictions

    root = Path(trainer.predictions["root"])
    images = [
        os.path.relpath(path, root) if Path(path).is_relative_to(root) else path
        for path in trainer.predictions["images"]
    ]
    return Predictions.from_plain({**trainer.predictions, "images": images})


def make_result(cfg: Any, trainer: Any, config: str) -> RunResult:
    """The result of a finished run."""
    from dataclasses import asdict, fields

    from air_plugin.report.record import RunResult
    from air_plugin.utils.provenance import collect

    metrics = trainer.metrics()
    other = metrics.keys() - {field.name for field in fields(RunResult)}
    return RunResult.from_plain(
        {
            "trainer": cfg.TRAINER.NAME,
            "dataset": getattr(trainer.dm.dataset, "dataset_dir", cfg.DATASET.NAME),
            "config": config,
            "backbone": cfg.MODEL.BACKBONE.NAME,
            "split_family": getattr(trainer.dm.dataset, "split_family", cfg.DATASET.SPLIT_FAMILY),
            "template": cfg.DATASET.TEMPLATE,
            "class_names": cfg.DATASET.CLASS_NAMES,
            "seed": cfg.SEED,
            "heads": trainer.results,
            "primary": trainer.primary,
            **metrics,
            "other_metrics": {name: metrics[name] for name in sorted(other)},
            "stages": [asdict(stage) for stage in trainer.stages.done],
            "provenance": {**collect(ROOT), "settings": resolved(cfg)},
        }
    )


def write_bundle(trainer: Any, folder: Path) -> None:
    """The trained classifier, for use outside of training (`air predict`)."""
    from air_plugin.inference.bundle import save_bundle

    cfg = trainer.cfg
    auxiliary = getattr(trainer, "auxiliary", None)
    card = {
        "trainer": cfg.TRAINER.NAME,
        "dataset": cfg.DATASET.NAME,
        "template": cfg.DATASET.TEMPLATE,
        "seed": cfg.SEED,
        "transclip": cfg.TRAINER.TRANSCLIP.ENABLED,
    }
    save_bundle(
        folder,
        backbone=trainer.backbone,
        classnames=trainer.classnames,
        text=trainer.text_features(),
        auxiliary=auxiliary.classifier if auxiliary else None,
        primary=trainer.primary,
        card=card,
    )


def put_log_aside(folder: Path) -> None:
    """Rename an interrupted run's log as Dassl names second logs, so that log.txt is the finished run's."""
    log = folder / "log.txt"
    if log.is_file():
        log.rename(log.with_name(time.strftime("log.txt-%Y-%m-%d-%H-%M-%S", time.localtime(log.stat().st_mtime))))


def run(args: argparse.Namespace) -> int:
    """One run, from the config to result.json; returns the exit code."""
    from air_plugin.utils.extras import require_extra
    from air_plugin.utils.offline import go_offline, is_offline

    require_extra("train", purpose="train.py")
    if args.offline or is_offline():
        go_offline()  # before any library asks the hub
    cfg = setup_config(args)
    folder = Path(cfg.OUTPUT_DIR)
    begun = (folder / "settings.json").exists()
    if not args.eval_only and claim(folder, resolved(cfg)):
        print(f"{folder}: complete, nothing to do")
        return 0
    from dassl.utils import setup_logger

    cfg.freeze()
    if not args.eval_only:
        put_log_aside(folder)
    setup_logger(cfg.OUTPUT_DIR)
    try:
        trainer = build(cfg)
    except UserError:
        if not (begun or args.eval_only):  # nothing was done: no unfinished run for the tables to name
            (folder / "settings.json").unlink(missing_ok=True)
        raise
    if args.eval_only:
        trainer.load_model(args.model_dir or cfg.OUTPUT_DIR, epoch=args.load_epoch)
        trainer.test()
        return 0
    if args.no_train:
        return 0
    trainer.train()
    if hasattr(trainer, "auxiliary"):
        from air_plugin.auxiliary.gallery import plot_gallery

        source = "generated" if cfg.AIR.PROTOTYPES == "synthetic" else "pseudo-labelled"
        prototypes, names = trainer.auxiliary.prototypes, trainer.classnames
        plot_gallery(prototypes, names, trainer.unlabelled, folder / "gallery.png", source=source)
    write_bundle(trainer, folder / "bundle")
    predictions(trainer).save(folder / "predictions.json")
    result = make_result(cfg, trainer, label(args.config_file, args.dataset_config_file, args.opts))
    result.save(folder / "result.json")  # last: it marks the run as complete
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code, 2 for bad input."""
    console = sys.stdout
    show_logs()
    try:
        return exit_code(lambda: run(parse(argv)))
    finally:
        sys.stdout = console


if __name__ == "__main__":
    sys.exit(main())
