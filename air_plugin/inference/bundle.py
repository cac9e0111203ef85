"""What a trained classifier is outside of training: a folder with its heads, and their use on image files.

`heads.safetensors` holds the tensors; `bundle.json`, written last, says what they are, with their checksum. The image
tower is not in it: it is loaded by its name, and must be the very one that the heads were made for.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor

from air_plugin.auxiliary.classifier import AuxiliaryClassifier
from air_plugin.clip.backbone import Backbone
from air_plugin.clip.loading import load_backbone
from air_plugin.functional.fusion import fuse
from air_plugin.utils.errors import UserError
from air_plugin.utils.files import digest, find_images, write_atomically
from air_plugin.utils.images import READERS, UnreadableImage, load_rgb
from air_plugin.utils.tensors import DTYPES, save_tensors

MARK = "bundle.json"
HEADS = "heads.safetensors"
FORMAT = 1

Images = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@dataclass(frozen=True)
class Prediction:
    """What a head says of one image. top: (label, probability) by falling probability, `label` first."""

    path: Path
    label: str
    probability: float
    top: list[tuple[str, float]]


@dataclass
class Bundle:
    """A trained classifier, ready for use.

    backbone: its frozen image tower.
    classnames: C names.
    text: (E, C, D) unit text features; E is 1 where there is no ensemble of prompts.
    logit_scale: s of the text head, softmax(s f t).
    auxiliary: of the fused head; None where there is none.
    primary: the head that stands for the run: text or fused.
    card: what it was made of, JSON values.
    skipped: the files of the last `predict` that could not be read, with the reason.
    """

    backbone: Backbone
    classnames: list[str]
    text: Tensor
    logit_scale: float
    auxiliary: AuxiliaryClassifier | None
    primary: str
    card: dict[str, Any]
    skipped: dict[Path, str] = field(default_factory=dict)

    @property
    def heads(self) -> list[str]:
        """The names of its heads."""
        return ["text"] if self.auxiliary is None else ["text", "fused"]

    @torch.no_grad()
    def classify(self, features: Tensor) -> dict[str, Tensor]:
        """(N, D) unit image features of its backbone to the (N, C) probabilities of every head."""
        return head_probs(features.to(self.text), self.text, self.auxiliary, logit_scale=self.logit_scale)

    def predict(
        self, images: Images, *, top: int = 1, batch_size: int = 64, head: str | None = None, progress: bool = False
    ) -> Iterator[Prediction]:
        """Classify image files, a batch at a time.

        A file that is no whole image is warned of on stderr, left out, and named in `skipped`.

        Args:
            images: one file, a folder (any nesting; hidden files are left out), or several files.
            top: how many classes `Prediction.top` names, at least 1; cut to C.
            batch_size: images a forward pass.
            head: text or fused; None is the primary.
            progress: show a bar on stderr, where that is a terminal.

        Returns:
            The predictions in the order of the files, one by one while they are made.

        Raises:
            UserError: there is no such head or file, or not one image could be read.
        """
        if head is not None and head not in self.heads:
            raise UserError(f"this bundle has no {head} head; it has: {', '.join(self.heads)}")
        for name, value in (("top", top), ("batch_size", batch_size)):
            if value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")
        paths = _files(images)
        self.skipped = {}
        return self._predictions(
            paths,
            top=min(top, len(self.classnames)),
            batch_size=batch_size,
            head=head or self.primary,
            alone=len(paths) == 1 and isinstance(images, str | os.PathLike),
            progress=progress,
        )

    def _predictions(
        self, paths: list[Path], *, top: int, batch_size: int, head: str, alone: bool, progress: bool
    ) -> Iterator[Prediction]:
        from tqdm import tqdm

        bar = tqdm(total=len(paths), desc="images", unit="image", disable=None if progress else True)
        with bar, ThreadPoolExecutor(READERS) as pool:
            for start in range(0, len(paths), batch_size):
                batch = paths[start : start + batch_size]
                kept, pixels = [], []
                for path, read in zip(batch, pool.map(self._read, batch), strict=True):
                    if isinstance(read, Tensor):
                        kept.append(path)
                        pixels.append(read)
                        continue
                    if alone:
                        raise UnreadableImage(read)
                    self.skipped[path] = read
                    tqdm.write(f"warning: {read}; it is left out", file=sys.stderr)
                if pixels:
                    yield from self._said(kept, torch.stack(pixels), top=top, head=head)
                bar.update(len(batch))
        if len(self.skipped) == len(paths):
            raise UserError(f"none of the {len(paths)} images could be read")

    def _read(self, path: Path) -> Tensor | str:
        """(3, H, W) pixels of a file as the backbone takes them, or why there are none."""
        try:
            return self.backbone.preprocess(load_rgb(path))
        except UnreadableImage as error:
            return " ".join(str(error).split())

    def _said(self, paths: list[Path], pixels: Tensor, *, top: int, head: str) -> list[Prediction]:
        probs = self.classify(self.backbone.encode_images(pixels))[head]
        # Not torch.topk, which has no rule for ties: a label must be the argmax that the trainer takes.
        values, index = probs.sort(dim=1, descending=True, stable=True)
        rows = zip(paths, values[:, :top].tolist(), index[:, :top].tolist(), strict=True)
        made = []
        for path, numbers, classes in rows:
            ranked = [(self.classnames[c], value) for c, value in zip(classes, numbers, strict=True)]
            made.append(Prediction(path, *ranked[0], ranked))
        return made


def head_probs(
    features: Tensor, text: Tensor, auxiliary: AuxiliaryClassifier | None, *, logit_scale: float
) -> dict[str, Tensor]:
    """The probabilities of every head.

    Args:
        features: (N, D) unit image features.
        text: (E, C, D) unit text features; an ensemble's probabilities are averaged (UPL, prompt ensemble).
        auxiliary: of the fused head p* = p + lambda p^, normalised (AiR, PLG).
        logit_scale: s of the text head, softmax(s f t).

    Returns:
        By the head's name (N, C), rows sum to 1.
    """
    probs = (logit_scale * (features @ text.transpose(1, 2))).softmax(dim=2).mean(dim=0)  # (E, N, C) -> (N, C)
    if auxiliary is None:
        return {"text": probs}
    return {"text": probs, "fused": fuse(probs, auxiliary.probs(features), weight=auxiliary.fusion_weight)}


def save_bundle(
    folder: str | Path,
    *,
    backbone: Backbone,
    classnames: Sequence[str],
    text: Tensor,
    auxiliary: AuxiliaryClassifier | None,
    primary: str,
    card: Mapping[str, Any],
) -> None:
    """Write a bundle; a folder that a kill leaves without `bundle.json` is none.

    Args:
        folder: is made; a bundle that is there is replaced.
        backbone: that makes the image features.
        classnames: C names.
        text: (C, D) unit text features of the prompts, or (E, C, D) of an ensemble.
        auxiliary: of the fused head, with its `fusion_weight`; None where there is none.
        primary: the head that stands for the run: text or fused.
        card: more of its origin, JSON values; `transclip` true where the run's own predictions were refined over all
            test images together, which a bundle cannot do.

    Raises:
        ValueError: the arguments do not fit each other.
    """
    text = (text if text.ndim == 3 else text[None]).float()
    shape = (len(classnames), text.shape[2])
    if text.shape[1:] != shape or (auxiliary is not None and auxiliary.weight.shape != shape):
        raise ValueError(f"heads must be {shape}, classes by features")
    if primary not in (["text"] if auxiliary is None else ["text", "fused"]):
        raise ValueError(f"there is no {primary} head")
    folder = Path(folder)
    (folder / MARK).unlink(missing_ok=True)  # it is not true of what is written now
    tensors = {"text": text}
    if auxiliary is not None:
        tensors |= {"auxiliary.weight": auxiliary.weight, "auxiliary.bias": auxiliary.bias}
    save_tensors(folder / HEADS, tensors)
    said = {
        "format": FORMAT,
        "classes": list(classnames),
        "primary": primary,
        "backbone": {
            "name": _absolute(backbone.name),
            "precision": precision_of(backbone),
            "fingerprint": backbone.fingerprint,
            "logit_scale": backbone.logit_scale,
            "preprocessing": preprocessing_of(backbone),
        },
        "auxiliary": None
        if auxiliary is None
        else {"scale": auxiliary.scale, "fusion_weight": auxiliary.fusion_weight, "card": dict(auxiliary.card)},
        "card": dict(card),
        "files": {HEADS: digest((folder / HEADS).read_bytes())},
    }
    write_atomically(folder / MARK, json.dumps(said, indent=1, ensure_ascii=False).encode(), durable=True)


def load_bundle(
    folder: str | Path, *, device: str | torch.device = "cpu", backbone: Backbone | str | None = None
) -> Bundle:
    """Read a bundle and load its backbone.

    Args:
        folder: that `save_bundle` wrote, `bundle/` in a run's folder.
        device: where the backbone is loaded to.
        backbone: one that is loaded already, or where its weights lie now, as `load_backbone` takes a name.

    Raises:
        UserError: there is no whole bundle, its backbone is not on this machine, or that has other weights or prepares
            images in another way.
    """
    folder = Path(folder)
    said = _read_mark(folder)
    try:
        wanted, classnames, primary, card = (said[key] for key in ("backbone", "classes", "primary", "card"))
        name, precision, logit_scale = wanted["name"], wanted["precision"], float(wanted["logit_scale"])
        expected = wanted["fingerprint"], dict(wanted["preprocessing"])
        text, auxiliary = _read_heads(folder, said)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"bundle {folder} is damaged: {MARK} does not hold what it should; make it again") from error
    if not isinstance(backbone, Backbone):
        backbone = load_backbone(backbone or name, precision=precision, device=device)
    _require_same(folder, name, *expected, backbone=backbone)
    if auxiliary is not None:
        auxiliary = auxiliary.to(backbone.device)
    return Bundle(backbone, classnames, text.to(backbone.device), logit_scale, auxiliary, primary, card)


def precision_of(backbone: Backbone) -> str:
    """The precision that a backbone was loaded in: some of a half-precision model's parts stay in fp32."""
    types = {value.dtype for value in backbone.model.parameters()}
    return next((name for name, dtype in DTYPES.items() if name != "fp32" and dtype in types), "fp32")


