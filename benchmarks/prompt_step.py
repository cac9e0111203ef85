"""A step of prompt training on cached image features, compared with a cut text tower and with CoOp's implementation.

    python -m benchmarks.prompt_step --threads 1               # 10 classes, about a minute
    python -m benchmarks.prompt_step --threads 1 --classes 45 --steps 3
    python -m benchmarks.prompt_step --device cuda --steps 50

- shared prefix, ours: a batch of cached image features; the start token and the context are encoded once, and of each
  class its own tokens.
- cut tower: cached image features; every prompt is encoded, up to the end of the longest one.
- CoOp's: the image tower encodes the batch in every step, and the text tower reads all 77 tokens of every prompt.
- graph, on a GPU: ours, captured as one CUDA graph (AIR.CUDA_GRAPHS).

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
from air_plugin.utils.cuda_graph import Graph, GraphedStep

ARCHITECTURE = "ViT-B-32-quickgelu"
WARM_UP = {"cpu": 1, "cuda": 3}  # steps that are not measured; the second one of a graph is its capture
TOLERANCE = 1e-4  # of loss and gradient, relative to the largest entry; float32 sums in another order
OURS, CUT, COOP, GRAPH = "shared prefix", "cut tower", "CoOp's", "graph"
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
        graphed: bool = False,
        graph: Graph | None = None,
    ) -> None:
        self.learner = PromptLearner(backbone, names, n_ctx=16, generator=torch.Generator().manual_seed(0))
        self.model = PromptedCLIP(backbone, self.learner)
        self.optimiser = torch.optim.SGD(self.learner.parameters(), lr=0.002)
        self.image = image
        self.text = text
        self.run = GraphedStep(
            self.backward,
            list(self.learner.parameters()),
            device=backbone.device,
            name="prompts",
            enabled=graphed,
            warm_up=1,
            graph=graph,
        )
        self.seconds: list[float] = []
        self.image_seconds: list[float] = []

    def backward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        loss = cross_entropy(self.model.logits(batch["img"], self.text(self.model)), batch["label"])
        loss.backward()
        return {"loss": loss}

    def step(self, label: Tensor) -> tuple[Tensor, Tensor]:
        """One step; returns its loss and the gradient of the context."""
        start = now(label)
        features = self.image()
        self.image_seconds.append(now(label) - start)
        loss = self.run({"img": features, "label": label})["loss"]
        self.optimiser.step()
        self.seconds.append(now(label) - start)
        assert self.learner.ctx.grad is not None
        return loss, self.learner.ctx.grad.clone()


def now(tensor: Tensor) -> float:
    """The time at which the tensor's device has done what it was given."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()


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
    ways = make_ways(backbone, CLASSES[: options.classes], pixels)

    largest = [0.0, 0.0]
    for number in range(WARM_UP[options.device] + options.steps):
        turns = list(ways.items()) if number % 2 else list(reversed(ways.items()))
        results = {name: way.step(label) for name, way in turns}
        for result in results.values():
            pair = difference(results[OURS], result)
            largest = [max(both) for both in zip(largest, pair, strict=True)]
    report(options, ways)
    print(f"largest relative difference: loss {largest[0]:.1e}, gradient of the context {largest[1]:.1e}")
    if not max(largest) <= TOLERANCE:
        print(f"error: the ways differ by more than {TOLERANCE:g}", file=sys.stderr)
        return 1
    return 0


def make_ways(backbone: Backbone, names: Sequence[str], pixels: Tensor) -> dict[str, Way]:
    cached = backbone.encode_images(pixels)
    ways = {
        OURS: Way(backbone, names, image=lambda: cached, text=PromptedCLIP.text_features),
        CUT: Way(backbone, names, image=lambda: cached, text=cut_tower),
        COOP: Way(backbone, names, image=lambda: backbone.encode_images(pixels), text=whole_tower(backbone)),
    }
    if cached.is_cuda:
        ways[GRAPH] = Way(backbone, names, image=lambda: cached, text=PromptedCLIP.text_features, graphed=True)
    return ways


def report(options: argparse.Namespace, ways: dict[str, Way]) -> None:
    """Print the median time of each way, and how many times faster ours is; of ours, the graph where there is one."""
    learner = ways[OURS].learner
    assert learner.layout is not None
    ms = {name: 1e3 * statistics.median(way.seconds[-options.steps :]) for name, way in ways.items()}
    image_ms = 1e3 * statistics.median(ways[COOP].image_seconds[-options.steps :])
    count, length = learner.fixed.shape[:2]
    notes = {
        OURS: f"cached features, {len(learner.layout.source)} tokens in all",
        CUT: f"cached features, {learner.length} of {length} tokens, {count * learner.length} in all",
        COOP: f"of which the image tower {image_ms:.1f} ms, {count * length} tokens in all",
    }
    best = OURS
    if GRAPH in ways:
        best, captured = GRAPH, ways[GRAPH].run.captured
        notes[GRAPH] = f"as {OURS}, captured as a CUDA graph" if captured else "could not be captured"
    where = f"{options.threads} threads" if options.device == "cpu" else torch.cuda.get_device_name()
    print(
        f"{ARCHITECTURE}, random weights, batch {options.batch}, {count} classes, 16 context tokens, {where}; "
        f"median of {options.steps} steps"
    )
    for name, value in ms.items():
        print(f"{name:14} {value:9.1f} ms   {notes[name]}")
    for other in (name for name in ms if name != best):
        print(f"{other + ' / ' + best:27}{ms[other] / ms[best]:6.1f}")
    print(f"without the image tower, {COOP} / {best}  {(ms[COOP] - image_ms) / ms[best]:.1f}")


def random_backbone() -> Backbone:
    import open_clip

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.CLIP(**open_clip.get_model_config(ARCHITECTURE))
    model.eval().requires_grad_(False)
    preprocess = open_clip.image_transform(model.visual.image_size, is_train=False)
    side = model.visual.image_size[0]
    return Backbone(ARCHITECTURE, model, preprocess, open_clip.get_tokenizer(ARCHITECTURE), side, model.context_length)


def cut_tower(prompted: PromptedCLIP) -> Tensor:
    """Every prompt by itself, up to the end of the longest one."""
    return unit(prompted.text_encoder(*prompted.prompt_learner()))


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
