"""Runs of one or more trainers on a data set, one for each seed, then the table. All scripts call it.

Completed runs are skipped; interrupted runs resume.

CONFIG is the name of a file in configs/trainers/<trainer>, or a backbone of configs/backbones, alone or with a
generator of configs/generators (vit_b32, vit_b32+sdxl); these go on top of the trainer's default.yaml. A preset of
configs/presets may follow (mini+plus); trainers without a generator ignore it. A row of an experiment
may name a preset, too, which then follows CONFIG in this row.

Environment: DATA (default ./data), OUTPUT (default ./output), SEEDS (default "1 2 3"), JOBS (number of parallel runs;
default: 1; where the config sets AIR.THREADS, cores / AIR.THREADS, or more where the runs end sooner by that),
AIR_OFFLINE (1: no network), PREPARE (0: missing data is not fetched), ENGINE (local, the default, or ray: the runs are
spread over the cluster that RAY_ADDRESS names, or over this machine; JOBS is then what fits by default), GPUS_PER_RUN
(with ENGINE=ray; 0.25: four runs share a GPU; default: 1, or 0 where the cluster has none).
"""

from __future__ import annotations

import argparse
import atexit
import gc
import os
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from air_plugin.config import AirSettings, upgrade_options  # noqa: E402
from air_plugin.transduction_settings import TransductionSettings  # noqa: E402
from air_plugin.utils.errors import UserError, exit_code  # noqa: E402
from air_plugin.utils.extras import require_extra  # noqa: E402
from air_plugin.utils.files import require_writable  # noqa: E402
from air_plugin.utils.logs import show_logs  # noqa: E402
from air_plugin.utils.sections import LARGEST_SEED  # noqa: E402
from scripts.compose import compose, config_file, facts_of, resolve, settings_of, uses_generator  # noqa: E402
from scripts.data import announce_weights, require_data  # noqa: E402
from scripts.display import Display  # noqa: E402
from scripts.experiments import Row, default_config, experiment_of, in_table, rows_of  # noqa: E402
from scripts.identity import claim, forget_data, inputs_of  # noqa: E402
from scripts.titles import remember_titles  # noqa: E402
from scripts.worker import Run  # noqa: E402

