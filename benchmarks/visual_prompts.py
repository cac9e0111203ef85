"""An epoch of visual prompt training: prepared images from the store, compared with decoding them in every epoch.

    python -m benchmarks.visual_prompts --threads 1                        # a ViT of mini_vit's size, a minute
    python -m benchmarks.visual_prompts --backbone mini_vit --threads 1    # the embedded one
    python -m benchmarks.visual_prompts --device cuda --backbone vit_b32 --images 512 --workers 8

JPEG images of 1000 x 750 pixels (--size) are made in a temporary folder. Each round trains the prompts for one epoch in
both ways, one after the other: with images of `prepare_images`, and with images that are read, decoded and prepared
when their batch comes. Ratios are taken within a round; their median is printed. First, both ways are compared: the
same batches must give the same losses. `small` and vit_b32 are ViTs with random weights, so nothing is fetched.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from air_plugin.clip.backbone import Backbone
from air_plugin.clip.features import FeatureBatches
from air_plugin.clip.loading import fast_half, load_backbone
from air_plugin.clip.prepared_images import ImageTable, prepare_images
from air_plugin.clip.views import Views
from air_plugin.clip.visual_prompts import VisuallyPromptedCLIP, VisualPrompts
from air_plugin.utils.store import Store
from air_plugin.utils.workers import batched, map_in_processes
from benchmarks.prompt_step import positive, random_backbone

CLASSES = 10
TOLERANCE = 1e-4  # of a loss, relative: the same pixels go through the same tower


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    backbone = make_backbone(options.backbone, torch.device(options.device))
    with tempfile.TemporaryDirectory() as folder:
        paths = write_jpegs(Path(folder), options.images, size=options.size)
        begin = time.perf_counter()
        table, _ = prepare_images(backbone, paths, store=Store(Path(folder) / "store"), workers=options.workers)
        making = time.perf_counter() - begin
        ways: dict[str, Callable[[int], Iterator[dict[str, Tensor]]]] = {
            "cached": lambda epoch: cached(table, options.batch, epoch),
            "decoded": lambda epoch: decoded(backbone, paths, table, options.batch, epoch, options.workers),
        }
        losses = {name: train(backbone, way(0))[1] for name, way in ways.items()}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(options.repeats):
            for name, way in ways.items():
                seconds[name].append(train(backbone, way(number))[0])
    report(seconds, making, options, backbone)
    pairs = zip(losses["cached"], losses["decoded"], strict=True)
    difference = max(abs(one - other) / abs(other) for one, other in pairs)
    print(f"largest difference of a loss between both ways: {difference:.1e}")
    if not difference <= TOLERANCE:
        print(f"error: they differ by more than {TOLERANCE:g}", file=sys.stderr)
        return 1
    return 0


def report(seconds: dict[str, list[float]], making: float, options: argparse.Namespace, backbone: Backbone) -> None:
    steps = options.images // min(options.batch, options.images)
    width, height = options.size
    print(
        f"{backbone.name} on {options.device}, {options.images} images of {width} x {height} pixels, "
        f"batch {options.batch}, {options.workers} workers, {options.threads} threads; "
        f"median of {options.repeats} rounds"
    )
    for name, values in seconds.items():
        print(f"{name:8} {1000 * statistics.median(values) / steps:9.1f} ms/step")
    ratio = statistics.median(d / c for d, c in zip(seconds["decoded"], seconds["cached"], strict=True))
    print(f"decoded / cached {ratio:.1f}; preparing all images once took {making:.2f} s")


def write_jpegs(folder: Path, count: int, *, size: tuple[int, int]) -> list[str]:
    """JPEG files, width by height: coarse and fine noise, so that they have a photo's size on disk."""
    rng, (width, height) = np.random.default_rng(0), size
    paths = []
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
        pixels = (smooth + rng.integers(-12, 13, smooth.shape)).clip(0, 255).astype(np.uint8)
        paths.append(str(folder / f"{number:06d}.jpg"))
        Image.fromarray(pixels).save(paths[-1], quality=90)
    return paths


