"""Runs of one or more trainers on a data set, one a seed, then the table. All scripts call it.

CONFIG is the name of a file in configs/trainers/<trainer>, or a backbone of configs/backbones, by itself or with a
generator of configs/generators (vit_b32, vit_b32+sdxl); these go on top of the trainer's default.yaml. A preset of
configs/presets may stand behind (mini+plus); trainers without a generator omit it. A row of an experiment
may name a preset, too: it then stands behind CONFIG for this row.

Environment: DATA (default ./data), OUTPUT (default ./output), SEEDS (default "1 2 3"), JOBS (runs at once; default: 1,
or as many as there are cores where the config gives every run its number of threads), AIR_OFFLINE (1: no network).
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import re
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from air_plugin.config import upgrade_options, warn_once  # noqa: E402
from air_plugin.utils.errors import UserError, exit_code, unknown  # noqa: E402
from air_plugin.utils.logs import show_logs  # noqa: E402

# What CoOp's own script takes after DATASET and CONFIG: CTP NCTX SHOTS CSC.
COOP = ("TRAINER.PROMPT.CLASS_TOKEN_POSITION", "TRAINER.PROMPT.N_CTX", "DATASET.NUM_SHOTS", "TRAINER.PROMPT.CSC")


@dataclass(frozen=True)
class Row:
    """What is run for every seed: a trainer with its options. An untitled row is called by its trainer and config.

    A preset stands behind CONFIG; the options come after it.
    """

    trainer: str
    options: list[str]
    title: str = ""
    preset: str = ""

    def config(self, config: str) -> str:
        """CONFIG with the row's preset, unless it names that one already: their runs are then the same."""
        named = self.preset in ("", *config.split("+")[1:]) or config.endswith(f"_{self.preset}")
        return config if named else f"{config}+{self.preset}"


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


def config_file(folder: str, name: str, kind: str) -> Path:
    path = ROOT / "configs" / folder / f"{name}.yaml"
    if not path.is_file():
        raise unknown(kind, name, [file.stem for file in path.parent.glob("*.yaml")])
    return path


def draws(trainer: str) -> bool:
    """Whether a trainer has to do with a generator."""
    return trainer.endswith("AiR")


def compose(trainer: str, config: str) -> list[Path]:
    """The files that a CONFIG stands for, in the order in which they are merged.

    Raises:
        UserError: a part of it is unknown, or it names no backbone, or two.
    """
    presets = {path.stem: path for path in (ROOT / "configs" / "presets").glob("*.yaml")}
    own_kind = f"trainers/{trainer.removesuffix('+AiR')}"
    folders = {kind: ROOT / "configs" / kind for kind in (own_kind, "backbones", "generators")}
    files = {kind: {path.stem: path for path in folder.glob("*.yaml")} for kind, folder in folders.items()}
    own = files.pop(own_kind)
    default = own.pop("default")
    if config in own:
        return [own[config]]
    if (today := re.sub(rf"_({'|'.join(presets)})$", r"+\1", config)) != config:
        warn_once(f"CONFIG {config} is now {today}")
        config = today
    chosen = [presets[name] for name in config.split("+")[1:] if name in presets]
    if chosen:
        plain = "+".join(name for name in config.split("+") if name not in presets)
        return [*compose(trainer, plain), *(chosen if draws(trainer) else [])]
    parts: dict[str, list[Path]] = {"backbones": [], "generators": []}
    for name in config.split("+"):
        kind = next((kind for kind in files if name in files[kind]), None)
        if kind is None:
            where = ", ".join(f"configs/{kind}" for kind in folders)
            known = {*own, *files["backbones"], *files["generators"], *presets}
            raise unknown(f"config in {where}:", name, known)
        parts[kind].append(files[kind][name])
    if len(parts["backbones"]) != 1 or len(parts["generators"]) > 1:
        raise UserError(
            f"CONFIG '{config}' must name one backbone and one generator at the most; for instance "
            "vit_b32 or vit_b32+sdxl"
        )
    return [default, *parts["backbones"], *(parts["generators"] if draws(trainer) else [])]


def default_config(dataset_file: Path) -> str:
    import yaml

    return yaml.safe_load(dataset_file.read_text())["DATASET"]["DEFAULT_CONFIG"]


def without_air(options: list[str]) -> list[str]:
    """Options less those that only AiR reads, so that a control is not run again for each of their values."""
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
    import yaml

    experiment = yaml.safe_load(config_file("experiments", name, "experiment").read_text())
    rows = []
    for row in experiment["rows"]:
        given = options if draws(row["trainer"]) else without_air(options)
        own = [str(part) for pair in row.get("options", {}).items() for part in pair]
        preset = config_file("presets", row["preset"], "preset").stem if "preset" in row else ""
        rows.append(Row(row["trainer"], [*given, *own], row["title"], preset))
    return rows, experiment.get("baseline")


def data_root() -> Path:
    if "DATA" not in os.environ:
        (ROOT / "data").mkdir(exist_ok=True)
    root = Path(os.environ.get("DATA", ROOT / "data"))
    if not root.is_dir():
        raise UserError(f"data root {root} is missing; make it, or name another with DATA=...")
    return root


def seeds() -> list[str]:
    found = os.environ.get("SEEDS", "1 2 3").split()
    if not found or not all(seed.isdigit() for seed in found):
        raise UserError(f"SEEDS is '{os.environ.get('SEEDS')}'; it must be whole numbers, for instance \"1 2 3\"")
    return found


