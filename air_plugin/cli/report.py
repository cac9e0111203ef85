"""`air report | settings`: tables and pages of results, and the meaning of settings."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from air_plugin.cli.parsing import add_command
from air_plugin.utils.files import require_writable

if TYPE_CHECKING:
    from air_plugin.cli.parsing import Commands

OUTPUT = Path("output")  # where the scripts write


def add(commands: Commands) -> None:
    """The commands of this module."""
    parser = add_command(
        commands,
        "report",
        "tables or a page of a folder of results",
        run=run_report,
        examples=(
            "air report digits",
            "air report output --baseline CPL --details",
            "air report output/digits --format html",
        ),
    )
    add_arguments(parser)
    parser = add_command(
        commands,
        "settings",
        "default, valid values and meaning of the settings",
        run=run_settings,
        examples=("air settings AIR.K", "air settings lora"),
    )
    parser.add_argument(
        "pattern", metavar="PATTERN", nargs="?", default="", help="for instance AIR.K, or lora; none: every setting"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `air report`."""
    several: dict[str, Any] = {"nargs": "+", "action": "extend", "default": []}
    parser.add_argument(
        "output",
        metavar="FOLDER",
        type=Path,
        help="the scripts' OUTPUT, a data set's folder in it, or the name of one in output/",
    )
    parser.add_argument("--format", choices=("github", "latex", "csv", "html"), default="github", help="of the tables")
    parser.add_argument("--out", metavar="FILE", type=Path, help="default: the terminal; html: FOLDER/report.html")
    parser.add_argument("--ci95", action="store_true", help="+- is half of the 95 %% interval over seeds")
    parser.add_argument("--baseline", metavar="TITLE", help="a row; adds every other row's difference to it")
    parser.add_argument("--dataset", metavar="NAME", help="only these columns, in this order", **several)
    parser.add_argument("--method", metavar="TITLE", help="only these rows, called as in the table", **several)
    parser.add_argument("--backbone", metavar="NAME", help="only results with this backbone")
    parser.add_argument("--split-family", metavar="NAME", help="only results with this split family")
    parser.add_argument("--paradigm", metavar="NAME", help="only results of this paradigm: ul, ssl or trzsl")
    parser.add_argument("--details", action="store_true", help="every head, the pseudo-labels and every seed, too")


def run_report(args: argparse.Namespace) -> int:
    """Print the tables of a folder of results, or write its page."""
    from air_plugin.report.formats import report

    if args.out:
        require_writable(args.out, "--out")
    text = report(
        named(args.output),
        datasets=args.dataset,
        methods=args.method,
        backbone=args.backbone,
        split_family=args.split_family,
        paradigm=args.paradigm,
        baseline=args.baseline,
        form=args.format,
        out=args.out,
        ci95=args.ci95,
        details=args.details,
    )
    print(text, end="")
    return 0


def named(folder: Path) -> Path:
    """A folder of results; the name of one in output/ stands for it where there is no such folder here."""
    return OUTPUT / folder if not folder.exists() and (OUTPUT / folder).is_dir() else folder


def run_settings(args: argparse.Namespace) -> int:
    """Print settings with their meaning."""
    from air_plugin.config import describe

    print(describe(args.pattern))
    return 0
