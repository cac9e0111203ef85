"""`air predict`: a trained classifier in use."""

from __future__ import annotations

import argparse
import csv
import io
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from air_plugin.cli.parsing import add_command, add_place
from air_plugin.utils.devices import pick_device
from air_plugin.utils.files import csv_text, require_writable, write_atomically
from air_plugin.utils.logs import escape_unshowable

if TYPE_CHECKING:
    from air_plugin.cli.parsing import Commands
    from air_plugin.inference.predict import Bundle, Prediction


def add(commands: Commands) -> None:
    """The commands of this module."""
    parser = add_command(
        commands,
        "predict",
        "classify images by a classifier's folder (bundle)",
        run=run_predict,
        examples=(
            "air predict classifier photos > labels.tsv",
            "air predict output/folder/AiR/vit_b32/seed1/bundle photos --csv labels.csv --top 3",
        ),
        about=(
            "Prints a line an image, with tabs between the fields: path, label, probability, then further classes and "
            "their probabilities up to --top. A file that cannot be read is left out, with a warning on stderr."
        ),
    )
    add_predict(parser)


def add_bundle(parser: argparse.ArgumentParser) -> None:
    """The arguments of every command that loads a bundle."""
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="folder of air fit, or bundle/ of a finished run")
    parser.add_argument("--backbone", metavar="NAME", help="where its backbone's weights lie now, if they were moved")
    add_place(parser)


def add_predict(parser: argparse.ArgumentParser) -> None:
    """The arguments of `air predict`."""
    add_bundle(parser)
    parser.add_argument("images", metavar="IMAGE_OR_DIR", type=Path, help="an image, or a folder of any nesting")
    parser.add_argument("--csv", metavar="FILE", type=Path, help="write a table there instead")
    parser.add_argument("--top", metavar="N", type=int, default=1, help="classes an image")
    parser.add_argument("--head", choices=("text", "fused"), help="default: the run's primary")
    parser.add_argument("--batch", metavar="N", type=int, default=64, help="images a forward pass")


def open_bundle(args: argparse.Namespace) -> Bundle:
    """Load the bundle that a command line names."""
    from air_plugin.inference.bundle import load_bundle

    bundle = load_bundle(args.bundle, device=pick_device(args.device), backbone=args.backbone)
    method = "transclip" if bundle.card.get("transclip") else bundle.card.get("transduction", "none")
    if method != "none":
        print(
            f"note: the run's own predictions were refined over many images together ({method}); a bundle holds the "
            "heads before that",
            file=sys.stderr,
        )
    return bundle


def run_predict(args: argparse.Namespace) -> int:
    """Print or write a bundle's predictions of images."""

    if args.csv:
        require_writable(args.csv, "--csv")
    bundle = open_bundle(args)
    found = bundle.predict(args.images, top=args.top, batch_size=args.batch, head=args.head, progress=True)
    if not args.csv:
        escape_unshowable(keep_bytes=True)  # file names may be no UTF-8
        csv.writer(sys.stdout, delimiter="\t", lineterminator="\n").writerows(map(row_of, found))
        sys.stdout.flush()  # a closed pipe shows here, not at the end of the process
        return 0
    write_csv(args.csv, found, top=min(args.top, len(bundle.classnames)))
    return 0


def write_csv(path: Path, predictions: Iterable[Prediction], *, top: int) -> None:
    """Write predictions as a table, whole or not at all, and print where it lies.

    Args:
        path: of the file.
        predictions: with `top` classes each.
        top: number of classes an image.
    """
    columns = ["path", "label", "probability"]
    for place in range(2, top + 1):
        columns += [f"label_{place}", f"probability_{place}"]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *map(csv_row, predictions)])
    write_atomically(path, text.getvalue().encode("utf-8", "surrogateescape"))
    print(f"wrote {path}")


def row_of(one: Prediction) -> list[str]:
    """The path of an image, then classes and probabilities."""
    pairs: Iterable[tuple[str, float]] = one.top
    return [str(one.path), *(word for label, value in pairs for word in (label, f"{value:.6f}"))]


def csv_row(one: Prediction) -> list[str]:
    """The same for a spreadsheet: no cell is a formula, and a path still names its file."""

    path, *rest = row_of(one)
    return [path if csv_text(path) == path else os.path.join(os.curdir, path), *map(csv_text, rest)]