def preprocessing_of(backbone: Backbone) -> dict[str, Any]:
    """How a backbone prepares images, as JSON values.

    Returns:
        resize (the name of the step), size (of the shorter side, or height and width where images are squashed),
        interpolation, crop (height and width), mean and std; each is None where there is no such step.
    """
    steps = getattr(backbone.preprocess, "transforms", [backbone.preprocess])
    found: dict[str, Any] = dict.fromkeys(("resize", "size", "interpolation", "crop", "mean", "std"))
    for step in steps:
        if hasattr(step, "interpolation"):
            found["resize"], found["size"] = type(step).__name__, step.size
            found["interpolation"] = getattr(step.interpolation, "value", str(step.interpolation))
        elif hasattr(step, "mean") and hasattr(step, "std"):
            found["mean"], found["std"] = ([float(value) for value in values] for values in (step.mean, step.std))
        elif "Crop" in type(step).__name__:
            found["crop"] = step.size
    return json.loads(json.dumps(found))


def _read_mark(folder: Path) -> dict[str, Any]:
    """The content of a bundle's JSON, of a form that is known."""
    if not (folder / MARK).is_file():
        if (folder / "bundle" / MARK).is_file():
            raise UserError(f"{folder} is a run's folder; its bundle is {folder / 'bundle'}")
        if (folder / HEADS).is_file():
            raise UserError(f"bundle {folder} is unfinished: it has no {MARK}; run again what makes it")
        raise UserError(f"no bundle in {folder}; a finished run of train.py has one in its folder, called bundle")
    try:
        said = json.loads((folder / MARK).read_text(encoding="utf-8"))
        form = said["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"bundle {folder} is damaged: {MARK} cannot be read; make it again") from error
    if form != FORMAT:
        raise UserError(f"bundle {folder} is of form {form}; this air_plugin reads form {FORMAT}")
    return said


def _read_heads(folder: Path, said: Mapping[str, Any]) -> tuple[Tensor, AuxiliaryClassifier | None]:
    """The text features and the auxiliary classifier of a bundle."""
    try:
        data = (folder / HEADS).read_bytes()
    except OSError as error:
        raise UserError(f"bundle {folder} is damaged: cannot read {HEADS}: {error.strerror}; make it again") from error
    if digest(data) != said["files"][HEADS]:
        raise UserError(f"bundle {folder} is damaged: {HEADS} is not what was saved; make it again")
    tensors, settings = load_safetensors(data), said["auxiliary"]
    if settings is None:
        return tensors["text"], None
    weight, bias = tensors["auxiliary.weight"], tensors["auxiliary.bias"]
    return tensors["text"], AuxiliaryClassifier(weight, bias, **settings)


def _require_same(
    folder: Path, name: str, fingerprint: str, preprocessing: dict[str, Any], *, backbone: Backbone
) -> None:
    """Raise a UserError where a backbone is not the one that a bundle was made for."""
    if backbone.fingerprint != fingerprint:
        raise UserError(
            f"bundle {folder} was made by other weights, of {name} ({fingerprint[:12]}), than those of "
            f"{backbone.name} ({backbone.fingerprint[:12]})"
        )
    own = preprocessing_of(backbone)
    for key, value in preprocessing.items():
        if own.get(key) != value:
            raise UserError(
                f"bundle {folder} was made by {name} with images prepared in another way: {key} was "
                f"{value} and is {own.get(key)} in {backbone.name}"
            )


def _absolute(name: str) -> str:
    """A backbone's name, its file or folder by the whole path: a bundle may be used from anywhere."""
    architecture, colon, source = name.partition(":")
    if name != "mini" and Path(name).is_dir():
        return str(Path(name).resolve())
    return f"{architecture}:{Path(source).resolve()}" if colon and Path(source).is_file() else name


def _files(images: Images) -> list[Path]:
    """The files that somebody means."""
    if not isinstance(images, str | os.PathLike):
        paths = [Path(path) for path in images]
        if not paths:
            raise UserError("there are no images to classify")
        return paths
    path = Path(images)
    if path.is_dir():
        found = [one for one in find_images(path) if not any(p.startswith(".") for p in one.relative_to(path).parts)]
        if not found:
            raise UserError(f"there are only hidden files below {path}")
        return found
    if not path.exists():
        raise UserError(f"there is no image or folder {path}")
    return [path]
