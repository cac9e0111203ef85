"""Backbones: what they encode, and what they refuse."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from small_backbones import (
    FAMILIES,
    SIDE,
    clip_of_transformers,
    make_model,
    model_config,
    siglip_of_transformers,
    small_backbone,
    write_backbone,
)
from small_models import make_backbone, make_clip

from air_plugin.cli import main
from air_plugin.clip import openai_archive
from air_plugin.clip.backbone import Backbone
from air_plugin.clip.loading import _resolve, _without_repetition, load_backbone
from air_plugin.utils.errors import UserError
from air_plugin.utils.offline import is_offline

ROOT = Path(__file__).resolve().parents[3]

TEXTS = ["a photo of a dog.", "cat"]


def write_folder(folder: Path) -> Path:
    """A small model as open_clip saves it."""
    config = {
        "embed_dim": 24,
        "quick_gelu": True,
        "vision_cfg": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    preprocess = {"size": 16, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    save_file(make_clip().state_dict(), folder / "open_clip_model.safetensors")
    return folder


def pixels() -> torch.Tensor:
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_features_are_unit_and_the_models_own(tiny_backbone: Backbone):
    images, texts = tiny_backbone.encode_images(pixels()), tiny_backbone.encode_texts(TEXTS)
    model = tiny_backbone.model
    assert torch.allclose(images, model.encode_image(pixels(), normalize=True), atol=1e-6)
    assert torch.allclose(texts, model.encode_text(tiny_backbone.tokenizer(TEXTS), normalize=True), atol=1e-6)
    assert torch.allclose(images.norm(dim=1), torch.ones(3)) and torch.allclose(texts.norm(dim=1), torch.ones(2))


def test_zero_shot_probabilities_are_clips(tiny_backbone: Backbone):
    images, texts = tiny_backbone.encode_images(pixels()), tiny_backbone.encode_texts(TEXTS)
    logits, _ = tiny_backbone.model.get_logits(pixels(), tiny_backbone.tokenizer(TEXTS))
    assert torch.allclose(tiny_backbone.text_probs(images, texts), logits.softmax(dim=1), atol=1e-5)


@pytest.mark.public_reports
def test_the_length_of_features_does_not_matter(tiny_backbone: Backbone):
    """Item 10 of the public reports."""
    images, texts = tiny_backbone.encode_images(pixels()), tiny_backbone.encode_texts(TEXTS)
    expected = tiny_backbone.text_probs(images, texts)
    assert torch.allclose(tiny_backbone.text_probs(5 * images, 0.1 * texts), expected, atol=1e-5)


def test_text_is_never_cut_in_silence(tiny_backbone: Backbone):
    longest = " ".join(["dog"] * 75)  # with start and end 77
    assert tiny_backbone.tokenize([longest])[0].argmax() == 76
    for count in (76, 151, 152, 153, 400):
        with pytest.raises(UserError, match="longer than the 77 tokens of tiny"):
            tiny_backbone.tokenize(["cat", " ".join(["dog"] * count)])


def test_fingerprint_tells_weights_apart_and_not_names():
    one, other = make_backbone(), make_backbone(seed=1)
    same = dataclasses.replace(make_backbone(), name="another name")
    assert one.fingerprint == same.fingerprint != other.fingerprint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("models") / "tiny")


def test_a_local_folder_loads_frozen(folder: Path, tiny_backbone: Backbone):
    backbone = load_backbone(str(folder))
    assert backbone.image_size == 16 and backbone.context_length == 77
    assert not backbone.model.training and not any(p.requires_grad for p in backbone.model.parameters())
    assert torch.allclose(backbone.encode_texts(TEXTS), tiny_backbone.encode_texts(TEXTS), atol=1e-6)
    picture = Image.new("RGB", (20, 16), "red")
    assert torch.allclose(backbone.preprocess(picture)[:, 0, 0], torch.tensor([1.0, -1.0, -1.0]))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_gives_nearly_the_same_features(folder: Path, tiny_backbone: Backbone, precision: str):
    backbone = load_backbone(str(folder), precision=precision)
    for ours, exact in (
        (backbone.encode_texts(TEXTS), tiny_backbone.encode_texts(TEXTS)),
        (backbone.encode_images(pixels()), tiny_backbone.encode_images(pixels())),
    ):
        assert ours.dtype == torch.float32
        assert torch.allclose(ours, exact, atol=0.03) and not torch.equal(ours, exact)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("RN-50", "did you mean"),
        ("vit_b_32", "did you mean"),
        ("nothing of the kind", "unknown backbone"),
        ("ViT-B-32", "openai"),
        ("ViT-B-32:no_such_tag", "openai"),
        ("ViT-B-32:weights.safetensors", "missing"),
        ("some/folder", "no folder"),
        ("weights.pt", "no folder"),
    ],
)
def test_bad_names_are_errors_for_people(name: str, message: str):
    with pytest.raises(UserError, match=message) as raised:
        load_backbone(name)
    assert "\n" not in str(raised.value)


def test_weights_of_another_architecture_are_an_error(folder: Path):
    with pytest.raises(UserError, match="cannot be loaded"):
        load_backbone(f"ViT-B-32:{folder / 'open_clip_model.safetensors'}")


def test_unknown_precision_is_an_error():
    with pytest.raises(UserError, match="fp15"):
        load_backbone("mini", precision="fp15")


def test_a_folder_that_lacks_a_file_is_an_error_that_names_it(tmp_path: Path):
    for family, file in (
        ("vit", "open_clip_model.safetensors"),
        ("siglip", "tokenizer_config.json"),
        ("vit", "open_clip_config.json"),
    ):
        folder = write_backbone(tmp_path / f"{family}-{file}", family)
        (folder / file).unlink()
        with pytest.raises(UserError, match=f"{file} is missing"):
            load_backbone(str(folder))
    (folder / "open_clip_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"open_clip_config\.json is not"):
        load_backbone(str(folder))


# Every family, against the original architecture's own forward


def pixels_of(family: str) -> torch.Tensor:
    return torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(len(family)))


@pytest.mark.parametrize("family", FAMILIES)
def test_features_of_every_family_are_the_models_own(family: str):
    backbone, pixels = small_backbone(family), pixels_of(family)
    images, texts = backbone.encode_images(pixels), backbone.encode_texts(TEXTS)
    assert torch.allclose(images, backbone.model.encode_image(pixels, normalize=True), atol=1e-6)
    tokens = backbone.tokenizer(TEXTS)
    assert torch.allclose(texts, backbone.model.encode_text(tokens, normalize=True), atol=1e-6)
    assert (images[0] - images[1]).abs().max() > 1e-3 and (texts[0] - texts[1]).abs().max() > 1e-3
    if family == "resnet":
        return  # transformers has none; tests/slow compares it with timm's
    if "siglip" in family:
        act = "gelu_pytorch_tanh" if family == "siglip2" else "gelu"
        other = siglip_of_transformers(backbone.model, text_act=act)
    else:
        other = clip_of_transformers(backbone.model)
    theirs = other(pixel_values=pixels, input_ids=tokens)
    assert torch.allclose(images, theirs.image_embeds, atol=1e-5)
    assert torch.allclose(texts, theirs.text_embeds, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_probabilities_are_the_softmax_of_the_models_logits(family: str):
    """SigLIP's bias is the same for all classes, so the softmax does without it."""
    backbone, pixels = small_backbone(family), pixels_of(family)
    probs = backbone.text_probs(backbone.encode_images(pixels), backbone.encode_texts(TEXTS))
    logits, _ = backbone.model.get_logits(pixels, backbone.tokenizer(TEXTS))
    assert (backbone.model.logit_bias is not None) == ("siglip" in family)
    assert torch.allclose(probs, logits.softmax(dim=1), atol=1e-5)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_of_every_family_is_near(family: str, precision: str):
    exact, half, pixels = small_backbone(family), small_backbone(family, precision), pixels_of(family)
    for theirs, ours in (
        (exact.encode_images(pixels), half.encode_images(pixels)),
        (exact.encode_texts(TEXTS), half.encode_texts(TEXTS)),
    ):
        assert ours.dtype == torch.float32 and not torch.equal(ours, theirs)
        assert torch.allclose(ours, theirs, atol=0.03 if precision == "bf16" else 0.005)


