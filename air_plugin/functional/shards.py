"""Sums over images in shards of a fixed size: all that EM needs of the unlabelled images, wherever these are.

A sum over N images is the sum of its shards, added in their order. The size of a shard does not depend on the number
of workers, so the same bits come out whoever computes a shard and whichever is finished first. A worker reads the
images of its shards by itself, and only sums leave it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from air_plugin.functional.anchors import certain_counts

SHARD = 65_536  # images; another size changes the last bits of the sums of more images than that
Keep = Callable[[str, Callable[[], list[Tensor]]], list[Tensor]]
SMALLEST = torch.finfo(torch.float32).tiny


class Images(Protocol):
    """N images that are read a part at a time. It must be small when it is pickled: every worker receives it."""

    def __len__(self) -> int:
        """N."""

    @property
    def classes(self) -> int:
        """C."""

    def features(self, start: int, stop: int) -> Tensor:
        """(stop - start, D) unit features of the images from `start` up to, without, `stop`."""

    def text_probs(self, start: int, stop: int) -> Tensor:
        """(stop - start, C) their text probabilities; rows sum to 1."""


class ShardMap(Protocol):
    """How shards are computed: in this process, by others, or on other machines.

    `setup()` is called once in each worker and returns its state; `work(state, unit)` computes a unit. All of them can
    be pickled.
    """

    def __call__(
        self, setup: Callable[[], Any], work: Callable[[Any, range], Any], units: Sequence[range], /
    ) -> Iterable[tuple[int, Any]]:
        """(index, result) of every unit once, in any order."""


@dataclass(frozen=True)
class InMemory:
    """Images whose features (N, D) and text probabilities (N, C) are tensors in memory, on one device."""

    all_features: Tensor
    all_text_probs: Tensor

    def __len__(self) -> int:
        return len(self.all_features)

    @property
    def classes(self) -> int:
        return self.all_text_probs.shape[1]

    def features(self, start: int, stop: int) -> Tensor:
        return self.all_features[start:stop]

    def text_probs(self, start: int, stop: int) -> Tensor:
        return self.all_text_probs[start:stop]


def in_this_process(
    setup: Callable[[], Any], work: Callable[[Any, range], Any], units: Sequence[range], /
) -> Iterator[tuple[int, Any]]:
    """The `ShardMap` that computes one unit after the other, here."""
    state = setup()
    for index, unit in enumerate(units):
        yield index, work(state, unit)


def cut(images: int, size: int = SHARD) -> list[range]:
    """The shards of N images.

    Example:
        >>> cut(5, size=2)
        [range(0, 2), range(2, 4), range(4, 5)]
    """
    return [range(start, min(start + size, images)) for start in range(0, images, size)]


def add_up(
    setup: Callable[[], Any],
    work: Callable[[Any, range], Sequence[Any]],
    shards: Sequence[range],
    *,
    map_shards: ShardMap = in_this_process,
    combine: Callable[[Tensor, Tensor], Tensor] = torch.add,
) -> list[Tensor]:
    """The sums over shards of what `work` returns for each, a sequence of arrays or tensors, in the shards' order.

    Results that come before an earlier shard's are kept until it is there. `combine` may do another thing than add.

    Raises:
        RuntimeError: a shard has no result.
    """
    total: list[Tensor] = []
    early: dict[int, Sequence[Any]] = {}
    following = 0
    for index, result in map_shards(setup, work, shards):
        early[index] = result
        while following in early:
            parts = [_tensor(part) for part in early.pop(following)]
            total = [combine(one, other) for one, other in zip(total, parts, strict=True)] if following else parts
            following += 1
    if following < len(shards):
        raise RuntimeError(f"shard {following} of {len(shards)} has no result")
    return total


@dataclass(frozen=True)
class EStep:
    """The E step: the state of a worker that computes shards of it.

    images: the unlabelled images.
    head: (C, D) weight and (C,) bias of the classes, float64, as `light` makes them; None uses the text alone.
    likelihood_weight: a.
    chunk: images at a time.
    certain: whether `sums` has `certain_counts`, too.
    """

    images: Images
    head: tuple[Any, Any] | None
    likelihood_weight: float
    chunk: int
    certain: bool = False

    def parts(self, shard: range) -> Iterator[tuple[range, Tensor, Tensor]]:
        """Chunk by chunk: which images, their (n, D) features and (n, C) z = softmax(log p + a (f w + b)), float64."""
        head = None if self.head is None else (_tensor(self.head[0]), _tensor(self.head[1]))
        for start in range(shard.start, shard.stop, self.chunk):
            part = range(start, min(start + self.chunk, shard.stop))
            features = self.images.features(part.start, part.stop).double()
            score = self.images.text_probs(part.start, part.stop).double().clamp(min=SMALLEST).log_()  # a copy
            if head is not None:
                likelihood = torch.addmm(head[1], features, head[0].T)
                score += likelihood.mul_(self.likelihood_weight)
            yield part, features, score.softmax(dim=1)

    @torch.no_grad()
    def sums(self, shard: range) -> list[Any]:
        """Of a shard: (C,) soft counts, (C, D) sums of the features weighted by z, and (C,) certain counts if asked."""
        soft_counts = sums = certain = torch.empty(0)
        for part, features, z in self.parts(shard):
            if part.start == shard.start:
                soft_counts = z.new_zeros(z.shape[1])
                sums = z.new_zeros(z.shape[1], features.shape[1])
                certain = z.new_zeros(z.shape[1])
            soft_counts += z.sum(dim=0)
            sums.addmm_(z.T, features)
            if self.certain:
                certain += certain_counts(z)
        return [light(total) for total in (soft_counts, sums, certain)[: 3 if self.certain else 2]]

    def largest(self, shard: range) -> list[Any]:
        """(C,) the largest text probabilities of a shard."""
        starts = range(shard.start, shard.stop, self.chunk)
        parts = [self.images.text_probs(start, min(start + self.chunk, shard.stop)).amax(dim=0) for start in starts]
        return [light(torch.stack(parts).amax(dim=0).double())]


def compute(name: str, sums: Callable[[], list[Tensor]]) -> list[Tensor]:
    """The `Keep` that keeps nothing."""
    return sums()


@dataclass(frozen=True)
class Sums:
    """Sums over all images.

    images: N images.
    chunk: images at a time, in each worker.
    shard: images of a shard.
    map_shards: computes the shards.
    keep: `keep(name, sums)` returns `sums()`, or what it has kept of an earlier call with that name.
    """

    images: Images
    chunk: int
    shard: int = SHARD
    map_shards: ShardMap = in_this_process
    keep: Keep = compute

    def expect(
        self, name: str, head: tuple[Tensor, Tensor] | None, likelihood_weight: float, *, certain: bool = False
    ) -> list[Tensor]:
        """Of an E step, see `EStep.sums`."""
        numbers = None if head is None else (light(head[0]), light(head[1]))
        return self._add_up(name, EStep.sums, EStep(self.images, numbers, likelihood_weight, self.chunk, certain))

    def largest_text_probs(self) -> Tensor:
        """(C,) over all images, in float64."""
        state = EStep(self.images, None, 0.0, self.chunk)
        return self._add_up("largest", EStep.largest, state, combine=torch.maximum)[0]

    def second_moment(self) -> Tensor:
        """(D, D) sum of f f', in float64."""
        return self._add_up("moment", _moment, EStep(self.images, None, 0.0, self.chunk))[0]

    def mean_feature(self) -> Tensor:
        """(D,) mean of the features, in float64."""
        return self._add_up("mean", _sum, self.images)[0] / len(self.images)

    def _add_up(
        self,
        name: str,
        work: Callable[[Any, range], Sequence[Any]],
        state: Any,
        *,
        combine: Callable[[Tensor, Tensor], Tensor] = torch.add,
    ) -> list[Tensor]:
        shards, setup = cut(len(self.images), self.shard), partial(_same, state)
        return self.keep(name, lambda: add_up(setup, work, shards, map_shards=self.map_shards, combine=combine))


def light(tensor: Tensor) -> Any:
    """A tensor as an array that is pickled by its values: torch would move a tensor to /dev/shm. On a GPU it stays."""
    return tensor.numpy() if tensor.device.type == "cpu" else tensor


def _tensor(numbers: Any) -> Tensor:
    """The inverse of `light`; a copy, since an array that was unpickled may be read-only."""
    return torch.tensor(numbers) if isinstance(numbers, np.ndarray) else numbers


@torch.no_grad()
def _moment(state: EStep, shard: range) -> tuple[Any]:
    moment = torch.empty(0)
    for start in range(shard.start, shard.stop, state.chunk):
        part = state.images.features(start, min(start + state.chunk, shard.stop)).double()
        if start == shard.start:
            moment = part.new_zeros(part.shape[1], part.shape[1])
        moment.addmm_(part.T, part)
    return (light(moment),)


@torch.no_grad()
def _sum(images: Images, shard: range) -> tuple[Any]:
    return (light(images.features(shard.start, shard.stop).sum(dim=0, dtype=torch.float64)),)


def _same(state: Any) -> Any:
    return state
