"""What the mixin needs to look into a host, the trainer of other people that it extends."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from air_plugin.clip.backbone import Backbone
from air_plugin.utils.errors import UserError
from air_plugin.utils.images import READERS, load_rgb

SAME = 0.9995  # cosine of two features of one image, above which one tower made both, be it in fp32, fp16 or bf16


class ImageModel(Protocol):
    """What the models of CoOp's family have, and all that `image_features` needs of one by default."""

    image_encoder: nn.Module  # (B, 3, H, W) pixels to (B, D) features
    dtype: torch.dtype  # of the pixels


def unit(features: Tensor) -> Tensor:
    """(B, D) features to unit rows in float32."""
    return nn.functional.normalize(features.float(), dim=1)


def same_tower(one: Tensor, other: Tensor) -> bool:
    """Whether one tower made both (n, D) unit features of the same images."""
    return one.shape == other.shape and bool(((one * other.to(one)).sum(dim=1) > SAME).all())


@contextmanager
def evaluating(models: Iterable[Any]) -> Iterator[None]:
    """Models in evaluation mode for a while; afterwards each of their parts is in its former mode."""
    models = [model for model in models if isinstance(model, nn.Module)]
    modes = [(part, part.training) for model in models for part in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def uses(classes: Sequence[type], method: str, called: str) -> bool:
    """Whether a method of the first class that has it names another one, there or in its super()'s."""
    for cls in classes:
        if method in vars(cls):
            names = inspect.unwrap(vars(cls)[method]).__code__.co_names
            if called in names or not {"super", method} <= set(names):
                return called in names
    return False


def require_logits(name: str, logits: Any, expected: tuple[int, int]) -> None:
    """Raise a UserError where a host's model_inference gives anything but (B, C) logits; `name` is the host's."""
    if not isinstance(logits, Tensor) or logits.shape != expected:
        given = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise UserError(
            f"{name}: model_inference returns {given}, not {expected} logits, images by classes; let "
            "the trainer's own return these alone, see docs/drop-in.md"
        )


class Tower:
    """The image tower of a host with `image_features`, and images as the host prepares them for a test.

    Every look at it leaves the host's models in their modes.
    """

    def __init__(self, host: Any) -> None:
        self.host = host

    @property
    def name(self) -> str:
        return type(self.host).__name__

    @property
    def models(self) -> list[Any]:
        """The host's models."""
        return [getattr(self.host, "model", None), *getattr(self.host, "_models", {}).values()]

    @property
    def encoder(self) -> nn.Module | None:
        """The model's image encoder; None where it has none."""
        model = getattr(self.host, "model", None)
        encoder = getattr(getattr(model, "module", model), "image_encoder", None)  # module: of DataParallel
        return encoder if isinstance(encoder, nn.Module) else None

    def is_trained(self, path: str) -> bool:
        """Whether the features of an image depend on a parameter that the host's optimizers train."""
        optimizers = [optimizer for optimizer in self.host._optims.values() if optimizer is not None]
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        trained = [parameter for group in groups for parameter in group["params"] if parameter.requires_grad]
        with evaluating(self.models), torch.enable_grad():
            total = self.host.image_features(self.pixels([path])).sum()
        if not trained or not total.requires_grad:
            return False
        return any(gradient is not None for gradient in torch.autograd.grad(total, trained, allow_unused=True))

    def is_backbones(self, backbone: Backbone, path: str, *, size: int | None) -> bool:
        """Whether it gives the features of a backbone for an image; `size`: made square, as generated images are."""
        image = load_rgb(path)
        if size is not None:
            side = min(image.size)
            image = image.crop((0, 0, side, side)).resize((size, size))
        expected = backbone.encode_images(backbone.preprocess(image)[None])
        with evaluating(self.models):
            pixels = self.transform(image)[None].to(self.host.device)
            return same_tower(self.unit_features(pixels), expected)

    def scores(self, inference: Callable[[Tensor], Any], path: str) -> Any:
        """What a function of images gives for one image."""
        with evaluating(self.models):
            return inference(self.pixels([path]))

    @torch.no_grad()
    def encode(self, paths: Sequence[str | Path]) -> Tensor:
        """(n, D) unit features of image files."""
        size = self.host.cfg.DATALOADER.TEST.BATCH_SIZE
        with evaluating(self.models):
            starts = range(0, len(paths), size)
            return torch.cat([self.unit_features(self.pixels(paths[start : start + size])) for start in starts])

    def pixels(self, paths: Sequence[str | Path]) -> Tensor:
        """(n, 3, H, W) images."""
        transform = self.transform
        with ThreadPoolExecutor(READERS) as pool:
            return torch.stack(list(pool.map(lambda path: transform(load_rgb(path)), paths))).to(self.host.device)

    @property
    def transform(self) -> Callable[[Any], Tensor]:
        """PIL image to (3, H, W), of the host's test images.

        Raises:
            UserError: they have none, or several.
        """
        transform = getattr(self.host.dm.test_loader.dataset, "transform", None)
        if not callable(transform):
            raise UserError(
                f"{self.name}: dm.test_loader.dataset.transform is {type(transform).__name__}, not one "
                "transform of test images, which the generated images need, too"
            )
        return transform

    def unit_features(self, images: Tensor) -> Tensor:
        """(B, D) unit `image_features` of (B, 3, H, W) images.

        Raises:
            UserError: the host gives something else.
        """
        features = self.host.image_features(images)
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(images):
            given = tuple(features.shape) if isinstance(features, Tensor) else f"a {type(features).__name__}"
            raise UserError(
                f"{self.name}: image_features returns {given} for {len(images)} images, not one row "
                "each; override it, see docs/drop-in.md"
            )
        return unit(features)

    @contextmanager
    def recording(self) -> Iterator[list[Any]]:
        """Record the outputs of the encoder meanwhile, so that no image is encoded twice."""
        outputs: list[Any] = []
        if self.encoder is None:
            yield outputs
            return
        hook = self.encoder.register_forward_hook(lambda module, inputs, output: outputs.append(output))
        try:
            yield outputs
        finally:
            hook.remove()


class Tally:
    """The right predictions of one test, of the host alone and of both classifiers together.

    The predictions of `model_inference` are matched with the labels that the evaluator gets next.

    calls: of model_inference.
    total, own, fused: images with labels, and how many of them each predicted right.
    matched: whether every batch of labels had as many predictions.
    """

    def __init__(self) -> None:
        self.calls = self.total = self.own = self.fused = 0
        self.matched = True
        self._pending: list[Tensor] = []

    def predict(self, own: Tensor, fused: Tensor) -> None:
        """Take (B, C) scores of both."""
        self.calls += 1
        self._pending.append(torch.stack([own.argmax(dim=1), fused.argmax(dim=1)]))

    def label(self, labels: Any) -> None:
        """Take the (B,) true classes of the predictions since the last call."""
        predictions = torch.cat(self._pending, dim=1) if self._pending else None
        self._pending = []
        if predictions is None or not isinstance(labels, Tensor) or labels.shape != predictions[0].shape:
            self.matched = False
            return
        hits = (predictions == labels.to(predictions)).sum(dim=1).tolist()
        self.total += len(labels)
        self.own, self.fused = self.own + hits[0], self.fused + hits[1]

    def __str__(self) -> str:
        if not self.total or not self.matched:
            return "accuracies unknown: the evaluator did not get the labels of these batches"
        own, fused = (f"{100 * hits / self.total:.1f} %" for hits in (self.own, self.fused))
        return f"{own} alone, {fused} fused, of {self.total:,} images"

    @contextmanager
    def watching(self, evaluator: Any) -> Iterator[None]:
        """Take the labels that an evaluator's `process(output, labels)` gets meanwhile."""
        former, own = getattr(evaluator, "process", None), "process" in getattr(evaluator, "__dict__", {})
        if former is None:
            yield
            return
        process = getattr(former, "unwatched", former)  # the labels of a test within a test are not the outer one's

        def watched(*args: Any, **kwargs: Any) -> Any:
            self.label(args[1] if len(args) > 1 else kwargs.get("gt"))  # Dassl: process(mo, gt)
            return process(*args, **kwargs)

        watched.unwatched = process  # type: ignore[attr-defined]
        evaluator.process = watched
        try:
            yield
        finally:
            if own:
                evaluator.process = former
            else:
                del evaluator.process
