"""A bundle as one ONNX file: image tower and heads, checked against torch before it is written."""

from __future__ import annotations

import copy
import logging
import os
import uuid
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from air_plugin.clip.visual_prompts import PromptedTower
from air_plugin.inference.bundle import preprocessing_of
from air_plugin.inference.predict import Bundle, head_probs
from air_plugin.utils.errors import UserError
from air_plugin.utils.extras import require_extra
from air_plugin.utils.files import to_json

TOLERANCE = 1e-4  # of every output, between onnxruntime and torch
BATCHES = (1, 3)  # sizes that the file is tried with


class WholeClassifier(nn.Module):
    """(N, 3, H, W) prepared pixels to the (N, C) probabilities of every head and the (N, D) unit features, in float32.

    This is the module that is exported; its tower is a copy on the CPU. Learned tokens of the tower are in it.
    """

    tokens: Tensor | None

    def __init__(self, bundle: Bundle) -> None:
        super().__init__()
        model = bundle.backbone.model
        self.tower = copy.deepcopy(getattr(model, "image_tower", model.visual)).cpu().float().eval()
        self.prompted, self.reads_frozen = PromptedTower(self.tower), bundle.reads_frozen
        self.register_buffer("tokens", None if bundle.tokens is None else bundle.tokens.cpu().float())
        self.auxiliary = None if bundle.auxiliary is None else bundle.auxiliary.to("cpu")
        self.logit_scale = bundle.logit_scale
        self.register_buffer("text", bundle.text.cpu().float())

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        raw = self.tower(pixels) if self.tokens is None else self.prompted(pixels, self.tokens)
        features = nn.functional.normalize(raw, dim=1)
        frozen = nn.functional.normalize(self.tower(pixels), dim=1) if self.reads_frozen else None
        text = self.get_buffer("text")
        heads = head_probs(features, text, self.auxiliary, logit_scale=self.logit_scale, frozen=frozen)
        return *heads.values(), features


def export_onnx(bundle: Bundle, path: str | Path) -> None:
    """Write a bundle as an ONNX file that needs neither torch nor this package.

    Input `pixels`: (N, 3, H, W), any N, prepared as `preprocessing` in the metadata describes. Outputs `text` and,
    where there is one, `fused`: (N, C) probabilities; `features`: (N, D), unit rows. The metadata holds, as JSON,
    `classes`, `primary`, `preprocessing` and `backbone`. A half-precision backbone is exported in float32.

    Args:
        bundle: what to export.
        path: of the file; it is written whole or not at all.

    Raises:
        UserError: a package is missing, torch cannot export the tower, or onnxruntime's outputs differ from torch's by
            more than 1e-4.
    """
    require_extra("onnx", purpose="ONNX export")
    import onnx

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    model = WholeClassifier(bundle)
    names = [*bundle.heads, "features"]
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        _export(model, _pixels(bundle, 2), temporary, names=names)
        made = onnx.load(temporary)
        onnx.helper.set_model_props(made, {key: to_json(value) for key, value in _metadata(bundle).items()})
        onnx.save(made, temporary)
        for size in BATCHES:
            _check(model, _pixels(bundle, size), temporary, names=names)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _export(model: nn.Module, pixels: Tensor, path: Path, *, names: list[str]) -> None:
    """Write the file; any number of images may stand where the example's do."""
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it logs every step that it leaves out
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter's, about its own code
        try:
            torch.onnx.export(
                model,
                (pixels,),
                path,
                dynamo=True,
                external_data=False,
                verbose=False,
                input_names=["pixels"],
                output_names=names,
                dynamic_shapes={"pixels": {0: torch.export.Dim("N", min=1)}},
            )
        except torch.onnx.OnnxExporterError as error:
            first = " ".join(str(error.__cause__ or error).split())[:300]
            raise UserError(f"this image tower cannot be exported by torch {torch.__version__}: {first}") from error


@torch.no_grad()
def _check(model: nn.Module, pixels: Tensor, path: Path, *, names: list[str]) -> None:
    """Raise a UserError where onnxruntime's outputs of a file differ from torch's of the model."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    outputs = session.run(names, {"pixels": pixels.numpy()})
    for name, theirs, ours in zip(names, outputs, model(pixels), strict=True):
        difference = float((torch.from_numpy(theirs) - ours).abs().max())
        if not difference <= TOLERANCE:  # also where it is not a number
            raise UserError(
                f"the ONNX file was not written: its output {name} differs from torch's by "
                f"{difference:.1e} with {len(pixels)} images, allowed are {TOLERANCE:.0e}; another version "
                "of onnx or onnxruntime may do better"
            )


def _pixels(bundle: Bundle, count: int) -> Tensor:
    size = bundle.backbone.image_size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(count))


def _metadata(bundle: Bundle) -> dict[str, Any]:
    return {
        "classes": bundle.classnames,
        "primary": bundle.primary,
        "preprocessing": preprocessing_of(bundle.backbone),
        "backbone": {"name": bundle.backbone.name, "fingerprint": bundle.backbone.fingerprint},
    }
