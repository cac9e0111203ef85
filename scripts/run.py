"""Runs of one or more trainers on a data set, one a seed, then the table. The scripts/*/main.sh call it.

Environment: DATA (default ./data), OUTPUT (default ./output), SEEDS (default "1 2 3").
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from air_plugin.errors import UserError, exit_code, unknown  # noqa: E402


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainers", required=True, help="comma-separated; the last one is what CONFIG belongs to")
    parser.add_argument("dataset", metavar="DATASET", help="name of a file in configs/datasets")
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="name of a file in configs/trainers/<trainer>")
    parser.add_argument("options", metavar="KEY VALUE", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    args.trainers = args.trainers.split(",")
    if args.config and re.fullmatch(r"[A-Z_]+(\.[A-Z_0-9]+)*", args.config):  # a KEY: no config was named
        args.config, args.options = None, [args.config, *args.options]
    return args


def config_file(folder: str, name: str, kind: str) -> Path:
    path = ROOT / "configs" / folder / f"{name}.yaml"
    if not path.is_file():
        raise unknown(kind, name, [file.stem for file in path.parent.glob("*.yaml")])
    return path


def default_config(dataset_file: Path) -> str:
    import yaml

    return yaml.safe_load(dataset_file.read_text())["DATASET"]["DEFAULT_CONFIG"]


def without_air(options: list[str]) -> list[str]:
    """Options less those that only AiR reads, so that a control is not run again for each of their values."""
    pairs = zip(options[::2], options[1::2], strict=False)
    return [part for key, value in pairs if not key.startswith("AIR.") for part in (key, value)]


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


def run(args: argparse.Namespace) -> int:
    if len(args.options) % 2:
        raise UserError(f"options are pairs of KEY VALUE; '{args.options[-1]}' has no partner")
    dataset_file = config_file("datasets", args.dataset, "data set")
    config = args.config or default_config(dataset_file)
    config_file(f"trainers/{args.trainers[-1]}", config, "config")
    root, output = data_root(), Path(os.environ.get("OUTPUT", ROOT / "output"))
    for trainer in args.trainers:
        path = ROOT / "configs" / "trainers" / trainer / f"{config}.yaml"
        options = args.options if trainer == args.trainers[-1] else without_air(args.options)
        for seed in seeds() if path.is_file() else []:
            folder = output / args.dataset / trainer / train.label(config, options) / f"seed{seed}"
            print(f"== {args.dataset} / {trainer} / {config} / seed {seed}", flush=True)
            code = train.main([
                "--root", str(root), "--seed", seed, "--trainer", trainer, "--config-file", str(path),
                "--dataset-config-file", str(dataset_file), "--output-dir", str(folder),
                "AIR.CACHE", str(output / "cache"), *options,
            ])  # fmt: skip
            if code:
                return code
    from air_plugin.report import report

    return report(output, only=args.dataset)


if __name__ == "__main__":
    sys.exit(exit_code(lambda: run(parse())))
