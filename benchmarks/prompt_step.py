"""A step of prompt training on cached image features, compared with CoOp's implementation.

    python -m benchmarks.prompt_step                   # 10 classes, about a minute on 2 cores
    python -m benchmarks.prompt_step --classes 45 --steps 3

Ours: a batch of cached image features, and a text tower that is cut after the longest prompt. CoOp's: the image tower
encodes the batch in every step, and the text tower reads all 77 tokens. Both: 16 context tokens, the same batch and
loss, forward, backward and a step of SGD on an open_clip ViT-B-32-quickgelu with random weights, so nothing is fetched.
The two take turns, and each step's loss and gradient of the context are compared.
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
from air_plugin.clip.prompts import PromptLearner

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
    """One way to train: a prompt learner, its optimiser, and the computation of image and text features."""

    def __init__(
        self,
        backbone: Backbone,
        names: Sequence[str],
        *,
        image: Callable[[], Tensor],
        text: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        self.learner = PromptLearner(backbone, names, n_ctx=16, generator=torch.Generator().manual_seed(0))
        self.optimiser = torch.optim.SGD(self.learner.parameters(), lr=0.002)
        self.scale = backbone.logit_scale
        self.image = image
        self.text = text
        self.seconds: list[float] = []
        self.image_seconds: list[float] = []

    def step(self, label: Tensor) -> tuple[Tensor, Tensor]:
        """One step; returns its loss and the gradient of the context."""
        start = time.perf_counter()
        features = self.image()
        self.image_seconds.append(time.perf_counter() - start)
        text = normalize(self.text(*self.learner()), dim=1)
        loss = cross_entropy(self.scale * features @ text.T, label)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        self.seconds.append(time.perf_counter() - start)
        assert self.learner.ctx.grad is not None
        return loss.detach(), self.learner.ctx.grad.clone()

    def milliseconds(self, seconds: Sequence[float]) -> float:
        return 1e3 * statistics.median(seconds[1:])  # the first step is a warm-up


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    backbone = random_backbone()
    rng = torch.Generator().manual_seed(1)
    pixels = torch.randn(options.batch, 3, backbone.image_size, backbone.image_size, generator=rng)
    label = torch.randint(options.classes, (options.batch,), generator=rng)
    cached = backbone.encode_images(pixels)
    names = CLASSES[: options.classes]
    ours = Way(backbone, names, image=lambda: cached, text=backbone.text_encoder)
    coop = Way(backbone, names, image=lambda: backbone.encode_images(pixels), text=whole_tower(backbone))

    loss_difference = gradient_difference = 0.0
    for step in range(1 + options.steps):
        results = {way: way.step(label) for way in ((ours, coop) if step % 2 else (coop, ours))}
        (loss_a, gradient_a), (loss_b, gradient_b) = results[ours], results[coop]
        loss_difference = max(loss_difference, float((loss_a - loss_b).abs() / loss_b))
        gradient_difference = max(
            gradient_difference, float((gradient_a - gradient_b).abs().max() / gradient_b.abs().max())
        )

    length = int(ours.learner.end.max()) + 1
    ours_ms, coop_ms = ours.milliseconds(ours.seconds), coop.milliseconds(coop.seconds)
    image_ms = coop.milliseconds(coop.image_seconds)
    print(
        f"{ARCHITECTURE}, random weights, batch {options.batch}, {options.classes} classes, 16 context tokens, "
        f"{options.threads} threads; median of {options.steps} steps"
    )
    print(f"ours     {ours_ms:9.1f} ms   cached features, {length} of {backbone.context_length} tokens")
    print(f"CoOp's   {coop_ms:9.1f} ms   of which the image tower {image_ms:.1f} ms")
    print(f"ratio    {coop_ms / ours_ms:9.1f}      without the image tower {(coop_ms - image_ms) / ours_ms:.1f}")
    print(f"largest relative difference: loss {loss_difference:.1e}, gradient of the context {gradient_difference:.1e}")
    if max(loss_difference, gradient_difference) > TOLERANCE:
        print(f"error: the two ways differ by more than {TOLERANCE:g}", file=sys.stderr)
        return 1
    return 0


def random_backbone() -> Backbone:
    import open_clip

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.CLIP(**open_clip.get_model_config(ARCHITECTURE))
    model.eval().requires_grad_(False)
    preprocess = open_clip.image_transform(model.visual.image_size, is_train=False)
    side = model.visual.image_size[0]
    return Backbone(ARCHITECTURE, model, preprocess, open_clip.get_tokenizer(ARCHITECTURE), side, model.context_length)


def whole_tower(backbone: Backbone) -> Callable[[Tensor, Tensor], Tensor]:
    """The text tower as in CoOp, over the whole context length."""
    model = backbone.model

    def encode(embeddings: Tensor, end: Tensor) -> Tensor:
        x = embeddings + model.positional_embedding
        x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask))
        return x[torch.arange(len(x)), end] @ model.text_projection

    return encode


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A step of prompt training on cached features, beside CoOp's way.")
    parser.add_argument("--steps", type=positive, default=5, help="of each way, after one that warms up")
    parser.add_argument("--classes", type=positive, default=10, help=f"1..{len(CLASSES)}, names of RESISC45")
    parser.add_argument("--batch", type=positive, default=32)
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    if options.classes > len(CLASSES):
        parser.error(f"--classes {options.classes}: there are {len(CLASSES)} names")
    return options


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
