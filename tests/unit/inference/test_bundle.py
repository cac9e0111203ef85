"""Bundles: what is saved, what comes back, what is refused, and predictions of image files."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_backbones import small_backbone, write_backbone
from small_models import make_backbone, write_pictures
from torch import Tensor
from torch.nn.functional import normalize

from air_plugin.auxiliary.classifier import AuxiliaryClassifier
from air_plugin.clip.backbone import Backbone
from air_plugin.clip.loading import load_backbone
from air_plugin.clip.prompts import PromptedCLIP, PromptEnsemble, PromptLearner
from air_plugin.clip.visual_prompts import PromptedTower
from air_plugin.estimator.classifier import AiRClassifier
from air_plugin.inference.bundle import HEADS, MARK, load_bundle, precision_of, preprocessing_of, save_bundle
from air_plugin.inference.predict import Bundle, head_probs
from air_plugin.utils.errors import UserError
from air_plugin.utils.images import load_rgb

NAMES = ["dog", "sea lion", "Stra\u00dfe"]


def unit(*shape: int, seed: int = 0) -> Tensor:
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def auxiliary(*, width: int = 24, scale: float | None = 9.0) -> AuxiliaryClassifier:
    made = AuxiliaryClassifier.from_prototypes(unit(3, 5, width, seed=1), scale=scale)
    return replace(made, bias=0.1 * unit(3, seed=2), fusion_weight=0.5, card={"seed": 4})


def write(folder: Path, backbone: Backbone, **changes) -> Path:
    given = {"text": unit(3, 24), "auxiliary": auxiliary(), "primary": "fused", "card": {"trainer": "AiR"}}
    save_bundle(folder, backbone=backbone, classnames=NAMES, **{**given, **changes})
    return folder


@pytest.fixture
def folder(tmp_path: Path, tiny_backbone: Backbone) -> Path:
    return write(tmp_path / "bundle", tiny_backbone)


def fault(folder: Path, **options) -> str:
    with pytest.raises(UserError) as caught:
        load_bundle(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Heads


def reference(features: Tensor, text: Tensor, head: AuxiliaryClassifier, scale: float) -> tuple[list, list]:
    """Text and fused probabilities, an image and a member of the ensemble at a time."""
    texts, fuseds = [], []
    for f in features.double():
        members = []
        for one in text.double():
            logits = [scale * float(f @ t) for t in one]
            exps = [math.exp(value - max(logits)) for value in logits]
            members.append([value / sum(exps) for value in exps])
        p = [sum(column) / len(members) for column in zip(*members, strict=True)]
        scores = [float(f @ w) + float(b) for w, b in zip(head.weight.double(), head.bias, strict=True)]
        hat = [max(a, 0.0) if head.scale is None else math.exp(head.scale * a) for a in scores]
        hat = hat if head.scale is None else [value / sum(hat) for value in hat]
        total = [a + head.fusion_weight * b for a, b in zip(p, hat, strict=True)]
        texts.append(p)
        fuseds.append([value / sum(total) for value in total])
    return texts, fuseds


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("scale", [9.0, None])
def test_heads_equal_loops(members: int, scale: float | None):
    features, text, head = unit(6, 24, seed=5), unit(members, 3, 24, seed=6), auxiliary(scale=scale)
    texts, fuseds = reference(features, text, head, 20.0)
    made = head_probs(features, text, head, logit_scale=20.0)
    assert torch.allclose(made["text"], torch.tensor(texts), atol=1e-6)
    assert torch.allclose(made["fused"], torch.tensor(fuseds), atol=1e-6)
    assert head_probs(features, text, None, logit_scale=20.0).keys() == {"text"}


@pytest.mark.parametrize("members", [1, 3])
def test_the_text_head_is_what_the_prompts_say(tmp_path: Path, tiny_backbone: Backbone, members: int):
    learners = [
        PromptLearner(tiny_backbone, NAMES, n_ctx=4, generator=torch.Generator().manual_seed(number))
        for number in range(members)
    ]
    model = PromptedCLIP(tiny_backbone, PromptEnsemble(learners) if members > 1 else learners[0])
    with torch.no_grad():
        text, expected = model.text_features(), model(unit(5, 24)).softmax(dim=1)
    write(tmp_path / "b", tiny_backbone, text=text, auxiliary=None, primary="text")
    bundle = load_bundle(tmp_path / "b", backbone=tiny_backbone)
    assert torch.allclose(bundle.classify(unit(5, 24))["text"], expected, atol=1e-6)


# Saving and loading


def test_what_is_saved_comes_back(folder: Path, tiny_backbone: Backbone):
    bundle = load_bundle(folder, backbone=tiny_backbone)
    assert (bundle.classnames, bundle.primary, bundle.heads) == (NAMES, "fused", ["text", "fused"])
    assert bundle.card == {"trainer": "AiR"} and bundle.logit_scale == tiny_backbone.logit_scale
    assert torch.equal(bundle.text, unit(1, 3, 24)) and bundle.auxiliary is not None
    head = auxiliary()
    assert torch.equal(bundle.auxiliary.weight, head.weight) and torch.equal(bundle.auxiliary.bias, head.bias)
    assert (bundle.auxiliary.scale, bundle.auxiliary.fusion_weight) == (9.0, 0.5)
    assert bundle.auxiliary.card == {"seed": 4}
    assert {path.name for path in folder.iterdir()} == {HEADS, MARK}


def test_a_bundle_without_an_auxiliary_classifier_has_one_head(tmp_path: Path, tiny_backbone: Backbone):
    write(tmp_path / "b", tiny_backbone, auxiliary=None, primary="text")
    bundle = load_bundle(tmp_path / "b", backbone=tiny_backbone)
    assert bundle.heads == ["text"] and bundle.classify(unit(2, 24)).keys() == {"text"}
    with pytest.raises(UserError, match="no fused head; it has: text"):
        bundle.predict(tmp_path, head="fused")


# Learned tokens in the image tower


@pytest.mark.parametrize("reads_frozen", [False, True])
def test_learned_tokens_come_back_and_are_used(tmp_path: Path, tiny_backbone: Backbone, reads_frozen: bool):
    """The text head reads features of the prompted tower, the auxiliary classifier these or the frozen tower's."""
    tokens = torch.randn(5, 32, generator=torch.Generator().manual_seed(3))
    write(tmp_path / "b", tiny_backbone, tokens=tokens, reads_frozen=reads_frozen)
    bundle = load_bundle(tmp_path / "b", backbone=tiny_backbone)
    assert torch.equal(bundle.tokens, tokens) and bundle.reads_frozen == reads_frozen
    paths = write_pictures(tmp_path / "pictures", 4)
    pixels = torch.stack([tiny_backbone.preprocess(load_rgb(path)) for path in paths])
    prompted = PromptedTower(tiny_backbone.model.visual).encode(pixels, tokens)
    frozen = tiny_backbone.encode_images(pixels)
    assert float((prompted - frozen).abs().max()) > 0.01
    scale, head = tiny_backbone.logit_scale, auxiliary()
    text = (scale * prompted @ unit(3, 24).T).softmax(dim=1)
    fused = text + 0.5 * head.probs(frozen if reads_frozen else prompted)
    made = bundle.classify(*bundle.encode(pixels))
    assert torch.allclose(made["text"], text, atol=1e-5)
    assert torch.allclose(made["fused"], fused / fused.sum(dim=1, keepdim=True), atol=1e-5)
    labels = [NAMES[label] for label in made["fused"].argmax(dim=1).tolist()]
    assert [prediction.label for prediction in bundle.predict(paths)] == labels
    if reads_frozen:
        with pytest.raises(ValueError, match=r"see Bundle.encode"):
            bundle.classify(prompted)


