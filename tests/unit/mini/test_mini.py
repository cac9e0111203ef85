"""The embedded default: what it was made of, what it can do, and that its training still runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from air_plugin import load_backbone, mini
from air_plugin.mini import models
from air_plugin.mini.training import captions, common, corpus, fonts, train_clip, train_unet, train_vae, train_vit
from air_plugin.mini.training.captions import Look
from scripts import identity

TEXTS = ["a photo of the digit seven.", "a residential area", "the letter k in red on a blue background", ""]


@pytest.fixture(scope="module")
def clip():
    return mini.load_clip()


@pytest.fixture(scope="module")
def pipe():
    return mini.load_pipeline()


@pytest.fixture(scope="module")
def small_corpus() -> corpus.Corpus:
    faces = [face for face in fonts.find_faces("matplotlib") if not fonts.is_held_out(face.family)]
    return corpus.Corpus(faces, corpus.render_masks(faces))


def make_images(pipe, prompts: list[str], *, seed: int = 0) -> Tensor:
    """(N, 3, 32, 32) in [0, 1]."""
    generators = [torch.Generator().manual_seed(seed + index) for index in range(len(prompts))]
    images = pipe(
        prompt=prompts,
        height=32,
        width=32,
        num_inference_steps=12,
        guidance_scale=3,
        generator=generators,
        output_type="np",
    ).images
    return torch.from_numpy(images).permute(0, 3, 1, 2)


# Shipped files


def test_weights_are_small_and_safe():
    files = [path for path in mini.WEIGHTS.iterdir() if path.suffix != ".json"]
    assert {path.suffix for path in files} == {".safetensors"}
    assert sum(path.stat().st_size for path in mini.WEIGHTS.iterdir()) <= 15_000_000
    assert (mini.WEIGHTS / "vit.safetensors").stat().st_size <= 4_000_000
    assert {path.name for path in mini.WEIGHTS.iterdir()} == {name for names in mini.FILES.values() for name in names}


def test_fingerprint_follows_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    before = mini.weights_fingerprint()
    assert len(before) == 64 and before == mini.weights_fingerprint()
    for path in mini.WEIGHTS.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(mini, "WEIGHTS", tmp_path)
    assert mini.weights_fingerprint() == before
    changed = bytearray((tmp_path / "vae.safetensors").read_bytes())
    changed[-1] ^= 1
    (tmp_path / "vae.safetensors").write_bytes(bytes(changed))
    assert mini.weights_fingerprint() != before


def test_the_vit_changes_nothing_of_mini():
    """Runs of mini from before there was a ViT count as complete only if mini's files are the same ones."""
    assert mini.weights_fingerprint() == "79fc607765a89ae07f44fc252b587c29c6a58c055244c0d2ee3b34a8a6fe76f8"
    assert mini.weights_fingerprint("mini_vit") != mini.weights_fingerprint()
    assert [path.name for path in identity.weight_files("mini")] == list(mini.FILES["mini"])
    assert [path.name for path in identity.weight_files("mini_vit")] == ["clip.safetensors", "vit.safetensors"]


def test_import_is_quick():
    heavy = "{'torch', 'open_clip', 'diffusers', 'transformers'} & set(sys.modules)"
    code = f"import sys, air_plugin.mini; assert not {heavy}, {heavy}"
    subprocess.run([sys.executable, "-c", code], check=True)


# CLIP


def test_clip_is_frozen_open_clip(clip):
    import open_clip

    assert isinstance(clip, open_clip.CLIP) and not clip.training
    assert all(value.dtype == torch.float32 and not value.requires_grad for value in clip.parameters())
    assert clip.context_length == mini.tokenizer().context_length == 32
    assert mini.tokenizer()(TEXTS).shape == (4, 32)


def test_token_table_is_regenerated_row_by_row(clip):
    table = clip.token_embedding.weight
    assert torch.equal(table, mini.load_clip().token_embedding.weight)
    assert len(torch.unique(table[:, :8], dim=0)) == len(table)  # eight numbers tell all 49,408 tokens apart
    trained = (table != models.initial_table()).any(1).sum()
    assert 60 < trained < 300


def test_unseen_class_names_have_their_own_features(clip):
    names = ["river", "forest", "highway", "pasture", "industrial area", "sea or lake"]
    features = clip.encode_text(mini.tokenizer()([f"a photo of a {name}." for name in names]), normalize=True)
    cosines = features @ features.T - torch.eye(len(names))
    assert cosines.max() < 0.9999


@pytest.mark.parametrize(("digits", "least"), [(True, 0.7), (False, 0.6)])
def test_clip_reads_rendered_type(clip, small_corpus, digits: bool, least: float):
    accuracy = train_clip.zero_shot_accuracy(clip, small_corpus, digits=digits, count=400, seed=3)
    assert accuracy > least


