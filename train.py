"""Train and evaluate one trainer on one data set, with Dassl's usual command line."""

from __future__ import annotations

import argparse
import io
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from air_plugin.utils.errors import UserError, exit_code, unknown
from air_plugin.utils.extras import require_extra
from air_plugin.utils.files import require_writable
from air_plugin.utils.logs import show_logs
from air_plugin.utils.progress import waiting
from scripts.compose import ROOT, register_all, resolve, settings_of
from scripts.identity import SETTINGS, claim, forget_data, give_up, inputs_of, recorded

if TYPE_CHECKING:
    from air_plugin.report.predictions import Predictions
    from air_plugin.report.record import RunResult


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", default="", help="folder of the data sets")
    parser.add_argument("--output-dir", default="./output/run", help="folder of this run")
    parser.add_argument("--resume", default="", help="folder of a run to go on from; --output-dir does so itself")
    parser.add_argument("--seed", type=int, default=-1, help="0 to 4294967295 fixes every random choice")
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
    args.opts = args.opts[1:] if args.opts[:1] == ["--"] else args.opts
    return args


# Set up


def set_up(args: argparse.Namespace) -> tuple[Any, str]:
    """The config that a command line asks for, and its label."""
    flags = {
        "DATASET.ROOT": args.root,
        "DATASET.SOURCE_DOMAINS": args.source_domains,
        "DATASET.TARGET_DOMAINS": args.target_domains,
        "INPUT.TRANSFORMS": args.transforms,
        "TRAINER.NAME": args.trainer,
        "MODEL.BACKBONE.NAME": args.backbone,
        "MODEL.HEAD.NAME": args.head,
        "OUTPUT_DIR": args.output_dir,
        "RESUME": args.resume,
        "SEED": None if args.seed == -1 else args.seed,
    }
    return resolve(args.config_file, dataset_file=args.dataset_config_file, options=args.opts, flags=flags)


# Build


def build(cfg: Any) -> Any:
    """The trainer; registers ours first."""
    from air_plugin.utils.offline import go_offline, is_offline

    require_extra("train", purpose="train.py")
    if is_offline():
        go_offline()  # before any library asks the hub
    with waiting("importing libraries"):
        import torch
        from dassl.data.datasets import DATASET_REGISTRY
        from dassl.engine import TRAINER_REGISTRY, build_trainer
        from dassl.utils import set_random_seed

        from air_plugin.mixin import augment

        register_all("datasets")
        register_all("trainers")
    base = cfg.TRAINER.NAME.removesuffix("+AiR")
    trainers = TRAINER_REGISTRY.registered_names()
    if base in trainers and cfg.TRAINER.NAME not in trainers:
        TRAINER_REGISTRY.register(augment(TRAINER_REGISTRY.get(base)))
    for kind, name, registry, where in (
        ("trainer", cfg.TRAINER.NAME, TRAINER_REGISTRY, "--trainer AiR"),
        ("data set", cfg.DATASET.NAME, DATASET_REGISTRY, "--dataset-config-file configs/datasets/digits.yaml"),
    ):
        if not name:
            raise UserError(f"no {kind} is named; give one, for instance {where}")
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


# Run


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
            "paradigm": getattr(trainer.dm.dataset, "paradigm", "ul"),
            "seed": cfg.SEED,
            "heads": trainer.results,
            "primary": trainer.primary,
            **metrics,
            "other_metrics": {name: metrics[name] for name in sorted(other)},
            "stages": [asdict(stage) for stage in trainer.stages.done],
            "provenance": {**collect(ROOT), "settings": settings_of(cfg), "inputs": recorded(Path(cfg.OUTPUT_DIR))},
        }
    )


def write_bundle(trainer: Any, folder: Path) -> None:
    """The trained classifier, for use outside of training (`air predict`)."""
    from air_plugin.inference.bundle import save_bundle

    cfg = trainer.cfg
    card = {
        "trainer": cfg.TRAINER.NAME,
        "dataset": cfg.DATASET.NAME,
        "template": cfg.DATASET.TEMPLATE,
        "seed": cfg.SEED,
        "transduction": cfg.TRAINER.TRANSDUCTION.METHOD,
    }
    save_bundle(
        folder,
        backbone=trainer.backbone,
        classnames=trainer.classnames,
        **trainer.bundle_heads(),
        primary=trainer.primary,
        card=card,
    )


