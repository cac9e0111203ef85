"""`air`: the stages of the auxiliary classifier by themselves, and the tables of a folder of results."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from air_plugin.errors import UserError, exit_code

STAGES = {
    "lora": "adapt the generator to a folder of unlabelled images",
    "generate": "the same, then draw images of every class",
    "prototypes": "the same, then keep the most typical ones and make the auxiliary classifier",
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="air", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in STAGES.items():
        stage = commands.add_parser(
            name, help=text, description=f"{text}; finished stages come from the store",
            epilog="Settings may follow as KEY VALUE pairs, for instance AIR.M 60 AIR.LORA.STEPS 500.",
        )  # fmt: skip
        stage.add_argument("images", type=Path, help="folder of unlabelled images, any nesting")
        stage.add_argument("--classes", type=Path, required=True, help="text file, a class name a line")
        stage.add_argument("--store", type=Path, default=Path("air-store"), help="folder of the artifacts")
        stage.add_argument("--config", type=Path, help="YAML of a trainer; its MODEL, TRAINER and AIR parts are read")
        stage.add_argument("--seed", type=int, default=0)
        stage.add_argument("--device", default="", help="cuda or cpu; default: cuda where there is one")
    add_report(commands.add_parser("report", help="tables or a page of a folder of results"))
    # A positional "options" would swallow every flag that follows the folder, so the pairs are what is left over.
    args, options = parser.parse_known_args(argv)
    unknown = [word for word in options if word.startswith("--") or args.command == "report"]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    args.options = options
    return args


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
    from yacs.config import CfgNode

    from air_plugin.config import add_air_config, merge_file, merge_options

    cfg = CfgNode({"DATASET": {}, "TRAINER": {}, "MODEL": {"BACKBONE": {"NAME": "mini"}}, "SEED": args.seed})
    add_air_config(cfg)
    if args.config:
        merge_file(cfg, args.config, sections=("MODEL", "TRAINER", "AIR"))
    merge_options(cfg, args.options)
    return cfg


def run_report(args: argparse.Namespace) -> int:
    """Print the tables of a folder of results, or write its page."""
    from air_plugin.report import report

    return report(
        args.output, datasets=args.dataset, methods=args.method, backbone=args.backbone,
        split_family=args.split_family, baseline=args.baseline, form=args.format, out=args.out, ci95=args.ci95,
        details=args.details,
    )  # fmt: skip


def run_stage(args: argparse.Namespace) -> int:
    """Run the stages up to the one that was asked for, and say where its artifact lies."""
    import torch

    from air_plugin import auxiliary
    from air_plugin.backbone import load_backbone
    from air_plugin.config import AirSettings
    from air_plugin.diffusion.pipeline import load_generator
    from air_plugin.features import extract_features
    from air_plugin.images import find_images
    from air_plugin.prompts import fill
    from air_plugin.store import Store

    cfg = settings_of(args)
    if cfg.AIR.THREADS > 0:
        torch.set_num_threads(cfg.AIR.THREADS)
    settings = AirSettings.from_cfg(cfg)
    names = read_classes(args.classes)
    paths = [str(path) for path in find_images(args.images)]
    store, device = Store(args.store), pick_device(args.device)
    backbone = load_backbone(cfg.MODEL.BACKBONE.NAME, precision=cfg.TRAINER.PROMPT.PREC, device=device)
    generator = load_generator(settings.generator, device=device, **settings.loading)
    adapter = None
    if settings.lora.enabled:
        table, _ = extract_features(backbone, paths, store=store)
        texts = backbone.encode_texts([fill(settings.prompt, name) for name in names])
        probs = backbone.text_probs(table.plain, texts)
        adapter = auxiliary.adapt(generator, names, paths, probs=probs, settings=settings, store=store)
        print(f"adapter: {adapter.folder}")
    if args.command == "lora":
        return 0
    report = auxiliary.draw(generator, adapter, names, settings=settings, store=store)
    print(f"images: {report.paths[0].parent} ({len(report.paths)}, {report.drawn} drawn now)")
    if args.command == "prototypes":
        made, _ = auxiliary.make_prototypes(
            backbone, names, report.paths, settings=settings, store=store, adapter=adapter, generator=generator
        )
        print(f"prototypes: {store.root / 'prototypes' / made.key}")
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


def read_classes(path: Path) -> list[str]:
    """The names in a text file, a name a line."""
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', 'it is no text file')}") from error
    if len(set(names)) != len(names) or not names:
        raise UserError(f"{path} must hold class names, one a line, each once")
    return names


def main(argv: list[str] | None = None) -> int:
    """The console script; returns the exit code, 2 for bad input."""
    args = parse(argv)
    return exit_code(lambda: run_report(args) if args.command == "report" else run_stage(args))


if __name__ == "__main__":
    sys.exit(main())