def test_text_of_siglips_full_length_fits_and_a_longer_one_is_refused():
    backbone = small_backbone("siglip")
    assert backbone.ends(backbone.tokenize([" ".join(["dog"] * 23)])).tolist() == [23]
    for count in (24, 25, 48, 100):  # with 24 the cut one differs from padding nowhere: end and padding are one token
        with pytest.raises(UserError, match="longer than the 24 tokens"):
            backbone.tokenize(["cat", " ".join(["dog"] * count)])


def test_ends_of_a_tokenizer_without_an_end():
    def backbone(**known: int) -> Backbone:
        hub = SimpleNamespace(tokenizer=SimpleNamespace(**known))
        return Backbone("none", None, None, hub, 0, 5)  # type: ignore[arg-type]

    tokens = torch.tensor([[9, 3, 4, 0, 0], [9, 3, 0, 0, 0], [9, 3, 4, 5, 6]])
    assert backbone(pad_token_id=0).ends(tokens).tolist() == [3, 2, 5]
    assert backbone(pad_token_id=0, eos_token_id=4).ends(tokens).tolist() == [2, 5, 2]
    assert backbone().ends(tokens).tolist() == [0, 0, 0]


def test_siglips_images_are_squashed_to_a_square():
    picture = np.zeros((64, 128, 3), dtype=np.uint8)
    picture[:, :32] = 255  # cutting the middle out would lose it
    prepared = {family: small_backbone(family).preprocess(Image.fromarray(picture)) for family in ("siglip", "vit")}
    assert prepared["siglip"].shape == (3, SIDE, SIDE)
    assert torch.allclose(prepared["siglip"][:, :, 0], torch.ones(1)) and prepared["siglip"].min() == -1
    assert prepared["vit"].max() < 0


