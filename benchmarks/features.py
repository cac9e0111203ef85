"""Feature extraction, compared with its two parts alone: decoding and augmenting images, and encoding views.

    python -m benchmarks.features                                 # the embedded tower, half a minute on 2 cores
    python -m benchmarks.features --backbone vit_b32 --images 48  # about five minutes
    python -m benchmarks.features --device cuda                   # ViT-B/32, autocast, worker processes

JPEG images of 500 x 375 pixels are made in a temporary folder. Each round measures, one after the other: decoding
alone (the workers' part, from files to batches: of bytes, and of normalised float32 as before), encoding alone (one
batch on the device again and again, its normalisation included), and `extract_features` into an empty store. Ratios
are taken within a round; their medians are printed. First, features are compared with those of views that are prepared
and encoded in fp32, one image after the other. vit_b32 is an open_clip ViT-B-32-quickgelu with random weights, so
nothing is fetched.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from air_plugin.clip.backbone import Backbone
from air_plugin.clip.features import extract_features
from air_plugin.clip.loading import fast_half, load_backbone
from air_plugin.clip.views import Transform, Views
from air_plugin.inference.bundle import preprocessing_of
from air_plugin.utils.images import READERS, load_rgb
from air_plugin.utils.seeding import reseeding, stable_seed
from air_plugin.utils.store import Store
from air_plugin.utils.transfer import Upload, begin_download
from air_plugin.utils.workers import batched, map_in_processes
from benchmarks.prompt_step import positive, random_backbone

BATCH = 100  # images, as DATALOADER.TEST.BATCH_SIZE of the configs
COMPARED = 8  # images whose features are computed in the plain way, too
# Of features, by autocast; a batch of another size sums in another order.
TOLERANCE = {None: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    backbone = make_backbone(options.backbone, torch.device(options.device), precision=options.precision)
    augment = augmentation(backbone)
    with tempfile.TemporaryDirectory() as folder:
        paths = write_jpegs(Path(folder), options.images)
        views = Views(backbone.preprocess, augment, views=options.views, seed=0)
        extraction = {"views": options.views, "augment": augment, "batch_size": BATCH, "workers": options.workers}
        some = paths[:COMPARED]
        table, _ = extract_features(backbone, some, store=Store(Path(folder) / "some"), **extraction)
        difference, angle = compare(table.features.cpu(), one_by_one(backbone, some, augment, options.views))
        seconds: dict[str, list[float]] = {name: [] for name in ("floats", "decoding", "encoding", "extraction")}
        for number in range(options.repeats):
            store = Store(Path(folder) / f"store{number}")
            seconds["floats"].append(
                measured(partial(decode, as_floats(views, backbone, augment), paths, options.workers))
            )
            seconds["decoding"].append(measured(partial(decode, views, paths, options.workers)))
            seconds["encoding"].append(encode(backbone, views, paths))
            seconds["extraction"].append(
                measured(partial(extract_features, backbone, paths, store=store, **extraction))
            )
    report(seconds, options, backbone)
    print(f"largest difference from fp32, image by image: {difference:.1e}; smallest cosine: 1 - {angle:.1e}")
    if not difference <= TOLERANCE[backbone.autocast]:
        print(f"error: they differ by more than {TOLERANCE[backbone.autocast]:g}", file=sys.stderr)
        return 1
    return 0


def report(seconds: dict[str, list[float]], options: argparse.Namespace, backbone: Backbone) -> None:
    computes = "fp32" if backbone.autocast is None else str(backbone.autocast).removeprefix("torch.")
    print(
        f"{backbone.name} on {options.device} in {computes}, {options.images} images, {options.views} views, "
        f"{options.workers} workers, {options.threads} threads; median of {options.repeats} rounds"
    )
    rates = {name: options.images / statistics.median(values) for name, values in seconds.items()}
    floats, decoding, encoding, whole = (
        np.array(seconds[name]) for name in ("floats", "decoding", "encoding", "extraction")
    )
    ratio = {  # of rates, within a round: what else the machine does changes from round to round
        "floats": np.median(floats / decoding),
        "decoding": np.median(decoding / whole),
        "encoding": np.median(encoding / whole),
        "slower": np.median(np.maximum(decoding, encoding) / whole),
        "in turn": np.median((decoding + encoding) / whole),
    }
    print(f"decoding alone    {rates['decoding']:9.1f} images/s, {ratio['floats']:.2f} times as fast as to float32")
    print(f"encoding alone    {rates['encoding']:9.1f} images/s")
    print(f"extract_features  {rates['extraction']:9.1f} images/s")
    print(f"ratio to decoding alone {ratio['decoding']:.2f}, to encoding alone {ratio['encoding']:.2f}")
    print(f"ratio to the slower of the two {ratio['slower']:.2f}, to one after the other {ratio['in turn']:.2f}")


def make_backbone(name: str, device: torch.device, *, precision: str) -> Backbone:
    backbone = load_backbone("mini", device=device) if name == "mini" else random_backbone()
    backbone.model.to(device)
    autocast = {"auto": fast_half(device), "fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    return replace(backbone, autocast=autocast)


def augmentation(backbone: Backbone) -> Transform:
    """That of configs/shared/published.yaml."""
    from torchvision import transforms as T

    prepared = preprocessing_of(backbone)
    return T.Compose(
        [
            T.RandomResizedCrop(backbone.image_size, interpolation=T.InterpolationMode.BICUBIC),
            T.RandomHorizontalFlip(),
            T.ToTensor(),
            T.Normalize(prepared["mean"], prepared["std"]),
        ]
    )


def write_jpegs(folder: Path, count: int) -> list[str]:
    """JPEG files of 500 x 375 pixels: coarse and fine noise, so that they have a photo's size."""
    rng = np.random.default_rng(0)
    paths = []
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC)).astype(np.int16)
        pixels = (smooth + rng.integers(-12, 13, smooth.shape)).clip(0, 255).astype(np.uint8)
        paths.append(str(folder / f"{number:06d}.jpg"))
        Image.fromarray(pixels).save(paths[-1], quality=90)
    return paths


