"""The file of a trained classifier: a folder with its heads, called bundle.

`heads.safetensors` holds the tensors; `bundle.json`, written last, describes them and holds their checksum. The image
tower is not in it: it is loaded by its name, and must be the one that the heads were made for.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor

from air_plugin.auxiliary.classifier import AuxiliaryClassifier
from air_plugin.clip.backbone import Backbone
from air_plugin.clip.huggingface import PREFIX
from air_plugin.clip.loading import load_backbone
from air_plugin.inference.predict import Bundle
from air_plugin.mini import BACKBONES
from air_plugin.utils.errors import UserError
from air_plugin.utils.files import digest, to_json, write_atomically
from air_plugin.utils.tensors import DTYPES, save_tensors, unit_rows

logger = logging.getLogger(__name__)

MARK = "bundle.json"
HEADS = "heads.safetensors"
FORMAT = 1
VISUAL_FORMAT = 2  # with tokens of the image tower, which readers of form 1 would leave out


def save_bundle(
    folder: str | Path,
    *,
    backbone: Backbone,
    classnames: Sequence[str],
    text: Tensor,
    auxiliary: AuxiliaryClassifier | None,
    primary: str,
    card: Mapping[str, Any],
    tokens: Tensor | None = None,
    reads_frozen: bool = False,
) -> None:
    """Write a bundle; a folder that a kill leaves without `bundle.json` is refused by `load_bundle`.

    Args:
        folder: is made; a bundle in it is replaced.
        backbone: that makes the image features; frozen, without learned tokens.
        classnames: C names.
        text: (C, D) unit text features of the prompts, or (E, C, D) of an ensemble.
        auxiliary: of the fused head, with its `fusion_weight`; None without one.
        primary: the run's primary classifier: text or fused.
        card: more of its origin, JSON values; `transduction` names the method by which the run's own predictions were
            refined over many images together, which a bundle cannot do.
        tokens: (P, W) learned tokens of the image tower; None without any.
        reads_frozen: whether the auxiliary classifier reads features of the tower without the tokens.

    Raises:
        ValueError: the arguments do not fit each other.
    """
    text = unit_rows((text if text.ndim == 3 else text[None]).float(), "texts")
    heads = {"text": text[0]} if auxiliary is None else {"text": text[0], "auxiliary": auxiliary.weight}
    for name, head in heads.items():
        if len(head) != len(classnames) or head.shape[1] % text.shape[2]:
            raise ValueError(f"the {name} head is {tuple(head.shape)}, not {len(classnames)} classes by features")
    if primary not in (["text"] if auxiliary is None else ["text", "fused"]):
        raise ValueError(f"there is no {primary} head")
    folder = Path(folder)
    (folder / MARK).unlink(missing_ok=True)  # it does not describe what is written now
    tensors = {"text": text, "visual.tokens": tokens}
    if auxiliary is not None:
        tensors |= {"auxiliary.weight": auxiliary.weight, "auxiliary.bias": auxiliary.bias}
    save_tensors(folder / HEADS, {name: value for name, value in tensors.items() if value is not None})
    mark = {
        "format": FORMAT if tokens is None else VISUAL_FORMAT,
        "classes": list(classnames),
        "primary": primary,
        "backbone": _described(backbone),
        "auxiliary": None
        if auxiliary is None
        else {"scale": auxiliary.scale, "fusion_weight": auxiliary.fusion_weight, "card": dict(auxiliary.card)},
        **({} if tokens is None else {"reads_frozen": reads_frozen}),
        "card": dict(card),
        "files": {HEADS: digest((folder / HEADS).read_bytes())},
    }
    write_atomically(
        folder / MARK, to_json(mark, indent=1, ensure_ascii=False).encode("utf-8", "backslashreplace"), durable=True
    )


def _described(backbone: Backbone) -> dict[str, Any]:
    """Which backbone a bundle needs, as JSON values."""
    return {
        "name": _absolute(backbone.name),
        "precision": precision_of(backbone),
        "autocast": backbone.autocast is not None,
        "fingerprint": backbone.fingerprint,
        "logit_scale": backbone.logit_scale,
        "preprocessing": preprocessing_of(backbone),
    }


def load_bundle(
    folder: str | Path, *, device: str | torch.device = "cpu", backbone: Backbone | str | None = None
) -> Bundle:
    """Read a bundle and load its backbone.

    Args:
        folder: written by `save_bundle`; `bundle/` in a run's folder.
        device: where the backbone is loaded to.
        backbone: one that is loaded already, or the name or place of its weights, as `load_backbone` takes it.

    Raises:
        UserError: there is no whole bundle, its backbone is not on this machine, or the backbone has other weights or
            prepares images in another way.
    """
    folder = Path(folder)
    mark = _read_mark(folder)
    try:
        origin, classnames, primary, card = (mark[key] for key in ("backbone", "classes", "primary", "card"))
        name, precision, logit_scale = origin["name"], origin["precision"], float(origin["logit_scale"])
        autocast = bool(origin.get("autocast", False))  # which earlier bundles lack
        expected = origin["fingerprint"], dict(origin["preprocessing"])
        text, auxiliary, tokens = _read_heads(folder, mark)
        reads_frozen = bool(mark["reads_frozen"]) if tokens is not None else False
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"bundle {folder} is damaged: {MARK} does not hold what it should; make it again") from error
    if not isinstance(backbone, Backbone):
        backbone = load_backbone(backbone or name, precision=precision, autocast=autocast, device=device)
    _require_same(folder, name, *expected, backbone=backbone)
    if auxiliary is not None:
        auxiliary = auxiliary.to(backbone.device)
    text, tokens = text.to(backbone.device), tokens if tokens is None else tokens.to(backbone.device)
    return Bundle(backbone, classnames, text, logit_scale, auxiliary, primary, card, tokens, reads_frozen)


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
    return json.loads(to_json(found))


def _read_mark(folder: Path) -> dict[str, Any]:
    """The content of a bundle's JSON; a key that had another name in the previous version is renamed."""
    if not (folder / MARK).is_file():
        if (folder / "bundle" / MARK).is_file():
            raise UserError(f"{folder} is a run's folder; its bundle is {folder / 'bundle'}")
        if (folder / HEADS).is_file():
            raise UserError(f"bundle {folder} is unfinished: it has no {MARK}; run again what makes it")
        raise UserError(f"no bundle in {folder}; a finished run of train.py has one in its folder, called bundle")
    try:
        mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
        form = mark["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"bundle {folder} is damaged: {MARK} cannot be read; make it again") from error
    if form not in (FORMAT, VISUAL_FORMAT):
        raise UserError(f"bundle {folder} is of form {form}; this air_plugin reads forms {FORMAT} and {VISUAL_FORMAT}")
    if "headline" in mark:
        logger.warning("bundle %s has the former key 'headline', now 'primary'; later versions refuse it", folder)
        mark.setdefault("primary", mark.pop("headline"))
    return mark


def _read_heads(folder: Path, mark: Mapping[str, Any]) -> tuple[Tensor, AuxiliaryClassifier | None, Tensor | None]:
    """The text features of a bundle, its auxiliary classifier, and its learned tokens of the image tower."""
    try:
        data = (folder / HEADS).read_bytes()
    except OSError as error:
        raise UserError(f"bundle {folder} is damaged: cannot read {HEADS}: {error.strerror}; make it again") from error
    if digest(data) != mark["files"][HEADS]:
        raise UserError(f"bundle {folder} is damaged: {HEADS} is not what was saved; make it again")
    tensors, settings = load_safetensors(data), mark["auxiliary"]
    tokens = tensors["visual.tokens"] if mark["format"] == VISUAL_FORMAT else None
    if settings is None:
        return tensors["text"], None, tokens
    weight, bias = tensors["auxiliary.weight"], tensors["auxiliary.bias"]
    return tensors["text"], AuxiliaryClassifier(weight, bias, **settings), tokens


def _require_same(
    folder: Path, name: str, fingerprint: str, preprocessing: dict[str, Any], *, backbone: Backbone
) -> None:
    """Raise a UserError where a backbone is not the one that a bundle was made for."""
    if backbone.fingerprint != fingerprint:
        raise UserError(
            f"bundle {folder} was made by other weights, of {name} ({fingerprint[:12]}), than those of "
            f"{backbone.name} ({backbone.fingerprint[:12]})"
        )
    found = preprocessing_of(backbone)
    for key, value in preprocessing.items():
        if found.get(key) != value:
            raise UserError(
                f"bundle {folder} was made by {name} with images prepared in another way: {key} was "
                f"{value} and is {found.get(key)} in {backbone.name}"
            )


def _absolute(name: str) -> str:
    """A backbone's name, its file or folder by the whole path: a bundle may be used from anywhere."""
    architecture, colon, source = name.partition(":")
    if name not in BACKBONES and Path(name).is_dir():
        return str(Path(name).resolve())
    is_local = Path(source).is_file() or (name.startswith(PREFIX) and Path(source).is_dir())
    return f"{architecture}:{Path(source).resolve()}" if colon and is_local else name