def make_backbone(name: str, device: torch.device) -> Backbone:
    if name == "mini_vit":
        return load_backbone(name, device=device)
    backbone = random_backbone() if name == "vit_b32" else small_backbone()
    backbone.model.to(device)
    return replace(backbone, autocast=fast_half(device))


def small_backbone() -> Backbone:
    """A ViT of mini_vit's form, 32 pixels, with random weights."""
    import open_clip

    vision = open_clip.CLIPVisionCfg(layers=6, width=128, head_width=32, patch_size=8, image_size=32)
    text = open_clip.CLIPTextCfg(context_length=77, vocab_size=49408, width=64, heads=2, layers=1)
    torch.manual_seed(0)
    model = open_clip.CLIP(64, vision, text).eval().requires_grad_(False)
    preprocess = open_clip.image_transform(32, is_train=False)
    return Backbone("small", model, preprocess, open_clip.SimpleTokenizer(), 32, 77)


# Batches, in both ways


def batches(table: ImageTable, size: int, epoch: int) -> FeatureBatches:
    labels = torch.arange(len(table)) % CLASSES
    index = torch.arange(len(table))
    targets = {"target": labels, "index": index}
    return FeatureBatches(table, index, targets, batch_size=size, seed=0, epoch=lambda: epoch)


def cached(table: ImageTable, size: int, epoch: int) -> Iterator[dict[str, Tensor]]:
    """An epoch's batches of prepared images."""
    yield from ({"img": batch["img"], "target": batch["target"]} for batch in batches(table, size, epoch))


def decoded(
    backbone: Backbone, paths: Sequence[str], table: ImageTable, size: int, epoch: int, workers: int
) -> Iterator[dict[str, Tensor]]:
    """The same batches of images that are decoded now."""
    views = Views(backbone.preprocess, None, views=1, seed=0)
    plan = [(batch["index"], batch["target"]) for batch in batches(empty(len(table)), size, epoch)]
    places = [(int(i), paths[int(i)]) for index, _ in plan for i in index]
    with (
        closing(map_in_processes(views.read, places, workers=workers)) as read,
        closing(batched(read, min(size, len(paths)))) as groups,
    ):
        for (_, target), items in zip(plan, groups, strict=True):
            yield {"img": views.collate(items)[:, 0], "target": target}


def empty(count: int) -> ImageTable:
    """A table whose images cost nothing: only its order is used."""
    return ImageTable([torch.zeros(1, 1, 1, 1, 3, dtype=torch.uint8).expand(count, -1, -1, -1, -1)])


def train(backbone: Backbone, epoch: Iterator[dict[str, Tensor]]) -> tuple[float, list[float]]:
    """Train new prompts on an epoch's batches; its seconds, and the losses of its steps."""
    generator = torch.Generator().manual_seed(0)
    prompts = VisualPrompts(backbone, [str(label) for label in range(CLASSES)], generator=generator)
    width = backbone.model.visual.output_dim
    text = normalize(torch.randn(CLASSES, width, generator=generator), dim=1).to(backbone.device)
    model = VisuallyPromptedCLIP(backbone, prompts, template=text)
    optimiser, losses = torch.optim.SGD(prompts.parameters(), lr=0.01), []
    begin = time.perf_counter()
    for batch in epoch:
        on_device = {name: value.to(backbone.device, non_blocking=True) for name, value in batch.items()}
        optimiser.zero_grad()
        logits = model.logits(model.encode_batch(on_device)["img"], model.text_features())
        loss = cross_entropy(logits, on_device["target"])
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return time.perf_counter() - begin, losses


def sides(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    return positive(width), positive(height)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", choices=("small", "mini_vit", "vit_b32"), default="small")
    parser.add_argument("--size", type=sides, default=(1000, 750), metavar="WIDTHxHEIGHT", help="of the JPEG files")
    parser.add_argument("--images", type=positive, default=128)
    parser.add_argument("--batch", type=positive, default=32)
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--workers", type=int, default=0, help="processes that decode images")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")
    return options


if __name__ == "__main__":
    sys.exit(main())
