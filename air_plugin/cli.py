"""`air`: the stages of the auxiliary classifier, predictions by a trained one, and the tables of results."""

from __future__ import annotations

import argparse
import csv
import io
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from air_plugin.utils.errors import UserError, exit_code
from air_plugin.utils.files import csv_text, require_writable, write_atomically
from air_plugin.utils.logs import escape_unshowable, show_logs

if TYPE_CHECKING:
    from air_plugin.auxiliary.build import Auxiliary, Until
    from air_plugin.inference.predict import Bundle, Prediction

MINI = Path(__file__).parent / "mini" / "settings.yaml"  # what suits the embedded generator
STAGES = {
    "lora": "adapt the generator to a folder of unlabelled images",
    "generate": "the same, then generate images of every class",
    "prototypes": "the same, then keep the most typical images and make the auxiliary classifier",
}
UNTIL: dict[str, Until] = {"lora": "lora", "generate": "images", "prototypes": "classifier"}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="air", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in STAGES.items():
        add_stage(
            commands.add_parser(
                name,
                help=text,
                description=f"{text}; finished stages come from the store",
                epilog="Settings may follow as KEY VALUE pairs, for instance AIR.M 60 AIR.LORA.STEPS 500. "
                "`air settings` explains them.",
            )
        )
    commands.choices["prototypes"].add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        help="of the classifier; default: classifier.safetensors beside the prototypes",
    )
    add_predict(commands.add_parser("predict", help="classify images by a run's bundle"))
    add_export(commands.add_parser("export", help="write a run's bundle as one ONNX file"))
    add_convert(commands.add_parser("convert", help="write a backbone's pickle as safetensors"))
    add_report(commands.add_parser("report", help="tables or a page of a folder of results"))
    settings = commands.add_parser("settings", help="default, valid values and meaning of the settings")
    settings.add_argument("pattern", metavar="PATTERN", nargs="?", default="", help="for instance AIR.K, or lora")
    # A positional "options" would swallow every flag that follows the folder, so the pairs are the rest.
    args, options = parser.parse_known_args(argv)
    unknown = [word for word in options if word.startswith("--") or args.command not in STAGES]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    args.options = options
    return args


def add_stage(parser: argparse.ArgumentParser) -> None:
    """The arguments of `air lora | generate | prototypes`."""
    parser.add_argument("images", type=Path, help="folder of unlabelled images, any nesting")
    parser.add_argument(
        "--classes",
        type=Path,
        required=True,
        help="text file, a class name a line, at least two; one line may be 'template: a photo of a {}.'",
    )
    parser.add_argument("--store", type=Path, default=Path("air-store"), help="folder of the artifacts")
    parser.add_argument(
        "--config",
        metavar="FILE",
        type=Path,
        action="append",
        default=[],
        help="YAML of a trainer, "
        "backbone or generator; its MODEL, TRAINER and AIR parts are read; more may follow, each with "
        "its own --config, and are merged in that order; default: what suits the embedded generator",
    )
    parser.add_argument("--seed", type=int, default=0)
    add_place(parser)


def add_place(parser: argparse.ArgumentParser) -> None:
    """The arguments of every command that loads a model."""
    parser.add_argument("--device", default="", help="cuda or cpu; default: cuda where there is one")
    parser.add_argument("--offline", action="store_true", help="never use the network; the same as AIR_OFFLINE=1")


def add_bundle(parser: argparse.ArgumentParser) -> None:
    """The arguments of every command that loads a bundle."""
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="folder: bundle/ of a finished run")
    parser.add_argument("--backbone", metavar="NAME", help="where its backbone's weights lie now, if they were moved")
    add_place(parser)


def add_predict(parser: argparse.ArgumentParser) -> None:
    """The arguments of `air predict`."""
    parser.description = (
        "Prints a line an image, with tabs between the fields: path, label, probability, then further classes and "
        "their probabilities up to --top. A file that cannot be read is left out, with a warning on stderr."
    )
    add_bundle(parser)
    parser.add_argument("images", metavar="IMAGE_OR_DIR", type=Path, help="an image, or a folder of any nesting")
    parser.add_argument("--csv", metavar="FILE", type=Path, help="write a table there instead")
    parser.add_argument("--top", metavar="N", type=int, default=1, help="classes an image; default 1")
    parser.add_argument("--head", choices=("text", "fused"), help="default: the run's primary")
    parser.add_argument("--batch", metavar="N", type=int, default=64, help="images a forward pass; default 64")