def test_short_captions_encode_as_long_ones(clip):
    texts = ["a photo of the digit seven.", "a k"]
    tokens = mini.tokenizer()(texts)
    short = tokens[:, : int(tokens.argmax(1).max()) + 1]
    whole = clip.encode_text(tokens, normalize=True)
    assert torch.allclose(train_clip.encode_short(clip, short), whole, atol=1e-5)


# The ViT


@pytest.fixture(scope="module")
def vit():
    return mini.load_clip("mini_vit")


def test_vit_is_openais_tower_beside_the_text_tower_of_mini(clip, vit):
    from open_clip.transformer import VisionTransformer

    assert isinstance(vit.visual, VisionTransformer) and not vit.training
    assert all(value.dtype == torch.float32 and not value.requires_grad for value in vit.parameters())
    assert vit.visual.class_embedding.shape == (models.VIT_WIDTH,)
    assert vit.visual.positional_embedding.shape == (1 + (32 // models.VIT_PATCH) ** 2, models.VIT_WIDTH)
    assert isinstance(vit.visual.ln_pre, torch.nn.LayerNorm)
    theirs = vit.state_dict()
    shared = {name: value for name, value in clip.state_dict().items() if not name.startswith("visual.")}
    assert len(shared) > 20 and all(torch.equal(theirs[name], value) for name, value in shared.items())


def test_vit_features_follow_the_source_formula(vit):
    """Class token, learned position, ln_pre, blocks, the class token's ln_post, projection: by hand."""
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tower = vit.visual
    patches = tower.conv1(pixels).flatten(2).transpose(1, 2)
    tokens = torch.cat([tower.class_embedding.expand(2, 1, -1), patches], 1) + tower.positional_embedding
    hidden = tower.transformer(tower.ln_pre(tokens))
    features = torch.nn.functional.normalize(tower.ln_post(hidden[:, 0]) @ tower.proj, dim=1)
    backbone = load_backbone("mini_vit")
    assert backbone.name == "mini_vit" and torch.allclose(backbone.encode_images(pixels), features, atol=1e-5)
    assert torch.allclose(features.norm(dim=1), torch.ones(2), atol=1e-5)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_vit_runs_in_half_precision(vit, precision: str):
    pixels = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    whole = load_backbone("mini_vit").encode_images(pixels)
    half = load_backbone("mini_vit", precision=precision).encode_images(pixels)
    assert half.dtype == torch.float32 and (whole * half).sum(1).min() > 0.99


@pytest.mark.parametrize(("digits", "least"), [(True, 0.7), (False, 0.6)])
def test_vit_reads_rendered_type(vit, small_corpus, digits: bool, least: float):
    accuracy = train_clip.zero_shot_accuracy(vit, small_corpus, digits=digits, count=400, seed=3)
    assert accuracy > least


def test_distillation_loss_is_its_three_parts(clip):
    generator = torch.Generator().manual_seed(0)
    pictures, teacher = torch.randn(2, 8, generator=generator), torch.randn(2, 8, generator=generator)
    captions = torch.nn.functional.normalize(torch.randn(39, 8, generator=generator), dim=1)
    truth = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    looks = [Look("7", kind="digit"), Look("K", kind="letter")]
    loss = train_vit.distillation_loss(clip, pictures, teacher, captions, looks, truth)
    cosines = [float(a @ b / a.norm() / b.norm()) for a, b in zip(pictures, teacher, strict=True)]
    logits = torch.stack([clip.logit_scale.exp() * row / row.norm() @ captions.T for row in pictures])
    named = -(logits[0, :36].log_softmax(0)[7] + logits[1, :36].log_softmax(0)[10 + 10]) / 2
    expected = train_vit.TEACHER * (1 - sum(cosines) / 2) + named + train_clip.contrast(logits[:, 36:], truth)
    assert torch.isclose(loss, expected)


# Diffusion


def test_text_encoder_is_the_clips_own_tower(clip, pipe):
    tokens = mini.tokenizer()(TEXTS)
    theirs = pipe.tokenizer(TEXTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert torch.equal(tokens, theirs)
    output = pipe.text_encoder(theirs)
    assert torch.allclose(output.last_hidden_state, train_unet.text_states(clip, tokens), atol=1e-4)
    pooled = output.pooler_output @ clip.text_projection
    assert torch.allclose(pooled, clip.encode_text(tokens), atol=1e-4)


def test_pipeline_draws_what_it_is_told(clip, pipe):
    prompts = [f"a photo of the digit {name}." for name in captions.DIGIT_NAMES] * 3
    images = make_images(pipe, prompts)
    assert images.shape == (30, 3, 32, 32) and bool(torch.isfinite(images).all())
    assert images.std(dim=(1, 2, 3)).min() > 0.01
    heads = clip.encode_text(mini.tokenizer()(prompts[:10]), normalize=True)
    seen = (clip.encode_image(train_clip.normalise(images), normalize=True) @ heads.T).argmax(1)
    assert (seen == torch.arange(10).repeat(3)).float().mean() > 0.5  # chance is 0.1


def test_same_seed_same_picture(pipe):
    prompts = ["a photo of the digit three."]
    first = make_images(pipe, prompts, seed=5)
    assert torch.equal(first, make_images(pipe, prompts, seed=5))
    assert not torch.allclose(first, make_images(pipe, prompts, seed=6), atol=0.05)


def test_lora_round_trip(tmp_path: Path):
    import peft
    from diffusers import StableDiffusionPipeline

    pipe = mini.load_pipeline()
    prompts = ["a photo of the digit three."]
    plain = make_images(pipe, prompts)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
    pipe.unet.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, target_modules=targets))
    with torch.no_grad():
        for name, value in pipe.unet.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    adapted = make_images(pipe, prompts)
    assert not torch.allclose(plain, adapted, atol=0.05)
    layers = peft.get_peft_model_state_dict(pipe.unet)
    StableDiffusionPipeline.save_lora_weights(str(tmp_path), unet_lora_layers=layers)
    fresh = mini.load_pipeline()
    fresh.load_lora_weights(str(tmp_path))
    assert torch.allclose(make_images(fresh, prompts), adapted, atol=1e-3)


def test_vae_keeps_pictures(small_corpus):
    vae = models.read_vae(mini.WEIGHTS)
    assert train_vae.reconstruction_psnr(vae, small_corpus, count=100) > 20
    images, _ = small_corpus.sample(200, torch.Generator().manual_seed(1))
    latents = vae.encode(images * 2 - 1).latent_dist.mean * vae.config.scaling_factor
    assert 0.8 < float(latents.std()) < 1.2


# Corpus


@pytest.mark.parametrize(
    ("family", "style"),
    [
        ("Dancing Script", "Bold"),
        ("Kaushan Script", "Regular"),
        ("DkgHandwriting", "Regular"),
        ("Comic Neue", "Italic"),
        ("Humor Sans", "Normal"),
        ("URW Chancery L", "Medium Italic"),
        ("Z003", ""),
        ("TeX Gyre Chorus", "Italic"),
        ("Ecolier_court", "Regular"),
        ("Noto Sans Bengali", "Regular"),
        ("Compagnon", "Script"),
        ("cmsy10", "Regular"),
    ],
)
def test_handwriting_is_excluded(family: str, style: str):
    assert fonts.is_excluded(family, style)


@pytest.mark.parametrize("family", ["DejaVu Sans", "Nimbus Roman", "Noto Serif", "Courier Prime", "STIXGeneral"])
def test_type_is_not_excluded(family: str):
    assert not fonts.is_excluded(family, "Bold")


def test_handwriting_packages_are_not_in_the_corpus():
    assert not set(fonts.package_names()) & set(fonts.DEVELOPMENT_PACKAGES)
    faces = fonts.find_faces("matplotlib")
    assert faces and not any(fonts.is_excluded(face.family, face.style) for face in faces)


def test_held_out_families_are_whole():
    assert fonts.is_held_out("Lato Light") and fonts.is_held_out("Carlito")
    assert not fonts.is_held_out("DejaVu Sans") and not fonts.is_held_out("TeX Gyre Termes")


def test_corpus_is_a_function_of_its_generator(small_corpus):
    first, looks = small_corpus.sample(16, torch.Generator().manual_seed(4))
    second, same = small_corpus.sample(16, torch.Generator().manual_seed(4))
    assert torch.equal(first, second) and looks == same
    assert first.shape == (16, 3, 32, 32) and first.min() >= 0 and first.max() <= 1
    third, _ = small_corpus.sample(16, torch.Generator().manual_seed(5))
    assert not torch.equal(first, third)


def test_captions_are_true_of_their_picture_and_readable(small_corpus):
    rng, tokens = np.random.default_rng(0), train_clip.CaptionTokens()
    _, looks = small_corpus.sample(400, torch.Generator().manual_seed(4))
    texts, claims = zip(*(captions.describe(look, rng) for look in looks), strict=True)
    assert all(look.satisfies(claim) for look, claim in zip(looks, claims, strict=True))
    assert tokens(list(texts)).shape[1] <= models.CONTEXT_LENGTH  # a word off the list raises KeyError
    assert any("digit seven" in text for text in texts) and any(" in red" in text for text in texts)


def test_match_tells_true_from_false():
    seven = Look("7", kind="digit", ink="red", ground="white", bold=False, italic=True)
    capital = Look("K", kind="letter", ink="blue", ground="white", bold=True, italic=False)
    claims = [
        Look("7"),
        Look("7", ink="blue"),
        Look("k", any_case=True),
        Look("k"),
        Look(kind="digit", italic=True),
        Look(ground="white"),
    ]
    wanted = [[1, 0, 0, 0, 1, 1], [0, 0, 1, 0, 0, 1]]
    assert captions.match([seven, capital], claims).tolist() == wanted


def test_contrast_counts_every_true_pair():
    truth = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    similarity = torch.tensor([[2.0, 1.0, -1.0], [0.5, 0.0, 3.0]])
    rows, columns = similarity.log_softmax(1), similarity.log_softmax(0)
    to_captions = -((rows[0, 0] + rows[0, 1]) / 2 + rows[1, 2]) / 2
    to_pictures = -(columns[0, 0] + columns[0, 1] + columns[1, 2]) / 3
    assert torch.isclose(train_clip.contrast(similarity, truth), (to_captions + to_pictures) / 2)


# Training


@pytest.mark.full
def test_trainings_run_end_to_end(small_corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(train_clip, "PICTURES", 48)
    monkeypatch.setattr(train_clip, "CAPTIONS", 24)
    monkeypatch.setattr(train_unet, "BATCH", 16)
    state = torch.random.get_rng_state()
    clip = models.read_clip(train_clip.train_clip(small_corpus, tmp_path, steps=3))
    train_vae.train_vae(small_corpus, tmp_path, steps=5)
    train_unet.train_unet(small_corpus, tmp_path, steps=3, pool=32)
    unet = models.read_unet(tmp_path / "unet.safetensors")
    pipe = models.build_pipeline(models.read_vae(tmp_path), unet, clip)
    assert torch.equal(state, torch.random.get_rng_state())  # global randomness is left alone
    assert bool(torch.isfinite(make_images(pipe, ["a photo of the digit seven."])).all())


class Stopped(Exception):
    pass


def test_vit_training_resumes_as_undisturbed(clip, small_corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for module in (train_vit, train_clip):
        monkeypatch.setattr(module, "PICTURES", 8)
        monkeypatch.setattr(module, "CAPTIONS", 4)
    monkeypatch.setattr(train_vit, "EVERY", 2)
    (tmp_path / "whole").mkdir()
    state = torch.random.get_rng_state()
    whole = train_vit.train_vit(small_corpus, clip, tmp_path / "whole", steps=4)
    assert torch.equal(state, torch.random.get_rng_state())  # global randomness is left alone
    save = train_vit.save_checkpoint

    def save_and_stop(*arguments: Any, **options: Any) -> None:
        save(*arguments, **options)
        raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(train_vit, "save_checkpoint", save_and_stop)
        train_vit.train_vit(small_corpus, clip, tmp_path, steps=4)
    assert (tmp_path / "vit.checkpoint").is_file() and not (tmp_path / "vit.safetensors").exists()
    other = {"steps": 8, "seed": common.SEED, "faces": len(small_corpus.faces)}
    tower = models.build_clip(vocabulary=1, vit=True).visual
    assert not train_vit.load_checkpoint(
        tmp_path / "vit.checkpoint", tower, torch.optim.AdamW([{"params": [torch.ones(1)]}]), run=other
    )
    losses: list[float] = []
    monkeypatch.setattr(train_vit.Log, "add", lambda self, step, **metrics: losses.append(metrics["loss"]))
    resumed = train_vit.train_vit(small_corpus, clip, tmp_path, steps=4)
    assert len(losses) == 2 and resumed.read_bytes() == whole.read_bytes()
    assert not (tmp_path / "vit.checkpoint").exists()
    trained = models.read_vit(resumed, clip)
    assert bool(torch.isfinite(trained.encode_image(torch.rand(2, 3, 32, 32))).all())


@pytest.mark.full
def test_vae_training_learns(small_corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(train_vae, "BATCH", 8)
    train_vae.train_vae(small_corpus, tmp_path, steps=40)
    untrained = train_vae.reconstruction_psnr(models.build_vae().eval(), small_corpus, count=64)
    trained = train_vae.reconstruction_psnr(models.read_vae(tmp_path), small_corpus, count=64)
    assert trained > untrained + 1


def test_unet_says_what_it_needs(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"clip\.safetensors"):
        train_unet.main(tmp_path)


def test_learning_rate_warms_up_and_ends_at_nothing():
    rates = [common.learning_rate(step, 100, peak=1.0, warm_up=10) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == pytest.approx(1.0) and rates[-1] < 0.001
    levels = [train_unet.rate(step, 1000) for step in range(1000)]
    assert levels[500] == train_unet.PEAK and levels[-1] == pytest.approx(train_unet.PEAK / 400)
