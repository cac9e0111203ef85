"""Fetch a data set, or say what to fetch by hand; lay it out as CoOp does (its DATASETS.md), and check it."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from air_plugin.dataset_settings import Paradigm
from air_plugin.utils.class_names import listed
from air_plugin.utils.errors import UserError, exit_code
from air_plugin.utils.extras import require_extra
from air_plugin.utils.logs import show_logs
from datasets.download import fetch
from datasets.sources import ByHand, Source
from scripts.compose import ROOT, config_file, dataset_class, facts_of, resolve


def parse(argv: list[str] | None) -> argparse.Namespace:
    names = sorted(path.stem for path in (ROOT / "configs" / "datasets").glob("*.yaml"))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", metavar="DATASET", help=", ".join(names))
    parser.add_argument("--root", metavar="DATA", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--check", action="store_true", help="fetch nothing; count images, name what is missing")
    parser.add_argument("--split-family", default="zhou", choices=("zhou", "elevater"), help="whose lists are checked")
    parser.add_argument(
        "--paradigm", default="ul", choices=get_args(Paradigm), help="which training labels are given: DATASET.PARADIGM"
    )
    return parser.parse_args(argv)


def by_hand(items: Sequence[ByHand], folder: Path) -> str:
    """What a person has to fetch, from where and where to."""
    lines = []
    for item in items:
        lines += [f"  {item.what}", f"    from {item.where}", f"    to   {folder / item.puts}"]
    return "\n".join(lines)


def fetch_all(name: str, source: Source, folder: Path) -> bool:
    """Fetch what has a public address and print what has none; returns whether everything that is needed is there."""
    missing = fetch(name, source, folder)
    if missing:
        print(f"{name}: this has no public address, fetch it by hand:\n{by_hand(missing, folder)}")
        return False
    optional = [item for item in source.optional if not item.puts or not (folder / item.puts).exists()]
    if optional:
        print(f"{name}: optional, by hand:\n{by_hand(optional, folder)}")
    return True


def counts(data: Any) -> list[list[Any]]:
    """A row a class: its name, and how many labelled images there are in train, val and test."""
    parts = [Counter(item.label for item in items or ()) for items in (data.train_x, data.val, data.test)]
    return [[name, *(part[label] for part in parts)] for label, name in enumerate(data.classnames)]


def check(name: str, cfg: Any) -> None:
    """Load the data set as a run would, and print how many images of each class there are.

    Raises:
        UserError: something is missing or damaged; the message names the first thing.
    """
    from tabulate import tabulate

    data = dataset_class(cfg.DATASET.NAME)(cfg)
    rows = counts(data)
    total = ["all", *(sum(row[part] for row in rows) for part in (1, 2, 3))]
    print(tabulate([*rows, total], headers=["class", "train", "val", "test"], disable_numparse=[0]))
    unlabelled = sum(item.label < 0 for item in data.train_x)
    if unlabelled:
        print(f"{unlabelled} images in train/ have no label" + ("" if any(total[1:]) else ", and there is no test/"))
    option = ""
    if data.paradigm != "ul":
        classes = f" of unseen classes: {listed([data.classnames[c] for c in data.unseen])}" if data.unseen else ""
        print(f"{len(data.train_u)} unlabelled training images{classes}")
        option = f" DATASET.PARADIGM {data.paradigm}"
    print(f"{name}: complete; run: DATA={shlex.quote(cfg.DATASET.ROOT)} bash scripts/air/main.sh {name}{option}")


def run(args: argparse.Namespace) -> int:
    """Returns the exit code: 0 where the data set is ready, 2 where something is left to do."""
    require_extra("train", purpose="prepare.py")
    name, root = args.dataset, args.root.expanduser().absolute()
    dataset_file = config_file("datasets", name, "data set")
    if not root.is_dir():
        raise UserError(f"data root {root} is missing; make it first: mkdir -p {shlex.quote(str(root))}")
    flags = {"DATASET.ROOT": str(root), "DATASET.SPLIT_FAMILY": args.split_family, "DATASET.PARADIGM": args.paradigm}
    cfg, _ = resolve([], dataset_file=dataset_file, flags=flags)
    facts = facts_of(cfg)
    folder, again = root / facts.dataset_dir, f"python prepare.py {name} --root {shlex.quote(str(root))}"
    if facts.source.generated and args.check and not folder.is_dir():
        raise UserError(f"{folder} is missing; make it: {again}")
    if not args.check and not fetch_all(name, facts.source, folder):
        print(f"then: {again}")
        return 2
    check(name, cfg)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code, 2 for bad input."""
    show_logs()
    return exit_code(lambda: run(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