def test_only_bundles_with_learned_tokens_have_the_new_form(tmp_path: Path, tiny_backbone: Backbone, folder: Path):
    """An earlier air_plugin reads what it can use, and refuses what it would use without the tokens."""
    write(tmp_path / "visual", tiny_backbone, tokens=torch.zeros(2, 32))
    forms = [json.loads((place / MARK).read_text())["format"] for place in (folder, tmp_path / "visual")]
    assert forms == [1, 2]
    assert "reads_frozen" not in json.loads((folder / MARK).read_text())
    bundle = load_bundle(folder, backbone=tiny_backbone)
    assert bundle.tokens is None and bundle.encode(torch.zeros(1, 3, 16, 16))[1] is None


def test_uses_that_read_features_without_tokens_are_refused(tmp_path: Path, tiny_backbone: Backbone, folder: Path):
    write(tmp_path / "visual", tiny_backbone, tokens=torch.zeros(2, 32))
    with pytest.raises(UserError, match="AiRClassifier does not use; use air predict"):
        AiRClassifier.load(tmp_path / "visual", backbone=tiny_backbone, device="cpu")
    assert AiRClassifier.load(folder, backbone=tiny_backbone, device="cpu").bundle_.tokens is None


def test_the_json_says_what_the_tensors_are(folder: Path, tiny_backbone: Backbone):
    said = json.loads((folder / MARK).read_text(encoding="utf-8"))
    assert said["classes"] == NAMES and "Stra\u00dfe" in (folder / MARK).read_text(encoding="utf-8")
    assert said["backbone"]["fingerprint"] == tiny_backbone.fingerprint
    assert said["backbone"]["preprocessing"]["interpolation"] == "bicubic"