def add_export(parser: argparse.ArgumentParser) -> None:
    """The arguments of `air export`."""
    parser.description = (
        "Writes image tower and heads to one file: pixels (N, 3, H, W) to the probabilities of every head. Its "
        "metadata holds the classes and the preparation of images. It is checked with onnxruntime before it is written."
    )
    add_bundle(parser)
    parser.add_argument("file", metavar="FILE.onnx", type=Path)


def add_convert(parser: argparse.ArgumentParser) -> None:
    """The argument of `air convert`."""
    parser.description = "Write FILE's tensors as safetensors beside FILE; nothing else of the pickle is read."
    parser.add_argument("name", metavar="ARCHITECTURE:FILE", help="for instance ViT-B-32:RemoteCLIP-ViT-B-32.pt")


def add_report(parser: argparse.ArgumentParser) -> None:
    """The arguments of `air report`."""
    several: dict[str, Any] = {"nargs": "+", "action": "extend", "default": []}
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="the scripts' OUTPUT, or a data set's folder in it")
    parser.add_argument("--format", choices=("github", "latex", "csv", "html"), default="github", help="of the tables")
    parser.add_argument("--out", metavar="FILE", type=Path, help="default: the terminal; html: OUTPUT/report.html")
    parser.add_argument("--ci95", action="store_true", help="+- is half of the 95 %% interval over seeds")
    parser.add_argument("--baseline", metavar="TITLE", help="a row; adds every other row's difference to it")
    parser.add_argument("--dataset", metavar="NAME", help="only these columns, in this order", **several)
    parser.add_argument("--method", metavar="TITLE", help="only these rows, called as in the table", **several)
    parser.add_argument("--backbone", metavar="NAME", help="only results with this backbone")
    parser.add_argument("--split-family", metavar="NAME", help="only results with this split family")
    parser.add_argument("--details", action="store_true", help="every head, the pseudo-labels and every seed, too")


def settings_of(args: argparse.Namespace) -> Any:
    """A config with our keys alone, no Dassl needed."""
    from air_plugin.config import merge_file, merge_options, own_config, refuse_drop_in_keys, require_ranges

    cfg = own_config(args.seed)
    generator = dict(zip(args.options[::2], args.options[1::2], strict=False)).get("AIR.GENERATOR", "mini")
    for path in args.config or ([MINI] if generator == "mini" else []):
        merge_file(cfg, path, sections=("MODEL", "TRAINER", "AIR"))
    merge_options(cfg, args.options)
    require_ranges(cfg)
    refuse_drop_in_keys(cfg)
    return cfg


def run_report(args: argparse.Namespace) -> int:
    """Print the tables of a folder of results, or write its page."""
    from air_plugin.report.formats import report

    if args.out:
        require_writable(args.out, "--out")
    text = report(
        args.output,
        datasets=args.dataset,
        methods=args.method,
        backbone=args.backbone,
        split_family=args.split_family,
        baseline=args.baseline,
        form=args.format,
        out=args.out,
        ci95=args.ci95,
        details=args.details,
    )
    print(text, end="")
    return 0