# Local files


@pytest.fixture(scope="module")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small architecture that open_clip knows by name."""
    import open_clip

    path = tmp_path_factory.mktemp("architectures") / "small-of-the-tests.json"
    path.write_text(json.dumps({**model_config("openclip"), "quick_gelu": False}))
    open_clip.add_model_config(path)
    return path.stem


@pytest.mark.parametrize("shape", ["plain", "state_dict", "module"])
def test_a_remote_sensing_checkpoint_loads_and_converts(
    architecture: str, shape: str, tmp_path: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
):
    """RemoteCLIP's and GeoRSCLIP's are state dicts in .pt files; training scripts save them inside of more."""
    weights = make_model("openclip", seed=3).state_dict()
    saved = {
        "plain": weights,
        "state_dict": {"epoch": 3, "state_dict": weights},
        "module": {"state_dict": {f"module.{name}": value for name, value in weights.items()}},
    }[shape]
    torch.save(saved, tmp_path / "satellites.pt")
    name = f"{architecture}:{tmp_path}/satellites.pt"
    backbone = load_backbone(name)
    assert torch.allclose(backbone.encode_texts(TEXTS), _texts_of(make_model("openclip", seed=3)), atol=1e-6)
    (record,) = caplog.records
    assert record.levelname == "WARNING" and f'air convert "{name}"' in record.getMessage()
    assert main(["convert", name]) == 0
    converted = load_backbone(f"{architecture}:{tmp_path}/satellites.safetensors")
    assert converted.fingerprint == backbone.fingerprint
    assert main(["convert", name]) == 2  # never written over
    assert "satellites.safetensors is there already" in capsys.readouterr().err
    assert main(["convert", f"{architecture}:{tmp_path}/satellites.safetensors"]) == 2


def _texts_of(model: torch.nn.Module) -> torch.Tensor:
    import open_clip

    return model.encode_text(open_clip.SimpleTokenizer()(TEXTS), normalize=True)


class Evil:
    def __reduce__(self):
        return Path.touch, (Path(os.environ["EVIL"]),)


@pytest.mark.public_reports
@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:.*TorchScript")
def test_openais_own_archive_is_read_where_it_is_the_published_one(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Number 31: `ViT-B-16.pt` is on the disk of everybody who ran CoOp."""

    model, file = make_model("openclip", seed=4), tmp_path / "small.pt"
    archive = torch.nn.Module()
    for name, value in model.state_dict().items():
        place = archive
        *path, last = name.split(".")
        for part in path:
            if not hasattr(place, part):
                place.add_module(part, torch.nn.Module())
            place = getattr(place, part)
        place.register_buffer(last, value)
    archive.register_buffer("input_resolution", torch.tensor(SIDE))
    torch.jit.save(torch.jit.script(archive), file)
    with pytest.raises(UserError, match="none of OpenAI's files"):
        load_backbone(f"{architecture}:{file}")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setattr(openai_archive, "_published", lambda: {digest})
    caplog.clear()
    backbone = load_backbone(f"{architecture}:{file}")
    assert not caplog.records
    import open_clip

    quick = open_clip.CLIP(**{**model_config("openclip"), "quick_gelu": True})
    quick.load_state_dict(model.state_dict())
    assert torch.allclose(backbone.encode_texts(TEXTS), _texts_of(quick.eval()), atol=1e-6)
    assert not torch.allclose(backbone.encode_texts(TEXTS), _texts_of(model), atol=1e-6)  # OpenAI's have QuickGELU