@pytest.mark.public_reports
def test_a_path_that_is_no_text_comes_back(tmp_path: Path, tiny_backbone: Backbone):
    """17: a lone surrogate, as Python reads a path's bytes, costs no bundle after training."""
    card = {"trainer": "UPL", "dataset": "gr\udcfcn \u00fc"}
    write(tmp_path / "bundle", tiny_backbone, card=card)
    found = load_bundle(tmp_path / "bundle", backbone=tiny_backbone)
    assert found.card["dataset"] == "gr\udcfcn \u00fc"


@pytest.mark.parametrize(
    "changes",
    [
        {"text": unit(4, 24)},
        {"text": unit(2, 4, 24)},
        {"auxiliary": auxiliary(width=23)},
        {"primary": "best"},
        {"auxiliary": None},
    ],
)
def test_heads_that_do_not_fit_are_not_saved(tmp_path: Path, tiny_backbone: Backbone, changes: dict):
    with pytest.raises(ValueError, match="head"):
        write(tmp_path / "b", tiny_backbone, **changes)
    assert not (tmp_path / "b").exists()


def test_a_kill_between_the_files_leaves_no_bundle(
    folder: Path, tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
):
    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("air_plugin.inference.bundle.write_atomically", killed)
    with pytest.raises(KeyboardInterrupt):
        write(folder, tiny_backbone, text=unit(3, 24, seed=9))
    assert "is unfinished" in fault(folder, backbone=tiny_backbone)


def test_a_bundle_of_the_previous_version_is_read_with_a_warning(
    folder: Path, tiny_backbone: Backbone, caplog: pytest.LogCaptureFixture
):
    mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
    (folder / MARK).write_text(json.dumps({**mark, "headline": mark.pop("primary")}), encoding="utf-8")
    assert load_bundle(folder, backbone=tiny_backbone).primary == "fused"
    (record,) = caplog.records
    assert record.levelname == "WARNING" and f"bundle {folder} has the former key 'headline'" in record.getMessage()


def test_what_is_no_bundle_is_told(tmp_path: Path, folder: Path, tiny_backbone: Backbone):
    assert f"no bundle in {tmp_path / 'nowhere'}" in fault(tmp_path / "nowhere")
    assert f"its bundle is {folder}" in fault(tmp_path)
    (tmp_path / "empty").mkdir()
    assert "no bundle in" in fault(tmp_path / "empty")