def put_log_aside(folder: Path) -> None:
    """Rename an interrupted run's log as Dassl names second logs, so that log.txt is the finished run's."""
    log = folder / "log.txt"
    if log.is_file():
        log.rename(log.with_name(time.strftime("log.txt-%Y-%m-%d-%H-%M-%S", time.localtime(log.stat().st_mtime))))


def start_log(folder: Path) -> None:
    """Copy what is printed from now on to the run's log.txt, in UTF-8 whatever the console has."""
    from dassl.utils import setup_logger

    setup_logger(str(folder))
    file = getattr(sys.stdout, "file", None)
    if isinstance(file, io.TextIOWrapper):
        file.reconfigure(encoding="utf-8", errors="backslashreplace")


def write_outputs(trainer: Any, folder: Path, label: str) -> None:
    """What a finished run leaves in its folder; result.json, the mark of completion, comes last."""
    cfg = trainer.cfg
    if hasattr(trainer, "auxiliary"):
        from air_plugin.auxiliary.gallery import plot_gallery
        from air_plugin.utils.plotting import optional_picture

        source = "generated" if cfg.AIR.PROTOTYPES == "synthetic" else "pseudo-labelled"
        prototypes, names = trainer.auxiliary.prototypes, trainer.classnames
        with optional_picture(folder / "gallery.png"):
            plot_gallery(prototypes, names, trainer.unlabelled, folder / "gallery.png", source=source)
    write_bundle(trainer, folder / "bundle")
    predictions(trainer).save(folder / "predictions.json")
    make_result(cfg, trainer, label).save(folder / "result.json")


def run(cfg: Any, label: str, *, train: bool = True) -> int:
    """One run, from its config to result.json, unless it is complete; returns the exit code.

    Args:
        cfg: every setting; cfg.OUTPUT_DIR is the run's folder.
        label: the config's name, for result.json.
        train: False builds the trainer, and nothing more.
    """
    folder = Path(cfg.OUTPUT_DIR)
    require_writable(folder, "--output-dir (scripts: OUTPUT)", folder=True)
    require_extra("train", purpose="train.py")  # data sets that are written on first use need it
    begun = (folder / SETTINGS).exists()
    with waiting("reading data"):
        complete = claim(folder, settings_of(cfg), inputs_of(cfg))
    if complete:
        print(f"{folder}: complete, nothing to do")
        return 0
    forget_data()  # the data may change while this run works
    cfg.freeze()
    put_log_aside(folder)
    start_log(folder)
    try:
        trainer = build(cfg)
    except UserError:
        if not begun:  # nothing was done: no unfinished run for the tables to name
            give_up(folder)
        raise
    if train:
        trainer.train()
        with waiting("writing results"):
            write_outputs(trainer, folder, label)
    return 0


def evaluate(cfg: Any, model_dir: str, *, epoch: int | None) -> int:
    """Test the weights of a run, the last epoch's or those of `epoch`; returns the exit code."""
    cfg.freeze()
    start_log(Path(cfg.OUTPUT_DIR))
    trainer = build(cfg)
    trainer.load_model(model_dir or cfg.OUTPUT_DIR, epoch=epoch)
    trainer.test()
    return 0


def contained(work: Callable[[], int]) -> int:
    """Do some work with our logs shown; its exit code, 2 for bad input. Dassl's logger does not outlive it."""
    console = sys.stdout
    show_logs()
    try:
        return exit_code(work)
    finally:
        log = getattr(sys.stdout, "file", None) if sys.stdout is not console else None
        sys.stdout = console
        if log is not None:
            log.close()


def run_command(args: argparse.Namespace) -> int:
    """What a command line asks for; returns the exit code."""
    if args.offline:
        os.environ["AIR_OFFLINE"] = "1"
    forget_data()
    cfg, label = set_up(args)
    if args.eval_only:
        return evaluate(cfg, args.model_dir, epoch=args.load_epoch)
    return run(cfg, label, train=not args.no_train)


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code, 2 for bad input."""
    return contained(lambda: run_command(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