def one_by_one(backbone: Backbone, paths: Sequence[str], augment: Transform, views: int) -> Tensor:
    """(n, V, D) features in the plain way: each view prepared alone, each image encoded alone, in fp32."""
    backbone = replace(backbone, autocast=None)
    features = []
    for index, path in enumerate(paths):
        image = load_rgb(path)
        pixels = [backbone.preprocess(image)]
        with reseeding() as seed:
            for view in range(1, views):
                seed(stable_seed(0, index, view))
                pixels.append(augment(image))
        features.append(backbone.encode_images(torch.stack(pixels)).cpu())
    return torch.stack(features)


def compare(features: Tensor, plain: Tensor) -> tuple[float, float]:
    """The largest difference, and 1 - the smallest cosine."""
    cosine = torch.cosine_similarity(features.double(), plain.double(), dim=-1)
    return float((features - plain).abs().max()), float(1 - cosine.min())


def as_floats(views: Views, backbone: Backbone, augment: Transform) -> Views:
    """The same views, finished where they are read, as before."""
    former = copy(views)
    former.plain, former.augment, former.tail = backbone.preprocess, augment, None
    return former


def measured(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def decode(views: Views, paths: Sequence[str], workers: int) -> None:
    """Read all images, up to the batches that would be encoded."""
    with closing(map_in_processes(views.read, list(enumerate(paths)), workers=workers)) as read:
        for batch in batched(read, BATCH):
            views.collate([item for item in batch if not isinstance(item, str)])


def encode(backbone: Backbone, views: Views, paths: Sequence[str]) -> float:
    """Seconds to encode images whose bytes are on the device already."""
    sizes = [min(BATCH, len(paths) - start) for start in range(0, len(paths), BATCH)]
    first = [item for item in map(views.read, enumerate(paths[: sizes[0]])) if not isinstance(item, str)]
    batch = Upload(backbone.device)(views.collate(first))
    warm_up = batch if batch.is_cuda else batch[:1]
    begin_download(backbone.encode_images(views.finish(warm_up)))()
    start = time.perf_counter()
    waits = [begin_download(backbone.encode_images(views.finish(batch[:size]))) for size in sizes]
    for wait in waits:
        wait()
    return time.perf_counter() - start


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Feature extraction, beside decoding and encoding alone.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--backbone", choices=["mini", "vit_b32"], help="default: mini on the CPU, vit_b32 on a GPU")
    parser.add_argument("--views", type=positive, default=8)
    parser.add_argument("--images", type=positive, help="default: 400 on the CPU, 4000 on a GPU")
    parser.add_argument("--workers", type=int, help=f"default: 0 on the CPU, {READERS} on a GPU")
    parser.add_argument("--repeats", type=positive, default=3, help="rounds")
    parser.add_argument(
        "--precision",
        choices=["auto", "fp32", "fp16", "bf16"],
        default="auto",
        help="autocast of the image tower; auto: fp16 on a GPU with tensor cores, otherwise fp32",
    )
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    on_gpu = options.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no GPU that torch can use")
    options.backbone = options.backbone or ("vit_b32" if on_gpu else "mini")
    options.images = options.images or (4000 if on_gpu else 400)
    if options.workers is None:
        options.workers = READERS if on_gpu else 0
    if options.workers < 0:
        parser.error(f"--workers {options.workers}: it must be at least 0")
    return options


if __name__ == "__main__":
    sys.exit(main())