DAMAGE = {
    "cut heads": (HEADS, lambda data: data[:-3], "is not what was saved"),
    "no heads": (HEADS, None, "cannot read heads.safetensors"),
    "no JSON": (MARK, lambda data: data[:-3], "cannot be read"),
    "a list": (MARK, lambda data: b"[]", "cannot be read"),
    "another form": (MARK, lambda data: data.replace(b'"format": 1', b'"format": 7'), "is of form 7"),
    "a lost key": (MARK, lambda data: data.replace(b'"primary"', b'"primery"'), "does not hold what it should"),
    "a lost value": (MARK, lambda data: data.replace(b'"fusion_weight"', b'"fusion"'), "does not hold what it should"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_bundle_is_refused(folder: Path, tiny_backbone: Backbone, kind: str):
    name, change, said = DAMAGE[kind]
    if change is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(change((folder / name).read_bytes()))
    told = fault(folder, backbone=tiny_backbone)
    assert said in told and str(folder) in told


def test_another_backbone_is_refused_by_name(folder: Path):
    other = replace(make_backbone(seed=1), name="another")
    told = fault(folder, backbone=other)
    assert "made by other weights, of tiny" in told and f"another ({other.fingerprint[:12]})" in told


def test_another_preparation_of_images_is_refused(folder: Path, tiny_backbone: Backbone):
    import open_clip

    changed = open_clip.image_transform(16, is_train=False, interpolation="bilinear")
    told = fault(folder, backbone=replace(tiny_backbone, preprocess=changed))
    assert "interpolation was bicubic and is bilinear" in told


def test_a_backbone_that_is_not_there_says_so(tmp_path: Path):
    where = write_backbone(tmp_path / "weights", "vit")
    write(tmp_path / "b", load_backbone(str(where)))
    where.rename(tmp_path / "moved")
    assert f"backbone '{where}'" in fault(tmp_path / "b")
    assert load_bundle(tmp_path / "b", backbone=str(tmp_path / "moved")).classnames == NAMES


def test_a_relative_path_of_a_backbone_becomes_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_backbone(tmp_path / "weights", "vit")
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "b", load_backbone("weights"))
    shutil.copytree(tmp_path / "b", tmp_path / "elsewhere" / "b")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_bundle("b").backbone.name == str(tmp_path / "weights")


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_backbone_is_loaded_in_its_own_precision(tmp_path: Path, precision: str):
    backbone = load_backbone("mini", precision=precision)
    assert precision_of(backbone) == precision
    write(tmp_path / "b", backbone, text=unit(3, 128), auxiliary=None, primary="text")
    assert precision_of(load_bundle(tmp_path / "b").backbone) == precision
    assert precision_of(small_backbone("vit", precision)) == precision


def test_a_bundle_computes_features_as_its_run_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In half precision or not; bundles from before that could be chosen have features in fp32."""
    asked: list[bool] = []

    def load(name: str, *, autocast: bool, **options: Any) -> Backbone:
        asked.append(autocast)
        return load_backbone(name, **options)

    monkeypatch.setattr("air_plugin.inference.bundle.load_backbone", load)
    plain = load_backbone("mini")
    for folder, kind in (("plain", None), ("half", torch.float16)):
        backbone = replace(plain, autocast=kind)
        write(tmp_path / folder, backbone, text=unit(3, 128), auxiliary=None, primary="text")
        load_bundle(tmp_path / folder)
    mark = json.loads((tmp_path / "half" / MARK).read_text())
    del mark["backbone"]["autocast"]
    (tmp_path / "half" / MARK).write_text(json.dumps(mark))
    load_bundle(tmp_path / "half")
    assert asked == [False, True, False]


def test_preparation_is_told_for_every_family():
    assert preprocessing_of(small_backbone("siglip")) == {
        "resize": "Resize",
        "size": [32, 32],
        "interpolation": "bicubic",
        "crop": None,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
    }
    made = preprocessing_of(load_backbone("mini"))
    assert (made["size"], made["crop"]) == (32, [32, 32]) and made["mean"][0] == pytest.approx(0.48145466)


# Predictions


@pytest.fixture
def bundle(folder: Path, tiny_backbone: Backbone) -> Bundle:
    return load_bundle(folder, backbone=tiny_backbone)


def expected(bundle: Bundle, path: str | Path, head: str) -> Tensor:
    """One image by itself: (C,) probabilities."""
    pixels = bundle.backbone.preprocess(load_rgb(path))
    return bundle.classify(bundle.backbone.encode_images(pixels[None]))[head][0]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("head", ["text", "fused", None])
def test_predictions_equal_one_image_at_a_time(bundle: Bundle, pictures: list[str], batch_size: int, head: str | None):
    made = list(bundle.predict(pictures, top=3, batch_size=batch_size, head=head))
    assert [str(one.path) for one in made] == pictures and bundle.skipped == {}
    for one in made:
        probs = expected(bundle, one.path, head or "fused")
        order = sorted(range(3), key=lambda c: -float(probs[c]))
        assert [label for label, _ in one.top] == [NAMES[c] for c in order]
        assert [value for _, value in one.top] == pytest.approx([float(probs[c]) for c in order], abs=1e-5)
        assert (one.label, one.probability) == one.top[0]
    assert len({one.probability for one in made}) == len(pictures)  # they tell the pictures apart


def test_images_of_every_mode_and_place_are_found_and_hidden_ones_are_not(bundle: Bundle, tmp_path: Path):
    root = tmp_path / "in"
    (root / "a b" / "\u00fc").mkdir(parents=True)
    (root / ".thumbs").mkdir()
    colours = np.random.default_rng(0).integers(0, 255, (20, 18, 4), dtype=np.uint8)
    for name, mode in (("1.png", "RGBA"), ("a b/2.JPG", "L"), ("a b/\u00fc/3.tif", "RGB"), ("4.gif.webp", "RGB")):
        Image.fromarray(colours).convert(mode).save(root / name)
    for name in (".thumbs/5.png", "._6.png"):
        Image.fromarray(colours).save(root / name)
    made = [one.path.relative_to(root).as_posix() for one in bundle.predict(root)]
    assert sorted(made) == sorted(["1.png", "a b/2.JPG", "a b/\u00fc/3.tif", "4.gif.webp"])
    assert [one.path for one in bundle.predict(root / "1.png")] == [root / "1.png"]


def test_unreadable_files_are_warned_of_once_skipped_and_named(
    bundle: Bundle, pictures: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    broken = tmp_path / "broken.png"
    broken.write_bytes(Path(pictures[0]).read_bytes()[:60])
    paths = [pictures[0], broken, pictures[1], tmp_path / "missing.png", *pictures[2:]]
    made = list(bundle.predict(paths, batch_size=2))
    assert [str(one.path) for one in made] == pictures
    assert list(bundle.skipped) == [broken, tmp_path / "missing.png"]
    first, second = caplog.records
    assert first.levelname == second.levelname == "WARNING"
    assert str(broken) in first.getMessage() and "missing.png" in second.getMessage()
    assert list(bundle.predict(pictures)) and bundle.skipped == {}  # of the last call


def test_neighbours_of_unreadable_files_keep_their_predictions(bundle: Bundle, pictures: list[str], tmp_path: Path):
    (tmp_path / "broken.png").write_bytes(b"")
    alone = {one.path: one.probability for one in bundle.predict(pictures)}
    mixed = {one.path: one.probability for one in bundle.predict([tmp_path / "broken.png", *pictures], batch_size=3)}
    assert mixed == pytest.approx(alone, abs=1e-6)


def test_where_nothing_can_be_read_there_is_an_error(bundle: Bundle, tmp_path: Path):
    root = tmp_path / "in"
    root.mkdir()
    for number in range(2):
        (root / f"{number}.png").write_bytes(b"")
    with pytest.raises(UserError, match="none of the 2 images could be read"):
        list(bundle.predict(root))
    with pytest.raises(UserError, match=r"cannot read image .*0\.png"):
        list(bundle.predict(root / "0.png"))


def test_a_wrong_call_fails_at_once(bundle: Bundle, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "hidden").mkdir()
    write_pictures(tmp_path / "hidden" / ".x", 1)
    for images, options, said in (
        (tmp_path / "nowhere", {}, "no image or folder"),
        (tmp_path / "empty", {}, "no images below"),
        (tmp_path / "hidden", {}, "no images below"),
        ([], {}, "there are no images"),
        (tmp_path, {"top": 0}, "top is 0"),
        (tmp_path, {"batch_size": 0}, "batch_size is 0"),
        (tmp_path, {"head": "best"}, "no best head"),
    ):
        with pytest.raises(UserError, match=said):
            bundle.predict(images, **options)


def test_predictions_come_while_they_are_made(bundle: Bundle, pictures: list[str], monkeypatch: pytest.MonkeyPatch):
    seen: list[int] = []
    encode = bundle.backbone.encode_images
    monkeypatch.setattr(type(bundle.backbone), "encode_images", lambda _, pixels: seen.append(1) or encode(pixels))
    found = bundle.predict(pictures, batch_size=2)
    assert seen == []
    next(found)
    assert len(seen) == 1
    assert len(list(found)) == 6 and len(seen) == 4


def test_more_classes_than_there_are_is_all_of_them(bundle: Bundle, pictures: list[str]):
    (one,) = bundle.predict(pictures[0], top=9)
    assert {label for label, _ in one.top} == set(NAMES) and sum(p for _, p in one.top) == pytest.approx(1)


@pytest.mark.public_reports
def test_the_length_of_features_does_not_matter(bundle: Bundle, tiny_backbone: Backbone, tmp_path: Path):
    """Item 10 of the public reports: features and prompts of other lengths, in every head."""
    features = unit(5, 24, seed=8)
    expected = bundle.classify(features)
    for head, probs in bundle.classify(features * torch.tensor([0.2, 1, 3, 9, 40])[:, None]).items():
        assert torch.allclose(probs, expected[head], atol=1e-5)
    names, head = bundle.classnames, bundle.auxiliary
    save_bundle(
        tmp_path / "long",
        backbone=tiny_backbone,
        classnames=names,
        text=7 * bundle.text,
        auxiliary=head,
        primary="text",
        card={},
    )
    found = load_bundle(tmp_path / "long", backbone=tiny_backbone).classify(features)["text"]
    assert torch.allclose(found, expected["text"], atol=1e-5)
