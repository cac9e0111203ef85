"""`air fit | demo`: from a folder of images and names to a classifier, and a page that shows what it does."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from air_plugin.cli.classifier import add_bundle, write_csv
from air_plugin.cli.parsing import add_command, add_place
from air_plugin.utils.class_names import read_class_file
from air_plugin.utils.errors import UserError
from air_plugin.utils.extras import require_extra
from air_plugin.utils.files import require_writable
from air_plugin.utils.image_files import find_images

if TYPE_CHECKING:
    from air_plugin.cli.parsing import Commands


def add(commands: Commands) -> None:
    """The commands of this module."""
    parser = add_command(
        commands,
        "fit",
        "make a classifier from a folder of unlabelled images and a list of names",
        run=run_fit,
        examples=(
            "air fit photos --classes names.txt --out classifier",
            'air fit photos --classes cat dog "traffic light" --out classifier --predict labels.csv',
            'air fit digits --classes zero one two --template "a photo of the digit {}." --out classifier AIR.M 30',
        ),
        about=(
            "Makes a classifier from unlabelled images: a generator is adapted to them, and its images make a second "
            "classifier beside CLIP's. Files that cannot be read are named and left out. Finished stages are kept in "
            "the cache: an interrupted fit goes on from there."
        ),
        takes_settings=True,
    )
    add_fit(parser)
    parser = add_command(
        commands,
        "demo",
        "open a page on this machine on which a classifier explains itself",
        run=run_demo,
        examples=("air demo classifier", "air demo classifier --port 8000"),
        about=(
            "Serves a page on 127.0.0.1 alone: drop an image to see the probabilities of each classifier, the nearest "
            "generated images, and the unlabelled images with the least sure label. Nothing leaves this machine. "
            "Needs the extra demo (Gradio)."
        ),
    )
    add_bundle(parser)
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")


def add_fit(parser: argparse.ArgumentParser) -> None:
    """The arguments of `air fit`."""
    parser.add_argument("images", metavar="IMAGES", type=Path, help="folder of images, any nesting")
    parser.add_argument(
        "--classes",
        metavar="NAME",
        nargs="+",
        required=True,
        help="the names themselves, at least two, or one text file: a name a line, and perhaps 'template: a photo of "
        "a {}.'",
    )
    parser.add_argument("--out", metavar="FOLDER", type=Path, required=True, help="of the classifier; is made")
    parser.add_argument(
        "--predict", metavar="FILE.csv", type=Path, help="classify IMAGES, too, and write a table there"
    )
    parser.add_argument("--template", metavar="TEXT", help="with one {} for the name; default: 'a photo of a {}.'")
    parser.add_argument(
        "--backbone", metavar="NAME", default="auto", help="auto: ViT-B/32 on a GPU, else mini, the embedded one"
    )
    parser.add_argument(
        "--generator", metavar="NAME", default="auto", help="auto: Stable Diffusion 1.5 on a GPU, else mini"
    )
    parser.add_argument("--prompts", action="store_true", help="train prompts, too")
    parser.add_argument("--seed", type=int, default=1, help="of the adapter and the images")
    parser.add_argument("--cache", metavar="FOLDER", type=Path, help="of finished stages; default: ~/.cache/air_plugin")
    add_place(parser)


def run_fit(args: argparse.Namespace) -> int:
    """Fit, save, and perhaps predict."""
    if len(args.options) % 2:
        raise UserError(f"settings are pairs of KEY VALUE; '{args.options[-1]}' has no partner")
    if args.out.resolve().is_relative_to(args.images.resolve()):
        raise UserError(f"--out {args.out} lies in {args.images}, and its pictures would be taken for images")
    require_writable(args.out, "--out", folder=True)
    if args.predict:
        require_writable(args.predict, "--predict")
    names, template = names_of(args.classes)
    # After the quick checks: they load torch.
    from air_plugin.estimator.classifier import AiRClassifier
    from air_plugin.estimator.examples import require_free

    require_free(args.out)
    options: dict[str, Any] = dict(zip(args.options[::2], args.options[1::2], strict=True))
    given = args.template or template
    classifier = AiRClassifier(
        names,
        **({"template": given} if given else {}),
        backbone=args.backbone,
        generator=args.generator,
        prompts=args.prompts,
        settings=options or None,
        random_state=args.seed,
        cache=args.cache,
        device=args.device or None,
    ).fit(args.images)
    classifier.save(args.out)
    count, skipped = classifier.bundle_.card["images"], len(classifier.skipped_)
    left_out = f"; {skipped} files could not be read" if skipped else ""
    print(f"classifier: {args.out} ({len(names)} classes, from {count:,} images{left_out})")
    if args.predict:
        files = [path for path in find_images(args.images) if path not in classifier.skipped_]
        write_csv(args.predict, classifier.bundle_.predict(files, progress=True), top=1)
    return 0


def run_demo(args: argparse.Namespace) -> int:
    """Serve the page until Ctrl-C."""
    require_extra("demo", purpose="air demo")  # before torch is loaded
    from air_plugin.demo import serve

    served = serve(args.bundle, port=args.port, device=args.device, backbone=args.backbone)
    print(f"demo: {served.address} (Ctrl-C ends it)", flush=True)
    served.wait()
    return 0


def names_of(words: list[str]) -> tuple[list[str], str]:
    """The class names of --classes, and the template of their file; empty where there is none."""
    if len(words) == 1 and (Path(words[0]).exists() or Path(words[0]).suffix == ".txt"):
        return read_class_file(Path(words[0]))
    return words, ""
