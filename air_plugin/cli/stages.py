"""`air lora | generate | prototypes`: the stages of the auxiliary classifier one by one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from air_plugin.cli.parsing import add_command, add_place
from air_plugin.utils.devices import pick_device
from air_plugin.utils.errors import UserError
from air_plugin.utils.files import require_writable

if TYPE_CHECKING:
    from air_plugin.auxiliary.build import Auxiliary, Until
    from air_plugin.cli.parsing import Commands

MINI = Path(__file__).parents[1] / "mini" / "settings.yaml"  # what suits the embedded generator
STAGES = {
    "lora": "adapt the generator to a folder of unlabelled images",
    "generate": "the same, then generate images of every class",
    "prototypes": "the same, then keep the most typical images and make the auxiliary classifier",
}
UNTIL: dict[str, Until] = {"lora": "lora", "generate": "images", "prototypes": "classifier"}


def add(commands: Commands) -> None:
    """The commands of this module."""
    for name, text in STAGES.items():
        parser = add_command(
            commands,
            name,
            text,
            run=run_stage,
            examples=(
                f"air {name} photos --classes names.txt",
                f"air {name} photos --classes names.txt AIR.M 60 AIR.LORA.STEPS 500",
            ),
            about=f"{text}; finished stages come from the store",
            takes_settings=True,
        )
        add_arguments(parser)
    commands.choices["prototypes"].add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        help="of the classifier; default: classifier.safetensors beside the prototypes",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
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
    parser.add_argument("--seed", type=int, default=0, help="of the adapter and the images")
    add_place(parser)


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