RESUME = "run the same command again: completed runs are skipped, interrupted ones resume"
MOST_JOBS = 4  # without JOBS: each of them takes memory
# What CoOp's own script takes after DATASET and CONFIG: CTP NCTX SHOTS CSC.
COOP = ("TRAINER.PROMPT.CLASS_TOKEN_POSITION", "TRAINER.PROMPT.N_CTX", "DATASET.NUM_SHOTS", "TRAINER.PROMPT.CSC")
WITH_TOWER = "take for instance mini_vit, vit_b32 or vit_b16"
Titles = dict[tuple[str, str], str]  # of a table's rows, by trainer and label


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--trainers", help="comma-separated; the last one is what CONFIG belongs to")
    what.add_argument("--experiment", help="name of a file in configs/experiments: many rows, one table")
    parser.add_argument("--coop-arguments", action="store_true", help="CTP NCTX SHOTS CSC follow CONFIG, as in CoOp")
    parser.add_argument("dataset", metavar="DATASET", help="name of a file in configs/datasets")
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="for instance mini, vit_b32 or vit_b32+sdxl")
    parser.add_argument("options", metavar="KEY VALUE", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    if args.config and re.fullmatch(r"[A-Z_]+(\.[A-Z_0-9]+)*", args.config):  # a KEY: no config was named
        args.config, args.options = None, [args.config, *args.options]
    if args.coop_arguments:
        values, args.options = args.options[: len(COOP)], args.options[len(COOP) :]
        if len(values) < len(COOP):
            raise UserError("give DATASET CONFIG CTP NCTX SHOTS CSC; for instance: digits mini end 16 4 False")
        args.options = [*(part for pair in zip(COOP, values, strict=True) for part in pair), *args.options]
    args.options = upgrade_options(args.options)
    return args


def data_root() -> Path:
    if "DATA" not in os.environ:
        require_writable(ROOT / "data", "DATA", folder=True)
        (ROOT / "data").mkdir(exist_ok=True)
    root = Path(os.environ.get("DATA", ROOT / "data"))
    if not root.is_dir():
        raise UserError(f"data root {root} is missing; make it, or name another with DATA=...")
    return root


def output_root() -> Path:
    return Path(os.environ.get("OUTPUT", ROOT / "output")).absolute()


def check_options(options: list[str]) -> None:
    """Raise a UserError for an option without its value, and for what the scripts set themselves."""
    if len(options) % 2:
        raise UserError(f"options are pairs of KEY VALUE; '{options[-1]}' has no partner")
    for key, name in (("SEED", "SEEDS"), ("OUTPUT_DIR", "OUTPUT")):
        if key in options[::2]:
            raise UserError(f"{key} is no option of the scripts; set the environment's {name}")


def seeds() -> list[int]:
    """SEEDS; one that is named twice counts once."""
    given = os.environ.get("SEEDS", "1 2 3")
    found = [whole_number(word) for word in given.split()]
    if not found or not all(0 <= seed <= LARGEST_SEED for seed in found):
        raise UserError(f"SEEDS is '{given}'; it must be whole numbers from 0 to {LARGEST_SEED}, for instance 1 2 3")
    return list(dict.fromkeys(found))


def whole_number(word: str) -> int:
    """Decimal digits as a number; -1 for everything else."""
    return int(word) if re.fullmatch("[0-9]{1,20}", word) else -1


def jobs(runs: list[Run]) -> int:
    """How many runs go on at once: JOBS; else 1 without AIR.THREADS, and `number_at_once`, 4 at the most, with it."""
    from air_plugin.engine import chosen
    from scripts.parallel import number_at_once

    wanted = os.environ.get("JOBS", "")
    if wanted and whole_number(wanted) < 1:
        raise UserError(f"JOBS is '{wanted}'; it must be a whole number, at least 1")
    if wanted:
        return int(wanted)
    if chosen().name != "local":
        return chosen().capacity(gpus=gpus_per_run())
    threads = max(run.cfg.AIR.THREADS for run in runs)
    if threads < 1:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return number_at_once(runs, cores=min(MOST_JOBS, max(1, cores // threads)), most=MOST_JOBS)


def gpus_per_run() -> float:
    """GPUS_PER_RUN; without it 1 where the engine hands out GPUs, else 0."""
    from air_plugin.engine import chosen

    word = os.environ.get("GPUS_PER_RUN", "")
    if not word:
        return min(1.0, chosen().gpus())
    if not re.fullmatch(r"[0-9]+|0?\.[0-9]+", word):
        raise UserError(f"GPUS_PER_RUN is '{word}'; it must be a number of GPUs, for instance 0.25, 1 or 0")
    return float(word)


def resolve_row(row: Row, dataset: str, config: str, *, root: Path, output: Path) -> tuple[Any, str] | None:
    """The config and label of a row; None, with a line that says why, where the row cannot be run.

    Raises:
        UserError: an option is wrong, or the data set is.
    """
    try:
        files = compose(row.trainer, row.config(config))
    except UserError:  # CONFIG is a file of the main trainer's alone
        print(f"left out: {row.name}, which has no configs/trainers/{row.trainer}/{config}.yaml")
        return None
    cfg, label = resolve(
        files,
        dataset_file=config_file("datasets", dataset, "data set"),
        options=row.options,
        flags={"DATASET.ROOT": str(root), "TRAINER.NAME": row.trainer, "AIR.CACHE": str(output / "cache")},
        taken=output / dataset / row.trainer,
    )
    if uses_generator(row.trainer):
        AirSettings.from_cfg(cfg)  # what does not go together is found before the controls run
    learns_from_labels = row.trainer.removesuffix("+AiR") == "CoOp"
    has_labels = cfg.DATASET.PARADIGM != "ul" or facts_of(cfg).has_training_labels
    if learns_from_labels and cfg.DATASET.NUM_SHOTS >= 1 and not has_labels:
        print(f"left out: {row.name}, which needs training labels")
        return None
    rival = TransductionSettings.from_cfg(cfg)
    if rival.needs_images and not uses_generator(row.trainer):
        print(f"left out: {row.name}, which makes no images as anchors of {rival.method}")
        return None
    may_lack = rival.needs_test_labels and not facts_of(cfg).has_training_labels  # else nothing is read
    if may_lack and any(item.label < 0 for item in facts_of(cfg)(cfg).test):
        print(f"left out: {row.name}, which needs test labels")
        return None
    return cfg, label


def list_runs(rows: list[Row], dataset: str, config: str) -> tuple[list[Run], dict[str, Titles]]:
    """Every run, and the titles of the rows by table; of rows that mean the same runs, the first counts.

    A table that the data set cannot serve is left out with a line that says why.

    Raises:
        UserError: nothing can be run.
    """
    root, output = data_root(), output_root()
    runs: dict[str, Run] = {}
    tables: dict[str, Titles] = {}
    refused: dict[str, bool] = {}
    without_tower: list[str] = []
    for row in rows:
        found = None if refused.get(row.table) else resolve_row(row, dataset, config, root=root, output=output)
        if found is None:
            continue
        cfg, label = found
        if not _has_tower(cfg):
            without_tower.append(row.name)
            continue
        if row.table not in refused:
            refused[row.table] = _is_refused(row.table, cfg)
        titles = tables.setdefault(row.table, {})
        if refused[row.table] or (row.trainer, label) in titles:
            continue
        titles[row.trainer, label] = row.title
        for seed in seeds():
            own = cfg.clone()
            own.SEED = seed
            own.OUTPUT_DIR = str(output / dataset / row.trainer / label / f"seed{seed}")
            runs.setdefault(own.OUTPUT_DIR, Run(f"{dataset} / {row.name} / seed {seed}", own, label))
    if without_tower:
        why = f"visual prompts need a vision transformer, and CONFIG {config} has none; {WITH_TOWER}"
        if without_tower[-1] == rows[-1].name and not rows[-1].title:  # a method's script without its method
            raise UserError(f"{why}; or set TRAINER.PROMPT.MODALITY text")
        print(f"left out: {'; '.join(without_tower)}: {why}")
    if not runs:
        raise UserError(f"nothing can be run on {dataset}: every row was left out")
    return list(runs.values()), {table: titles for table, titles in tables.items() if titles}


def _has_tower(cfg: Any) -> bool:
    """Whether the backbone of a config has the image tower that its prompts need."""
    from air_plugin.clip.visual_prompts import has_vision_transformer

    trains = not cfg.TRAINER.NAME.startswith("Zeroshot")
    return not trains or cfg.TRAINER.PROMPT.MODALITY == "text" or has_vision_transformer(cfg.MODEL.BACKBONE.NAME)


def _is_refused(table: str, cfg: Any) -> bool:
    """Whether a data set cannot serve the paradigm or missing classes of a table of several; why is printed."""
    dataset = cfg.DATASET
    if not table or (dataset.PARADIGM == "ul" and not dataset.NUM_MISSING_CLASSES and dataset.IMBALANCE_RATIO == 1):
        return False
    try:
        facts_of(cfg)(cfg)
    except UserError as error:
        print(f"left out: table {table}: {error}")
        return True
    return False


def is_complete(run: Run) -> bool:
    """Whether a run need not be done.

    Raises:
        UserError: its folder holds a run of other settings or inputs.
    """
    folder = Path(run.cfg.OUTPUT_DIR)
    return (folder / "result.json").exists() and claim(folder, settings_of(run.cfg), inputs_of(run.cfg))


def run(args: argparse.Namespace) -> int:
    """All runs of a command, then the table; returns the exit code."""
    require_extra("train", purpose="scripts/run.py")
    with Display() as display:
        with display.working("preparing"):  # the libraries are imported, and data is read, which takes seconds
            runs, tables, baseline = runs_of(args, display)
            waiting = [one for one in runs if not is_complete(one)]
            announce_weights(one.cfg for one in waiting)
        complete = len(runs) - len(waiting)
        if complete:
            display.print(f"{complete} of {len(runs)} runs {'was' if complete == 1 else 'were'} complete")
        if code := do(waiting, display) if waiting else 0:
            return code
        with display.working("reading results"):
            text = "\n".join(table(args, name, titles, baseline) for name, titles in tables.items())
    print(text, end="")
    return 0


def runs_of(args: argparse.Namespace, display: Display) -> tuple[list[Run], dict[str, Titles], str | None]:
    """The runs of a command, the titles of its tables' rows, and the baseline's; missing data is fetched."""
    check_options(args.options)
    forget_data()
    config = args.config or default_config(args.dataset, args.experiment)
    rows, baseline = (
        experiment_of(args.experiment, args.options)
        if args.experiment
        else (rows_of(args.trainers, args.options), None)
    )
    compose(rows[-1].trainer, rows[-1].config(config))  # an unknown CONFIG is an error, not a row that is left out
    require_data(args.dataset, args.options, root=data_root(), display=display)
    runs, tables = list_runs(rows, args.dataset, config)
    require_writable(output_root(), "OUTPUT", folder=True)
    return runs, tables, baseline


def do(runs: list[Run], display: Display) -> int:
    """Do runs; returns the exit code of the first one that failed."""
    from scripts.parallel import run_all

    with display.working("preparing"):  # with ENGINE=ray the cluster is asked
        at_once, gpus = min(jobs(runs), len(runs)), gpus_per_run()
    return run_all(runs, at_once=at_once, gpus=gpus, folders=[output_root(), data_root()], display=display)


def table(args: argparse.Namespace, name: str, titles: Titles, baseline: str | None) -> str:
    """A table with its page. Of a method's script, the last control is the baseline.

    Args:
        args: the command's.
        name: of the table, "" where the experiment has one.
        titles: of its rows, by trainer and label.
        baseline: title of the row that the others are compared with, as the experiment's file has it.
    """
    from air_plugin.report.summary import summarize_results

    folder = output_root() / args.dataset
    if not args.experiment:
        trainers = args.trainers.split(",")
        control = next((cell for cell in titles if cell[0] in trainers[-2:-1]), None)
        page = folder / f"{trainers[-1]}.html"
        return summarize_results(folder.parent, folder.name, titles, baseline=control, page=page, others=True)
    remember_titles(folder / "methods.json", titles)
    row = next((cell for cell, title in titles.items() if title == in_table(baseline or "", name)), None)
    stem = f"{args.experiment}-{name.replace(' ', '-')}" if name else args.experiment
    text = summarize_results(folder.parent, folder.name, titles, baseline=row, page=folder / f"{stem}.html")
    return f"## {stem}\n\n{text}" if name else text


if __name__ == "__main__":
    atexit.register(gc.freeze)  # else the end of the process visits every object of the libraries once more: seconds
    show_logs()
    sys.exit(exit_code(lambda: run(parse()), resume=RESUME))
