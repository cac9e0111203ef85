"""A step of prompt training on cached image features, compared with a cut text tower and with CoOp's implementation.

    python -m benchmarks.prompt_step --threads 1               # 10 classes, about a minute
    python -m benchmarks.prompt_step --threads 1 --classes 45 --steps 3
    python -m benchmarks.prompt_step --device cuda --steps 50

- shared prefix, ours: a batch of cached image features; the start token and the context are encoded once, and of each
  class its own tokens.
- cut tower: cached image features; every prompt is encoded, up to the end of the longest one.
- CoOp's: the image tower encodes the batch in every step, and the text tower reads all 77 tokens of every prompt.

All: 16 context tokens, the same batch and loss, forward, backward and a step of SGD on an open_clip ViT-B-32-quickgelu
with random weights, so nothing is fetched. They take turns, and each step's loss and gradient of the context are
compared.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from air_plugin.clip.backbone import Backbone
from air_plugin.clip.prompts import PromptedCLIP, PromptLearner

ARCHITECTURE = "ViT-B-32-quickgelu"
TOLERANCE = 1e-4  # of loss and gradient, relative to the largest entry; float32 sums in another order
CLASSES = [  # of RESISC45
    "airplane",
    "airport",
    "baseball diamond",
    "basketball court",
    "beach",
    "bridge",
    "chaparral",
    "church",
    "circular farmland",
    "cloud",
    "commercial area",
    "dense residential",
    "desert",
    "forest",
    "freeway",
    "golf course",
    "ground track field",
    "harbor",
    "industrial area",
    "intersection",
    "island",
    "lake",
    "meadow",
    "medium residential",
    "mobile home park",
    "mountain",
    "overpass",
    "palace",
    "parking lot",
    "railway",
    "railway station",
    "rectangular farmland",
    "river",
    "roundabout",
    "runway",
    "sea ice",
    "ship",
    "snowberg",
    "sparse residential",
    "stadium",
    "storage tank",
    "tennis court",
    "terrace",
    "thermal power station",
    "wetland",
]


class Way:
    """One way to train: prompts, their optimiser, and the computation of image and text features."""

    def __init__(
        self,
        backbone: Backbone,
        names: Sequence[str],
        *,
        image: Callable[[], Tensor],
        text: Callable[[PromptedCLIP], Tensor],
    ) -> None:
        self.learner = PromptLearner(backbone, names, n_ctx=16, generator=torch.Generator().manual_seed(0))
        self.model = PromptedCLIP(backbone, self.learner)
        self.optimiser = torch.optim.SGD(self.learner.parameters(), lr=0.002)
        self.image = image
        self.text = text
        self.seconds: list[float] = []
        self.image_seconds: list[float] = []

    def step(self, label: Tensor) -> tuple[Tensor, Tensor]:
        """One step; returns its loss and the gradient of the context."""
        start = now(label)
        features = self.image()
        self.image_seconds.append(now(label) - start)
        loss = cross_entropy(self.model.logits(features, self.text(self.model)), label)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        self.seconds.append(now(label) - start)
        assert self.learner.ctx.grad is not None
        return loss.detach(), self.learner.ctx.grad.clone()


def now(tensor: Tensor) -> float:
    """The time at which the tensor's device has done what it was given."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()


def milliseconds(seconds: Sequence[float]) -> float:
    return 1e3 * statistics.median(seconds[1:])  # the first step is a warm-up