def test_the_published_digests_are_those_of_openais_addresses():
    digests = openai_archive._published()
    assert "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f" in digests  # ViT-B-16.pt
    assert all(len(digest) == 64 and int(digest, 16) for digest in digests) and len(digests) >= 9


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:.*TorchScript")
def test_files_that_hold_a_program_or_rubbish_run_nothing(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("EVIL", str(tmp_path / "was run"))
    weights = make_model("openclip").state_dict()
    torch.save({"state_dict": weights, "args": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "rubbish.pth").write_bytes(b"pickle")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "evil.pt").read_bytes()[:5000])
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "archive.pt")
    (tmp_path / "weights.h5").write_bytes(b"other")
    (tmp_path / "cut.safetensors").write_bytes(b"other")
    for file, message in (
        ("evil.pt", "more than tensors"),
        ("rubbish.pth", "safetensors"),
        ("cut.pt", "."),
        ("archive.pt", "TorchScript"),
        ("weights.h5", "no weight file"),
        ("cut.safetensors", "cannot be loaded"),
    ):
        with pytest.raises(UserError, match=message) as raised:
            load_backbone(f"{architecture}:{tmp_path / file}")
        assert "\n" not in str(raised.value)
    assert not (tmp_path / "was run").exists()
    torch.load(tmp_path / "evil.pt", weights_only=False)  # the bait is sound
    assert (tmp_path / "was run").exists()


def test_a_files_preparation_and_activation_follow_its_architecture(tmp_path: Path):
    file = tmp_path / "weights.safetensors"
    file.touch()
    _, _, options = _resolve(f"ViT-B-16-SigLIP:{file}")
    assert options["image_mean"] == options["image_std"] == (0.5, 0.5, 0.5)
    assert options["image_resize_mode"] == "squash" and not options["force_quick_gelu"]
    for name, quick in (("ViT-B/32", True), ("ViT-B-32", False), ("ViT-B-32-quickgelu", False), ("RN50", False)):
        _, source, options = _resolve(f"{name}:{file}")
        assert source == str(file) and options["force_quick_gelu"] == quick  # False leaves the architecture's own
        assert options["image_mean"][0] == 0.48145466
    assert _resolve("ViT-B/32")[1:] == ("openai", {"force_quick_gelu": True})
    assert not _resolve("ViT-B-32:laion2b_s34b_b79k")[2]["force_quick_gelu"]


@pytest.mark.parametrize("name", ["coca_ViT-B-32:laion2b_s13b_b90k", "roberta-ViT-B-32:laion2b_s12b_b32k"])
def test_text_towers_of_another_kind_are_refused_before_anything_is_fetched(name: str):
    with pytest.raises(UserError, match="text tower of another kind"):
        load_backbone(name)


# Offline


