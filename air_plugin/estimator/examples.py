"""Pictures that a saved classifier keeps: typical generated images, and the images it is least sure of."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from air_plugin.auxiliary.stages import Prototypes
from air_plugin.utils.errors import UserError
from air_plugin.utils.files import to_json, write_atomically
from air_plugin.utils.images import load_rgb
from air_plugin.utils.tensors import load_tensors, save_tensors

FOLDER, FEATURES, LIST = "examples", "features.safetensors", "examples.json"
PER_CLASS, ALL = 8, 4000  # generated images kept: of a class, and of all classes together
UNSURE = 24
SIDE = 128  # longest side of a kept picture, in pixels


@dataclass(frozen=True)
class Unsure:
    """An unlabelled image, the class that is most probable for it, and that probability."""

    path: Path
    label: str
    probability: float


@dataclass(frozen=True)
class Examples:
    """The pictures beside a classifier.

    generated: C lists of k files, the most typical ones of a class first.
    features: (C, k, D) their unit features.
    unsure: unlabelled images by rising probability of their class.
    """

    generated: list[list[Path]]
    features: Tensor
    unsure: list[Unsure]

    def nearest(self, features: Tensor, label: int, count: int) -> list[Path]:
        """Of a class, the generated images that are nearest to an image.

        Args:
            features: (D,) unit features of the image.
            label: the class.
            count: how many at the most.
        """
        similarity = self.features[label].to(features) @ features
        return [self.generated[label][place] for place in similarity.argsort(descending=True)[:count].tolist()]

    def save(self, folder: Path) -> None:
        """Write small copies of the pictures below a folder, in place of those in it."""
        require_free(folder)
        target = folder / f".{FOLDER}.new"  # the pictures may be those that lie in the folder now
        shutil.rmtree(target, ignore_errors=True)
        for number, paths in enumerate(self.generated):
            for place, path in enumerate(paths):
                _copy(path, target / "generated" / f"{number:04d}-{place}.png")
        for place, one in enumerate(self.unsure):
            _copy(one.path, target / "unsure" / f"{place:02d}.png")
        save_tensors(target / FEATURES, {"features": self.features.cpu().contiguous()})
        rows = [{"origin": one.path.name, "label": one.label, "probability": one.probability} for one in self.unsure]
        write_atomically(target / LIST, to_json(rows, indent=1).encode("utf-8", "backslashreplace"))
        shutil.rmtree(folder / FOLDER, ignore_errors=True)
        target.rename(folder / FOLDER)

    @classmethod
    def load(cls, folder: Path) -> Examples | None:
        """The pictures in a classifier's folder; None where it was saved without, as by train.py.

        Raises:
            UserError: they are damaged.
        """
        target = folder / FOLDER
        if not (target / LIST).is_file():
            return None
        try:
            rows = json.loads((target / LIST).read_text(encoding="utf-8"))
            features = (load_tensors(target / FEATURES) or {})["features"]
            unsure = [
                Unsure(target / "unsure" / f"{place:02d}.png", row["label"], float(row["probability"]))
                for place, row in enumerate(rows)
            ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{target} is damaged; save or fit the classifier again") from error
        classes, kept, _ = features.shape
        generated = [[target / "generated" / f"{c:04d}-{k}.png" for k in range(kept)] for c in range(classes)]
        return cls(generated, features, unsure)


def require_free(folder: Path) -> None:
    """Raise a UserError where a folder has `examples` that are not a classifier's: they would be removed."""
    target = folder / FOLDER
    if target.exists() and not (target / LIST).is_file() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is there and not of a classifier; choose another folder, or move it away")


def collect(prototypes: Prototypes, paths: Sequence[str], probs: Tensor, classnames: Sequence[str]) -> Examples:
    """The pictures of a fit.

    Args:
        prototypes: of C classes.
        paths: N unlabelled images.
        probs: (N, C) their probabilities, of the head that predicts.
        classnames: C names.
    """
    classes, kept, _ = prototypes.features.shape
    count = max(1, min(PER_CLASS, kept, ALL // classes))
    generated = [[prototypes.images[c][k] for k in row[:count]] for c, row in enumerate(prototypes.kept.tolist())]
    value, label = probs.max(dim=1)
    order = value.argsort(stable=True)[:UNSURE].tolist()
    unsure = [Unsure(Path(paths[i]), classnames[int(label[i])], round(float(value[i]), 6)) for i in order]
    return Examples(generated, prototypes.features[:, :count].cpu(), unsure)


def _copy(path: Path, target: Path) -> None:
    image, buffer = load_rgb(path), io.BytesIO()
    image.thumbnail((SIDE, SIDE))
    image.save(buffer, format="png")
    write_atomically(target, buffer.getvalue())
