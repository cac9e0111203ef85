"""Runs of one or more trainers on a data set, one for each seed, then the table. All scripts call it.

Completed runs are skipped; interrupted runs resume.

CONFIG is the name of a file in configs/trainers/<trainer>, or a backbone of configs/backbones, alone or with a
generator of configs/generators (vit_b32, vit_b32+sdxl); these go on top of the trainer's default.yaml. A preset of
configs/presets may follow (mini+plus); trainers without a generator ignore it. A row of an experiment
may name a preset, too, which then follows CONFIG in this row.

Environment: DATA (default ./data), OUTPUT (default ./output), SEEDS (default "1 2 3"), JOBS (number of parallel runs;
default: 1; where the config sets AIR.THREADS, cores / AIR.THREADS, or more where the runs end sooner by that),
AIR_OFFLINE (1: no network), ENGINE (local, the default, or ray: the runs are spread over the cluster that RAY_ADDRESS
names, or over this machine; JOBS is then what fits by default), GPUS_PER_RUN (with ENGINE=ray; 0.25: four runs share a
GPU; default: 1, or 0 where the cluster has none).
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from air_plugin.config import read_yaml, upgrade_options  # noqa: E402
from air_plugin.engine import chosen  # noqa: E402
from air_plugin.utils.errors import UserError, exit_code  # noqa: E402
from air_plugin.utils.files import require_writable  # noqa: E402
from air_plugin.utils.logs import show_logs  # noqa: E402
from air_plugin.utils.sections import LARGEST_SEED  # noqa: E402
from scripts.compose import compose, config_file, facts_of, resolve, uses_generator  # noqa: E402
from scripts.identity import forget_data  # noqa: E402
from scripts.parallel import number_at_once, run_all  # noqa: E402
from scripts.titles import remember_titles  # noqa: E402
from scripts.worker import Run  # noqa: E402

MOST_JOBS = 4  # without JOBS: each of them takes memory
# What CoOp's own script takes after DATASET and CONFIG: CTP NCTX SHOTS CSC.
COOP = ("TRAINER.PROMPT.CLASS_TOKEN_POSITION", "TRAINER.PROMPT.N_CTX", "DATASET.NUM_SHOTS", "TRAINER.PROMPT.CSC")


@dataclass(frozen=True)
class Row:
    """A row of the table: a trainer with its options, run for every seed. Without a title it has the trainer's name.

    The preset follows CONFIG, and the options come after it.
    """

    trainer: str
    options: list[str]
    title: str = ""
    preset: str = ""

    def config(self, config: str) -> str:
        """CONFIG with the row's preset, unless it names that one already: their runs are then the same."""
        named = self.preset in ("", *config.split("+")[1:]) or config.endswith(f"_{self.preset}")
        return config if named else f"{config}+{self.preset}"

    @property
    def name(self) -> str:
        return self.title or self.trainer


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


def default_config(dataset_file: Path) -> str:
    return read_yaml(dataset_file.read_text("utf-8"))["DATASET"]["DEFAULT_CONFIG"]


def without_air(options: list[str]) -> list[str]:
    """The options without those that only AiR reads, so that a control is not run again for each of their values."""
    pairs = zip(options[::2], options[1::2], strict=False)
    return [part for key, value in pairs if not key.startswith("AIR.") for part in (key, value)]


def rows_of(trainers: str, options: list[str]) -> list[Row]:
    """The rows of a method's main.sh: the controls, then the method itself."""
    *controls, main = trainers.split(",")
    return [*(Row(trainer, without_air(options)) for trainer in controls), Row(main, options)]


def experiment_of(name: str, options: list[str]) -> tuple[list[Row], str | None]:
    """The rows of an experiment and the title of its baseline; rows' own options come after the command line's.

    Raises:
        UserError: there is no such experiment, or a row names an unknown preset.
    """
    experiment = read_yaml(config_file("experiments", name, "experiment").read_text("utf-8"))
    rows = []
    for row in experiment["rows"]:
        given = options if uses_generator(row["trainer"]) else without_air(options)
        own = [str(part) for pair in row.get("options", {}).items() for part in pair]
        preset = config_file("presets", row["preset"], "preset").stem if "preset" in row else ""
        rows.append(Row(row["trainer"], [*given, *own], row["title"], preset))
    return rows, experiment.get("baseline")


def data_root() -> Path:
    if "DATA" not in os.environ:
        require_writable(ROOT / "data", "DATA", folder=True)
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
    learns_from_labels = row.trainer.removesuffix("+AiR") == "CoOp"
    has_labels = cfg.DATASET.PARADIGM != "ul" or facts_of(cfg).has_training_labels
    if learns_from_labels and cfg.DATASET.NUM_SHOTS >= 1 and not has_labels:
        print(f"left out: {row.name}, which needs training labels")
        return None
    return cfg, label


def list_runs(rows: list[Row], dataset: str, config: str) -> tuple[list[Run], dict[tuple[str, str], str]]:
    """Every run, and the titles of the rows by trainer and label; of rows that mean the same runs, the first counts.

    Raises:
        UserError: nothing can be run.
    """
    root, output = data_root(), output_root()
    runs: list[Run] = []
    titles: dict[tuple[str, str], str] = {}
    for row in rows:
        found = resolve_row(row, dataset, config, root=root, output=output)
        if found is None or (row.trainer, found[1]) in titles:
            continue
        cfg, label = found
        titles[row.trainer, label] = row.title
        for seed in seeds():
            own = cfg.clone()
            own.SEED = seed
            own.OUTPUT_DIR = str(output / dataset / row.trainer / label / f"seed{seed}")
            runs.append(Run(f"{dataset} / {row.name} / {label} / seed {seed}", own, label))
    if not runs:
        raise UserError(f"nothing can be run on {dataset}: every row was left out")
    return runs, titles


def run(args: argparse.Namespace) -> int:
    """All runs of a command, then the table; returns the exit code."""
    check_options(args.options)
    forget_data()
    config = args.config or default_config(config_file("datasets", args.dataset, "data set"))
    rows, baseline = (
        experiment_of(args.experiment, args.options)
        if args.experiment
        else (rows_of(args.trainers, args.options), None)
    )
    compose(rows[-1].trainer, rows[-1].config(config))  # an unknown CONFIG is an error, not a row that is left out
    runs, titles = list_runs(rows, args.dataset, config)
    require_writable(output_root(), "OUTPUT", folder=True)
    at_once = min(jobs(runs), len(runs))
    code = run_all(runs, at_once=at_once, gpus=gpus_per_run(), folders=[output_root(), data_root()])
    if not code:
        print(table(args, titles, baseline), end="")
    return code


def table(args: argparse.Namespace, titles: dict[tuple[str, str], str], baseline: str | None) -> str:
    """The table; of an experiment, its page is written, too."""
    from air_plugin.report.formats import report

    output = output_root()
    if not args.experiment:
        try:
            return report(output, only=args.dataset)
        except UserError as error:  # earlier runs there have another backbone, split or template
            print(f"warning: {error}", file=sys.stderr)
            return report(output, only=args.dataset, rows=titles)
    remember_titles(output / args.dataset / "methods.json", titles)
    baseline = baseline if baseline in titles.values() else None
    page = output / args.dataset / f"{args.experiment}.html"
    return report(output, only=args.dataset, baseline=baseline, rows=titles, page=page)


if __name__ == "__main__":
    show_logs()
    sys.exit(exit_code(lambda: run(parse())))