@pytest.mark.parametrize(("value", "offline"), [("1", True), ("True", True), ("0", False), ("", False), ("no", False)])
@pytest.mark.parametrize("variable", ["AIR_OFFLINE", "HF_HUB_OFFLINE"])
def test_either_variable_means_offline(variable: str, value: str, offline: bool, monkeypatch: pytest.MonkeyPatch):
    for name in ("AIR_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, value)
    assert is_offline() == offline


# What a process that is told of offline tries to reach ends the process, whatever catches errors.
NO_NETWORK = """
import os, socket, sys
def reached(*arguments, **named):
    sys.stderr.write(f"reached for the network: {arguments[:2]}\\n")
    sys.stderr.flush()
    os._exit(99)
socket.getaddrinfo = socket.create_connection = socket.socket.connect = socket.socket.connect_ex = reached
"""


def offline(folder: Path, code: str, *, variable: str = "AIR_OFFLINE") -> subprocess.CompletedProcess:
    """Run Python code without a network and with empty caches of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "AIR_"))}
    environment |= {"HOME": str(folder), "HF_HOME": str(folder / "hub"), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    environment |= {variable: "1"} if variable else {}
    return subprocess.run(
        [sys.executable, "-c", NO_NETWORK + code], capture_output=True, text=True, env=environment, cwd=folder
    )


@pytest.mark.full
def test_the_block_itself_works(tmp_path: Path):
    code = "from air_plugin.clip.loading import load_backbone; load_backbone('ViT-B/32')"
    assert offline(tmp_path, code, variable="").returncode == 99


@pytest.mark.full
@pytest.mark.parametrize("variable", ["AIR_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_says_what_is_missing_and_how_to_get_it(tmp_path: Path, variable: str):
    names = {
        "ViT-B/32": "hf download timm/vit_base_patch32_clip_224.openai open_clip_model.safetensors",
        "ViT-B-16-SigLIP:webli": "hf download timm/ViT-B-16-SigLIP open_clip_model.safetensors",
        "ViT-B-32:commonpool_m_text_s128m_b4k": "hf download",
        "NEW:tag": ".cache/clip/weights.pt",
        f"ViT-B-16-SigLIP:{tmp_path}/weights.safetensors": "hf download timm/ViT-B-16-SigLIP --include",
    }
    (tmp_path / "weights.safetensors").touch()
    code = f"""
import open_clip.pretrained, open_clip.factory
open_clip.factory._MODEL_CONFIGS["NEW"] = open_clip.factory._MODEL_CONFIGS["ViT-B-32"]
open_clip.pretrained._PRETRAINED["NEW"] = {{"tag": {{"url": "https://example.invalid/weights.pt"}}}}
from air_plugin.clip.loading import load_backbone
from air_plugin.utils.errors import UserError
for name in {list(names)}:
    try:
        load_backbone(name)
    except UserError as error:
        print(error)
"""
    done = offline(tmp_path, code, variable=variable)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(names)
    for (name, message), line in zip(names.items(), lines, strict=True):
        assert f"'{name}'" in line and message in line and "offline" in line


@pytest.mark.full
def test_offline_takes_what_the_hubs_cache_holds(tmp_path: Path):
    """A small model and its tokenizer where the hub's library puts them: weights by tag, tokenizer by name."""
    snapshot = tmp_path / "hub" / "hub" / "models--none--of-the-hub" / "snapshots" / ("0" * 40)
    write_backbone(snapshot, "siglip")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    code = """
import json, open_clip.pretrained, open_clip.factory
from small_backbones import model_config
open_clip.factory._MODEL_CONFIGS["small-siglip"] = model_config("siglip")
open_clip.pretrained._PRETRAINED["small-siglip"] = {"tag": open_clip.pretrained._slpcfg(hf_hub="none/of-the-hub/")}
from air_plugin.clip.loading import load_backbone
backbone = load_backbone("small-siglip:tag")
print(backbone.fingerprint, backbone.encode_texts(["a dog"]).shape, backbone.preprocess)
"""
    done = offline(tmp_path, code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{small_backbone('siglip').fingerprint} torch.Size([1, 32])")
    assert "mean=(0.5, 0.5, 0.5)" in done.stdout.replace("[", "(").replace("]", ")")
    assert f"size=({SIDE}, {SIDE})" in done.stdout  # squashed


@pytest.mark.full
def test_train_offline_is_one_line_and_exit_code_2(tmp_path: Path):
    code = f"""
sys.path.insert(0, "{ROOT}")
import train
sys.exit(train.main(["--offline", "--root", "{tmp_path}", "--trainer", "ZeroshotCLIP",
    "--dataset-config-file", "{ROOT}/configs/datasets/digits.yaml", "--output-dir", "{tmp_path}/run",
    "--config-file", "{ROOT}/configs/trainers/ZeroshotCLIP/mini.yaml", "--backbone", "ViT-B/32"]))
"""
    done = offline(tmp_path, code, variable="")
    assert done.returncode == 2, done.stderr
    assert "error: backbone 'ViT-B/32'" in done.stderr and "Traceback" not in done.stderr


# Online, but nothing answers

NO_WAITING = """
import sys, huggingface_hub.utils._http as http
http.time.sleep = lambda seconds: None  # between attempts
from air_plugin.clip.loading import load_backbone
from air_plugin.utils.errors import exit_code
"""


def refused(folder: Path, code: str) -> subprocess.CompletedProcess:
    """Run Python code where every connection is refused, with empty caches of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "AIR_"))}
    nobody = "http://127.0.0.1:9"  # discard: no such service
    environment |= dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY"), nobody)
    environment |= {"HOME": str(folder), "HF_HOME": str(folder / "hub"), "NO_PROXY": "", "no_proxy": ""}
    environment |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    return subprocess.run(
        [sys.executable, "-c", NO_WAITING + code], capture_output=True, text=True, env=environment, cwd=folder
    )


@pytest.mark.full
def test_without_a_network_one_line_says_what_to_fetch(tmp_path: Path):
    """From the hub, with a tokenizer of its own, and a file with an address of its own; in one process."""
    needed = {
        "ViT-B/32": ["timm/vit_base_patch32_clip_224.openai open_clip_model.safetensors"],
        "ViT-B-16-SigLIP:webli": [
            "timm/ViT-B-16-SigLIP open_clip_model.safetensors",
            "timm/ViT-B-16-SigLIP --include '*token*' '*.model'",
        ],
    }
    code = f"""
import open_clip.pretrained, open_clip.factory
open_clip.factory._MODEL_CONFIGS["NEW"] = open_clip.factory._MODEL_CONFIGS["ViT-B-32"]
open_clip.pretrained._PRETRAINED["NEW"] = {{"tag": {{"url": "https://example.invalid/weights.pt"}}}}
for name in {[*needed, "NEW:tag"]}:
    print(exit_code(lambda: load_backbone(name)))
    print("end of", name, file=sys.stderr)
"""
    done = refused(tmp_path, code)
    assert (done.returncode, done.stdout) == (0, "2\n2\n2\n"), done.stderr
    text = done.stderr
    for name, files in needed.items():
        said, text = text.split(f"end of {name}\n")
        lines = said.splitlines()
        (error,) = [line for line in lines if "rror" in line and "thrown while requesting" not in line]
        assert error == lines[-1] and error.startswith(f"error: backbone '{name}': hub files of ")
        assert "the network does not answer" in error
        assert error.endswith("with a network: " + " && ".join(f"hf download {one}" for one in files))
        # What the hub's library says of its attempts stays, but is not said twice.
        attempts = [line for line in lines if "thrown while requesting" in line]
        assert attempts and not [line for line in lines if line.startswith("WARNING:huggingface_hub")]
    place = tmp_path / ".cache" / "clip" / "weights.pt"
    assert text == (
        "error: backbone 'NEW:tag' is not on this machine, and the network does not answer; get "
        f"https://example.invalid/weights.pt elsewhere and put it at {place}\nend of NEW:tag\n"
    )


def test_only_the_line_that_would_be_said_twice_is_left_out(capfd: pytest.CaptureFixture[str]):
    import logging

    root = logging.getLogger()
    kept, root.handlers[:] = list(root.handlers), []
    try:
        with _without_repetition():
            logging.error("Failed to download weights for tag 'openai': no network")
            logging.error("another fault")
            logging.warning("No pretrained weights loaded")
            logging.getLogger("elsewhere").error("Failed to download weights for tag, says somebody else")
        assert not root.handlers and not root.filters
        logging.getLogger("huggingface_hub").warning("said once")
        with pytest.raises(ValueError), _without_repetition():
            raise ValueError
        assert not root.filters and logging.getLogger("huggingface_hub").propagate
    finally:
        root.handlers[:] = kept
    message = capfd.readouterr().err
    assert "another fault" in message and "No pretrained weights loaded" in message and "says somebody else" in message
    assert "no network" not in message