def run_stage(args: argparse.Namespace) -> int:
    """Run the stages up to the one that was asked for, and print where its artifacts lie."""
    import torch

    from air_plugin.auxiliary.build import build, require_stage
    from air_plugin.clip.loading import load_backbone
    from air_plugin.clip.zero_shot import look_at_unlabelled, template_features
    from air_plugin.config import AirSettings
    from air_plugin.utils.checks import require_template
    from air_plugin.utils.class_names import read_class_file
    from air_plugin.utils.image_files import find_images
    from air_plugin.utils.provenance import Stages
    from air_plugin.utils.store import Store

    cfg = settings_of(args)
    if cfg.AIR.THREADS > 0:
        torch.set_num_threads(cfg.AIR.THREADS)
    names, template = read_class_file(args.classes)
    if template and "DATASET.TEMPLATE" not in args.options[::2]:
        cfg.DATASET.TEMPLATE = template
    require_template("DATASET.TEMPLATE", cfg.DATASET.TEMPLATE)
    settings, until = AirSettings.from_cfg(cfg), UNTIL[args.command]
    require_stage(settings, until)
    if until == "classifier" and settings.prototypes == "real" and not args.out:
        raise UserError("AIR.PROTOTYPES is real, which leaves no artifact; name the classifier's file by --out")
    require_writable(args.store, "--store", folder=True)
    if out := getattr(args, "out", None):
        require_writable(out, "--out")
    paths = [str(path) for path in find_images(args.images)]
    store, stages, device = Store(args.store), Stages(), pick_device(args.device)
    prompt = cfg.TRAINER.PROMPT
    backbone = load_backbone(cfg.MODEL.BACKBONE.NAME, precision=prompt.PREC, autocast=prompt.AUTOCAST, device=device)
    texts = template_features(backbone, names, cfg.DATASET.TEMPLATE)
    unlabelled, _ = look_at_unlabelled(backbone, paths, texts, store=store)
    built = build(backbone, names, unlabelled, settings=settings, store=store, stages=stages, until=until)
    if built.adapter:
        print(f"adapter: {built.adapter.folder}")
    images = None if until == "lora" else built.images
    if images:
        print(f"images: {images.paths[0].parent} ({len(images.paths)}, {images.generated} generated now)")
    if built.auxiliary and until == "classifier":
        save_classifier(built.auxiliary, store.root / "prototypes", args.out)
    return 0


def save_classifier(auxiliary: Auxiliary, folder: Path, out: Path | None) -> None:
    """Write the classifier, beside its prototypes where no file is named, and print where they lie."""
    key = auxiliary.prototypes.key
    if key:
        print(f"prototypes: {folder / key}")
    out = out or folder / key / "classifier.safetensors"
    auxiliary.classifier.save(out)
    print(f"classifier: {out}")


def open_bundle(args: argparse.Namespace) -> Bundle:
    """Load the bundle that a command line names."""
    from air_plugin.inference.bundle import load_bundle

    bundle = load_bundle(args.bundle, device=pick_device(args.device), backbone=args.backbone)
    if bundle.card.get("transclip"):
        print(
            "note: the run's own predictions were refined over all test images together (TransCLIP); a bundle holds "
            "the heads before that",
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
    columns = ["path", "label", "probability"]
    for place in range(2, min(args.top, len(bundle.classnames)) + 1):
        columns += [f"label_{place}", f"probability_{place}"]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *map(csv_row, found)])
    write_atomically(args.csv, text.getvalue().encode("utf-8", "surrogateescape"))
    print(f"wrote {args.csv}")
    return 0


def row_of(one: Prediction) -> list[str]:
    """The path of an image, then classes and probabilities."""
    pairs: Iterable[tuple[str, float]] = one.top
    return [str(one.path), *(word for label, value in pairs for word in (label, f"{value:.6f}"))]


def csv_row(one: Prediction) -> list[str]:
    """The same for a spreadsheet: no cell is a formula, and a path still names its file."""

    path, *rest = row_of(one)
    return [path if csv_text(path) == path else os.path.join(os.curdir, path), *map(csv_text, rest)]


def run_export(args: argparse.Namespace) -> int:
    """Write a bundle as an ONNX file."""
    from air_plugin.inference.onnx import export_onnx
    from air_plugin.utils.extras import require_extra

    require_extra("onnx", purpose="air export")  # before the bundle is loaded
    require_writable(args.file, "FILE.onnx")
    export_onnx(open_bundle(args), args.file)
    print(f"wrote {args.file}")
    return 0


def run_convert(args: argparse.Namespace) -> int:
    """Convert a backbone's pickle."""
    from air_plugin.clip.loading import convert

    print(convert(args.name))
    return 0


def pick_device(name: str) -> str:
    """The device of that name, or the best one where there is no name."""
    import torch

    if not name:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device '{name}' cannot be used: {str(error).splitlines()[0]}") from error
    return name


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    if getattr(args, "offline", False):
        from air_plugin.utils.offline import go_offline

        go_offline()  # before any library asks the hub
    if args.command == "settings":
        from air_plugin.config import describe

        print(describe(args.pattern))
        return 0
    commands = {"report": run_report, "predict": run_predict, "export": run_export, "convert": run_convert}
    return commands.get(args.command, run_stage)(args)


def main(argv: list[str] | None = None) -> int:
    """The console script; returns the exit code, 2 for bad input."""
    args = parse(argv)
    show_logs()
    try:
        return exit_code(lambda: run(args))
    except BrokenPipeError:  # `air predict ... | head`: the reader has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