def difference(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Of two losses, and of two gradients relative to the largest entry."""
    (loss, gradient), (expected, expected_gradient) = ours, theirs
    relative = (gradient - expected_gradient).abs().max() / expected_gradient.abs().max()
    return float((loss - expected).abs() / expected), float(relative)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    backbone = random_backbone()
    backbone.model.to(options.device)
    rng = torch.Generator().manual_seed(1)
    pixels = torch.randn(options.batch, 3, backbone.image_size, backbone.image_size, generator=rng).to(options.device)
    label = torch.randint(options.classes, (options.batch,), generator=rng).to(options.device)
    cached = backbone.encode_images(pixels)
    names = CLASSES[: options.classes]
    ours = Way(backbone, names, image=lambda: cached, text=PromptedCLIP.text_features)
    cut = Way(
        backbone, names, image=lambda: cached, text=lambda model: unit(model.text_encoder(*model.prompt_learner()))
    )
    coop = Way(backbone, names, image=lambda: backbone.encode_images(pixels), text=whole_tower(backbone))

    largest = [0.0, 0.0]
    for number in range(1 + options.steps):
        results = {way: way.step(label) for way in ((ours, cut, coop) if number % 2 else (coop, cut, ours))}
        for other in (cut, coop):
            largest = [max(pair) for pair in zip(largest, difference(results[ours], results[other]), strict=True)]
    report(options, ours, cut, coop)
    print(f"largest relative difference: loss {largest[0]:.1e}, gradient of the context {largest[1]:.1e}")
    if not max(largest) <= TOLERANCE:
        print(f"error: the ways differ by more than {TOLERANCE:g}", file=sys.stderr)
        return 1
    return 0


def report(options: argparse.Namespace, ours: Way, cut: Way, coop: Way) -> None:
    where = f"{options.threads} threads" if options.device == "cpu" else torch.cuda.get_device_name(options.device)
    layout, count = ours.learner.layout, len(ours.learner.end)
    longest, length = int(ours.learner.end.max()) + 1, ours.learner.fixed.shape[1]
    ours_ms, cut_ms, coop_ms = (milliseconds(way.seconds) for way in (ours, cut, coop))
    image_ms = milliseconds(coop.image_seconds)
    print(
        f"{ARCHITECTURE}, random weights, batch {options.batch}, {count} classes, 16 context tokens, {where}; "
        f"median of {options.steps} steps"
    )
    assert layout is not None
    print(f"shared prefix  {ours_ms:9.1f} ms   cached features, {len(layout.source)} tokens in all")
    print(f"cut tower      {cut_ms:9.1f} ms   cached features, {longest} of {length} tokens, {count * longest} in all")
    print(
        f"CoOp's         {coop_ms:9.1f} ms   of which the image tower {image_ms:.1f} ms, {count * length} tokens in all"
    )
    print(f"cut tower / shared prefix  {cut_ms / ours_ms:6.1f}")
    without = (coop_ms - image_ms) / ours_ms
    print(f"CoOp's / shared prefix     {coop_ms / ours_ms:6.1f}   without the image tower {without:.1f}")


def random_backbone() -> Backbone:
    import open_clip

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.CLIP(**open_clip.get_model_config(ARCHITECTURE))
    model.eval().requires_grad_(False)
    preprocess = open_clip.image_transform(model.visual.image_size, is_train=False)
    side = model.visual.image_size[0]
    return Backbone(ARCHITECTURE, model, preprocess, open_clip.get_tokenizer(ARCHITECTURE), side, model.context_length)


def unit(text: Tensor) -> Tensor:
    """(C, D) text features to (1, C, D) unit features."""
    return normalize(text, dim=1)[None]


def whole_tower(backbone: Backbone) -> Callable[[PromptedCLIP], Tensor]:
    """The text tower as in CoOp, over the whole context length."""
    model = backbone.model

    def encode(prompted: PromptedCLIP) -> Tensor:
        embeddings, end = prompted.prompt_learner()
        x = embeddings + model.positional_embedding
        x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask))
        return unit(x[torch.arange(len(x), device=x.device), end] @ model.text_projection)

    return encode


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A step of prompt training on cached features, beside CoOp's way.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--steps", type=positive, default=5, help="of each way, after one that warms up")
    parser.add_argument("--classes", type=positive, default=10, help=f"1..{len(CLASSES)}, names of RESISC45")
    parser.add_argument("--batch", type=positive, default=32)
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    if options.classes > len(CLASSES):
        parser.error(f"--classes {options.classes}: there are {len(CLASSES)} names")
    return options


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
