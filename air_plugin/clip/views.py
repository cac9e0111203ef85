"""Image files to the pixels of their views. Workers hand over bytes where they can; the rest is done on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from air_plugin.clip.preparation import describe
from air_plugin.utils.images import UnreadableImage, load_rgb
from air_plugin.utils.seeding import reseeding, stable_seed

Transform = Callable[[Any], Tensor]  # PIL image to (3, H, W)


def choose_views(images: int, views: int, *, count: int, generator: torch.Generator) -> Tensor:
    """(B, count) augmented views of each of B images, different ones where there are enough; view 0 if it is alone.

    Args:
        images: B.
        views: V, view 0 included.
        count: views of each image.
        generator: of the random choice.
    """
    if views <= count:
        return torch.arange(count).remainder(views).expand(images, -1)
    return 1 + torch.rand(images, views - 1, generator=generator).argsort(dim=1)[:, :count]


class Views:
    """Makes V views of an image. It is decoded once; view 0 is not augmented.

    Augmentation depends only on the seed, the index of the image and the view. Most preparations end with ToTensor and
    Normalize: `read` leaves these to `finish`, which does them for a whole batch, on its device, with the same result
    (on the CPU bit for bit). So what a worker hands over is a quarter as large.

    Args:
        plain: makes view 0.
        augment: makes the others; needed where views > 1.
        views: V.
        seed: of the augmentation.
    """

    def __init__(self, plain: Transform, augment: Transform | None, *, views: int, seed: int) -> None:
        self.views, self.seed = views, seed
        self.plain, self.augment, self.tail = plain, augment, None
        heads, tails = zip(*(split_tail(step) for step in [plain, augment][: min(views, 2)]), strict=True)
        if None not in tails and describe(tails[0][1:]) == describe(tails[-1][1:]):
            self.plain, self.augment, self.tail = heads[0], heads[-1], tails[0]

    def read(self, place: tuple[int, str]) -> np.ndarray | str:
        """The views of an image, by its index and path, or why there are none.

        Returns:
            (V, H, W, 3) uint8 that `finish` makes pixels, or (V, 3, H, W) pixels.
        """
        index, path = place
        try:
            image = load_rgb(path)
        except UnreadableImage as error:
            return str(error)
        made = [self.plain(image)]
        if self.views > 1:
            with reseeding() as seed:
                for view in range(1, self.views):
                    seed(stable_seed(self.seed, index, view))
                    made.append(self.augment(image))  # type: ignore[misc]
        if self.tail is None:
            return torch.stack(made).numpy()
        if all(isinstance(view, Image.Image) and view.mode == "RGB" for view in made):
            return np.stack([np.asarray(view) for view in made])
        return torch.stack([self._end(view) for view in made]).to(torch.get_default_dtype()).numpy()

    def _end(self, view: Any) -> Tensor:
        """The last steps for one view, of any mode."""
        for step in self.tail or ():
            view = step(view)
        return view

    def collate(self, items: Sequence[np.ndarray]) -> Tensor:
        """What `read` returned for n images as one tensor for `finish`."""
        if len({item.dtype for item in items}) > 1:
            items = [self.finish(torch.from_numpy(item)[None]).numpy() for item in items]
        return torch.from_numpy(np.stack(items))

    def finish(self, batch: Tensor) -> Tensor:
        """(n, V, ...) collated views to (n * V, 3, H, W) pixels, on the device of the batch."""
        flat = batch.flatten(0, 1)
        if self.tail is None or flat.dtype != torch.uint8:
            return flat
        pixels = flat.permute(0, 3, 1, 2).contiguous().to(torch.get_default_dtype()).div_(255)  # as ToTensor
        for step in self.tail[1:]:
            # As Normalize, which asks the device whether a deviation is 0 and so would wait for all that it computes.
            mean, std = (
                torch.as_tensor(values, dtype=pixels.dtype).view(-1, 1, 1).to(pixels.device, non_blocking=True)
                for values in (step.mean, step.std)
            )
            pixels.sub_(mean).div_(std)
        return pixels


def split_tail(transform: Any) -> tuple[Any, list[Any] | None]:
    """A preparation in two: its steps before ToTensor, and ToTensor with the Normalize steps behind it.

    Returns:
        Both parts; the whole preparation and None where it does not end with ToTensor and any number of Normalize.
    """
    from torchvision.transforms import Compose, Normalize

    steps = transform.transforms if type(transform) is Compose else []
    place = next((number for number, step in enumerate(steps) if _is_to_tensor(type(step))), None)
    if place is None or any(type(step) is not Normalize or _has_zero(step.std) for step in steps[place + 1 :]):
        return transform, None
    return Compose(steps[:place]), steps[place:]


def _has_zero(deviation: Any) -> bool:
    return bool((torch.as_tensor(deviation) == 0).any())


def _is_to_tensor(kind: type) -> bool:
    """Whether a type is torchvision's ToTensor or open_clip's, which leaves tensors as they are."""
    from torchvision.transforms import ToTensor

    return kind is ToTensor or (kind.__name__ == "MaybeToTensor" and kind.__module__ == "open_clip.transform")
