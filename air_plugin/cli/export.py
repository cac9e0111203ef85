"""`air export | convert`: a classifier as ONNX, a backbone's pickle as safetensors."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from air_plugin.cli.classifier import add_bundle, open_bundle
from air_plugin.cli.parsing import add_command
from air_plugin.utils.files import require_writable

if TYPE_CHECKING:
    from air_plugin.cli.parsing import Commands


def add(commands: Commands) -> None:
    """The commands of this module."""
    parser = add_command(
        commands,
        "export",
        "write a classifier's folder (bundle) as one ONNX file",
        run=run_export,
        examples=("air export classifier classifier.onnx",),
        about=(
            "Writes image tower and heads to one file: pixels (N, 3, H, W) to the probabilities of every head. Its "
            "metadata holds the classes and the preparation of images. It is checked with onnxruntime before it is "
            "written."
        ),
    )
    add_bundle(parser)
    parser.add_argument("file", metavar="FILE.onnx", type=Path, help="is written, whole or not at all")
    parser = add_command(
        commands,
        "convert",
        "write a backbone's pickle as safetensors",
        run=run_convert,
        examples=("air convert ViT-B-32:RemoteCLIP-ViT-B-32.pt",),
        about="Write FILE's tensors as safetensors beside FILE; nothing else of the pickle is read.",
    )
    parser.add_argument("name", metavar="ARCHITECTURE:FILE", help="for instance ViT-B-32:RemoteCLIP-ViT-B-32.pt")


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