def jobs(threads: int) -> int:
    """How many runs go on at once: JOBS; else cores / AIR.THREADS, 4 at the most, or 1 where no threads are set."""
    wanted = os.environ.get("JOBS", "")
    if wanted and not (wanted.isdigit() and int(wanted) > 0):
        raise UserError(f"JOBS is '{wanted}'; it must be a whole number, at least 1")
    if wanted:
        return int(wanted)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(4, max(1, cores // threads)) if threads > 0 else 1


def work(line: list[str], *, quiet: bool) -> tuple[int, str]:
    """One run in this process; returns its exit code and, where it is quiet, what it said on stderr."""
    if not quiet:
        return train.main(line), ""
    errors = io.StringIO()
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(errors):
        return train.main(line), errors.getvalue()


def end_with_parent() -> None:
    """Let a worker end at once when the script is killed, lest it writes to what the next script takes up."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_all(lines: dict[str, list[str]], *, at_once: int) -> int:
    """Runs by name, with train.py's command line; returns the exit code of the first one that failed, else 0."""
    if at_once == 1:
        for name, line in lines.items():
            print(f"== {name}", flush=True)
            code, _ = work(line, quiet=False)
            if code:
                return code
        return 0
    print(f"{len(lines)} runs, {at_once} at a time; each writes its log.txt", flush=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(at_once, mp_context=context, initializer=end_with_parent) as pool:
        waiting = {pool.submit(work, line, quiet=True): name for name, line in lines.items()}
        try:
            for number, future in enumerate(as_completed(waiting), start=1):
                print(f"== {waiting[future]} ({number} of {len(lines)})", flush=True)
                code, said = future.result()
                if said:
                    print(said, end="", file=sys.stderr)
                if code:  # the others may say the same; one line is enough
                    return code
        except BrokenProcessPool:
            raise UserError("a run was killed, perhaps for want of memory; run again with JOBS=1") from None
        finally:
            pool.shutdown(cancel_futures=True)
    return 0


def run(args: argparse.Namespace) -> int:
    if len(args.options) % 2:
        raise UserError(f"options are pairs of KEY VALUE; '{args.options[-1]}' has no partner")
    dataset_file = config_file("datasets", args.dataset, "data set")
    config = args.config or default_config(dataset_file)
    rows, baseline = (
        experiment_of(args.experiment, args.options)
        if args.experiment
        else (rows_of(args.trainers, args.options), None)
    )
    compose(rows[-1].trainer, rows[-1].config(config))
    root, output = data_root(), Path(os.environ.get("OUTPUT", ROOT / "output")).absolute()
    titles: dict[tuple[str, str], str] = {}
    lines: dict[str, list[str]] = {}
    for row in rows:
        try:
            paths = [str(path) for path in compose(row.trainer, row.config(config))]
        except UserError:  # a file of the main trainer's alone
            print(f"left out: {row.title or row.trainer}, which has no configs/trainers/{row.trainer}/{config}.yaml")
            continue
        if args.experiment and args.dataset == "folder" and row.trainer.removesuffix("+AiR") == "CoOp":
            print(f"left out: {row.title}, which needs training labels")
            continue
        options = ["AIR.CACHE", str(output / "cache"), *row.options]
        files = [part for path in paths for part in ("--config-file", path)]
        files += ["--dataset-config-file", str(dataset_file)]
        label = train.label(paths, str(dataset_file), row.options)
        if (row.trainer, label) in titles:
            continue
        titles[row.trainer, label] = row.title
        threads = train.setup_config(train.parse([*files, *options])).AIR.THREADS
        for seed in seeds():
            folder = output / args.dataset / row.trainer / label / f"seed{seed}"
            lines[f"{args.dataset} / {row.title or row.trainer} / {label} / seed {seed}"] = [
                "--root",
                str(root),
                "--seed",
                seed,
                "--trainer",
                row.trainer,
                *files,
                "--output-dir",
                str(folder),
                *options,
            ]
    code = run_all(lines, at_once=min(jobs(threads), len(lines)))
    if code:
        return code
    from air_plugin.report.formats import report

    if not args.experiment:
        try:
            print(report(output, only=args.dataset), end="")
        except UserError as error:  # earlier runs there have another backbone, split or template
            print(f"warning: {error}", file=sys.stderr)
            print(report(output, only=args.dataset, rows=titles), end="")
        return 0
    remember_titles(output / args.dataset / "methods.json", titles)
    baseline = baseline if baseline in titles.values() else None
    page = output / args.dataset / f"{args.experiment}.html"
    print(report(output, only=args.dataset, baseline=baseline, rows=titles, page=page), end="")
    return 0


def remember_titles(path: Path, titles: dict[tuple[str, str], str]) -> None:
    """Let `air report` know the titles of an experiment's rows; those of an earlier one stay as they are."""
    from air_plugin.utils.files import write_atomically

    try:
        known = json.loads(path.read_text())
        cells = {(row["trainer"], row["config"]) for row in known}
    except (FileNotFoundError, ValueError, TypeError, KeyError):  # none yet, or not ours
        known, cells = [], set()
    new = [
        {"trainer": trainer, "config": config, "title": title}
        for (trainer, config), title in titles.items()
        if (trainer, config) not in cells
    ]
    write_atomically(path, json.dumps([*known, *new], indent=1).encode())


if __name__ == "__main__":
    show_logs()
    sys.exit(exit_code(lambda: run(parse())))
