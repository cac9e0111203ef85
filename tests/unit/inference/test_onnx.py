"""ONNX files against the bundle that they were made of."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hf_folders import write_folder
from small_backbones import small_backbone
from torch import Tensor
from torch.nn.functional import normalize

from air_plugin.auxiliary.classifier import AuxiliaryClassifier
from air_plugin.clip.backbone import Backbone
from air_plugin.clip.loading import load_backbone
from air_plugin.inference import onnx as export
from air_plugin.inference.bundle import precision_of, preprocessing_of
from air_plugin.inference.predict import Bundle
from air_plugin.utils.errors import UserError

NAMES = ["dog", "sea lion", "Stra\u00dfe"]


def unit(*shape: int, seed: int = 0) -> Tensor:
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def pixels(backbone: Backbone, count: int) -> Tensor:
    side = backbone.image_size
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(100 + count))


def make_bundle(backbone: Backbone, *, members: int = 2, fused: bool = True) -> Bundle:
    width = backbone.encode_images(pixels(backbone, 1)).shape[1]
    head = AuxiliaryClassifier.from_prototypes(unit(3, 5, width, seed=1), scale=9.0)
    head = replace(head, bias=0.1 * unit(3, seed=2), fusion_weight=0.5)
    texts = unit(members, 3, backbone.encode_texts(["dog"]).shape[1])
    return Bundle(backbone, NAMES, texts, 20.0, head if fused else None, "text", {})


def outputs(path: Path, images: Tensor) -> dict[str, Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, session.run(None, {"pixels": images.numpy()})), strict=True))


def of_transformers(kind: str) -> Backbone:
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder) / kind, kind)
        return load_backbone(f"hf:{Path(folder) / kind}")


BACKBONES = {
    "mini": lambda: load_backbone("mini"),
    "vit": lambda: small_backbone("vit"),
    "siglip": lambda: small_backbone("siglip"),
    "hf:clip": lambda: of_transformers("clip"),
    "hf:siglip": lambda: of_transformers("siglip"),
    "hf:siglip2_naflex": lambda: of_transformers("siglip2_naflex"),
    "hf:blip2": lambda: of_transformers("blip2"),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_an_onnx_file_says_what_the_bundle_says(tmp_path: Path, name: str):
    backbone = BACKBONES[name]()
    bundle = make_bundle(backbone)
    export.export_onnx(bundle, tmp_path / "new" / "x.onnx")
    for count in (1, 2, 7):
        features = backbone.encode_images(pixels(backbone, count))
        made = outputs(tmp_path / "new" / "x.onnx", pixels(backbone, count))
        assert list(made) == ["text", "fused", "features"]
        for head, probs in bundle.classify(features).items():
            assert torch.allclose(made[head], probs, atol=1e-5), head
        assert torch.allclose(made["features"], features, atol=1e-5)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.onnx"]


def test_half_precision_is_exported_in_full_and_metadata_tell_how_to_use_it(tmp_path: Path):
    import onnxruntime

    backbone = small_backbone("vit", "fp16")
    bundle = make_bundle(backbone, members=1, fused=False)
    export.export_onnx(bundle, tmp_path / "x.onnx")
    made = outputs(tmp_path / "x.onnx", pixels(backbone, 3))
    assert list(made) == ["text", "features"] and made["text"].dtype == torch.float32
    features = backbone.encode_images(pixels(backbone, 3))
    assert torch.allclose(made["features"], features, atol=1e-2) and not torch.equal(made["features"], features)
    assert precision_of(backbone) == "fp16"  # the bundle's own tower stays as it was
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx", providers=["CPUExecutionProvider"])
    said = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    assert said == {
        "classes": NAMES,
        "primary": "text",
        "preprocessing": preprocessing_of(backbone),
        "backbone": {"name": backbone.name, "fingerprint": backbone.fingerprint},
    }


def test_a_file_that_differs_from_torch_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The exporter is given a model with other heads than the one that its file is compared with."""
    bundle = make_bundle(small_backbone("siglip"), members=1)
    right = export._export

    def wrong(model: export.WholeClassifier, *args, **options) -> None:
        right(export.WholeClassifier(replace(bundle, text=bundle.text.flip(1))), *args, **options)

    monkeypatch.setattr(export, "_export", wrong)
    (tmp_path / "x.onnx").write_bytes(b"former")
    with pytest.raises(UserError, match="output text differs from torch's") as caught:
        export.export_onnx(bundle, tmp_path / "x.onnx")
    assert "\n" not in str(caught.value)
    assert (tmp_path / "x.onnx").read_bytes() == b"former" and len(list(tmp_path.iterdir())) == 1


def test_a_tower_that_cannot_be_exported_is_one_line(tmp_path: Path):
    class Odd(torch.nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1)[:, :24] if images.sum() > 0 else images.flatten(1)[:, 24:48]

    bundle = make_bundle(small_backbone("vit"), members=1)
    odd = replace(bundle, backbone=replace(bundle.backbone, model=torch.nn.Module()))
    odd.backbone.model.visual = Odd()
    with pytest.raises(UserError, match="cannot be exported") as caught:
        export.export_onnx(odd, tmp_path / "x.onnx")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_without_the_extra_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"pip install onnxscript  .*onnx"):
        export.export_onnx(make_bundle(small_backbone("siglip")), tmp_path / "x.onnx")


def test_importing_the_module_imports_no_onnx():
    late = ("onnx", "onnxruntime", "open_clip")
    code = f"import sys, air_plugin.inference.onnx; print([n for n in {late} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.parametrize("reads_frozen", [False, True])
def test_learned_tokens_are_in_the_onnx_file(tmp_path: Path, reads_frozen: bool):
    backbone = small_backbone("vit")
    tokens = torch.randn(5, 32, generator=torch.Generator().manual_seed(3))
    bundle = replace(make_bundle(backbone, members=1), tokens=tokens, reads_frozen=reads_frozen)
    export.export_onnx(bundle, tmp_path / "x.onnx")
    features, frozen = bundle.encode(pixels(backbone, 7))
    made = outputs(tmp_path / "x.onnx", pixels(backbone, 7))
    assert list(made) == ["text", "fused", "features"] and (frozen is not None) == reads_frozen
    assert torch.allclose(made["features"], features, atol=1e-5)
    for head, probs in bundle.classify(features, frozen).items():
        assert torch.allclose(made[head], probs, atol=1e-5), head
    assert not torch.allclose(features, backbone.encode_images(pixels(backbone, 7)), atol=1e-2)
