"""Jobs of generation: each image has its own seed and key (AiR, ACG)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from air_plugin.utils.class_names import fill
from air_plugin.utils.seeding import stable_seed
from air_plugin.utils.store import key_of


@dataclass(frozen=True)
class ImageJob:
    """One image to be generated: everything that determines its pixels.

    classname, number: the class and the index of the image within it.
    prompt: the text.
    seed: of the noise; another attempt has another seed.
    steps, guidance, size: sampling steps, scale of classifier-free guidance, side in pixels.
    weights: checksum of the generator with its adapter.
    """

    classname: str
    number: int
    prompt: str
    seed: int
    steps: int
    guidance: float
    size: int
    weights: str

    @functools.cached_property
    def key(self) -> str:
        """Name of the image's file, without the suffix."""
        return key_of(asdict(self))

    def seed_of_attempt(self, attempt: int) -> int:
        """Seed of an attempt, which are counted from 0."""
        return self.seed if attempt == 0 else stable_seed(self.seed, "attempt", attempt)


def plan_jobs(
    classnames: Sequence[str],
    *,
    template: str,
    images_per_class: int,
    seed: int,
    steps: int,
    guidance: float,
    size: int,
    weights: str,
) -> list[ImageJob]:
    """The jobs for M = `images_per_class` images of each class, ordered by number, then by class.

    An image depends on the name of its class and its number, but not on M or the other classes, so the jobs of a
    smaller M are the first jobs of a larger one. Arguments: see `ImageJob`; `template` has one {} for the class name.
    """
    return [
        ImageJob(
            classname=name,
            number=number,
            prompt=fill(template, name),
            seed=stable_seed("image", seed, name, number),
            steps=steps,
            guidance=guidance,
            size=size,
            weights=weights,
        )
        for number in range(images_per_class)
        for name in classnames
    ]
