"""Train the CLIP on rendered type: contrast of pictures and captions, where every true pair counts."""

from __future__ import annotations

import string
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from air_plugin.mini import MEAN, STD
from air_plugin.mini.models import CONTEXT_LENGTH, END, START, build_clip, build_tokenizer, initial_table, read_clip
from air_plugin.mini.training.captions import (
    DIGIT_NAMES,
    NAMES,
    Look,
    all_captions_vocabulary,
    call_by_name,
    describe,
    match,
)
from air_plugin.mini.training.common import (
    SEED,
    Log,
    build_optimiser,
    learning_rate,
    load_corpus,
    save_json,
    save_weights,
    set_rate,
)
from air_plugin.mini.training.corpus import Corpus

if TYPE_CHECKING:
    from open_clip import CLIP

STEPS = 1200
PICTURES, CAPTIONS = 256, 100


class CaptionTokens:
    """Tokens numbered by the few rows of the table that captions use; in order, so END stays largest."""

    def __init__(self) -> None:
        self.tokenizer = build_tokenizer()
        used = {0, START, END}
        for text in all_captions_vocabulary():
            used.update(self.tokenizer.encode(text))
        self.ids = torch.tensor(sorted(used))
        self.place = {int(token): row for row, token in enumerate(self.ids)}

    def __call__(self, texts: list[str]) -> Tensor:
        """(N, longest) row numbers, padded with 0, no longer than the longest: attention is causal."""
        rows = [[START, *self.tokenizer.encode(text), END] for text in texts]
        tokens = torch.zeros(len(rows), min(max(map(len, rows)), CONTEXT_LENGTH), dtype=torch.long)
        for index, row in enumerate(rows):
            tokens[index, : len(row)] = torch.tensor([self.place[token] for token in row])
        return tokens


def encode_short(clip: CLIP, tokens: Tensor) -> Tensor:
    """`clip.encode_text` for tokens (N, L) shorter than the context: (N, D), unit norm, the same numbers."""
    length = tokens.shape[1]
    hidden = clip.token_embedding(tokens) + clip.positional_embedding[:length]
    mask = clip.attn_mask[:length, :length]
    hidden = clip.ln_final(clip.transformer(hidden, attn_mask=mask))
    pooled = hidden[torch.arange(len(tokens)), tokens.argmax(1)]
    return F.normalize(pooled @ clip.text_projection, dim=-1)


def contrast(similarity: Tensor, truth: Tensor) -> Tensor:
    """Multi-positive cross entropy both ways.

    Args:
        similarity: (pictures, captions), scaled cosines.
        truth: (pictures, captions) in {0, 1}; every caption has a picture.
    """
    named = truth.sum(1) > 0
    target = truth / truth.sum(1, keepdim=True).clamp(min=1)
    to_captions = -(target * similarity.log_softmax(1)).sum(1)[named].mean()
    target = truth / truth.sum(0, keepdim=True).clamp(min=1)
    to_pictures = -(target * similarity.log_softmax(0)).sum(0).mean()
    return (to_captions + to_pictures) / 2


def name_indices(looks: Sequence[Look]) -> Tensor:
    """(N,) places in NAMES, capital or small."""
    return torch.tensor([NAMES.index((look.character or "").lower()) for look in looks])


def total_loss(
    clip: CLIP, head: nn.Linear, pictures: Tensor, captions: Tensor, looks: Sequence[Look], truth: Tensor
) -> Tensor:
    """Contrast, plus two plain classifications that end the plateau on which contrast alone starts.

    Args:
        clip: for its temperature.
        head: a linear classifier of the picture's feature; helps the start and is thrown away.
        pictures: (N, D), as encoded.
        captions: (36 + M, D), unit norm: one caption a name, in the order of NAMES, then M described ones.
        looks: what the N pictures show.
        truth: (N, M) in {0, 1}.
    """
    similarity = clip.logit_scale.exp() * F.normalize(pictures, dim=-1) @ captions.T
    names = name_indices(looks)
    named = F.cross_entropy(similarity[:, : len(NAMES)], names)
    return contrast(similarity[:, len(NAMES) :], truth) + named + 0.5 * F.cross_entropy(head(pictures), names)


def normalise(images: Tensor) -> Tensor:
    """[0, 1] -> what the model takes."""
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def train_clip(corpus: Corpus, out: Path, *, steps: int = STEPS, seed: int = SEED) -> Path:
    """Train and write clip.safetensors; a checkpoint of the same name lies there from step 200 on."""
    generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    tokens = CaptionTokens()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # open_clip initialises from the global state
        clip = build_clip(vocabulary=len(tokens.ids))
        head = nn.Linear(clip.visual.output_dim, len(NAMES))
    with torch.no_grad():
        clip.token_embedding.weight.copy_(initial_table()[tokens.ids])
    clip.train()
    clip.visual.to(memory_format=torch.channels_last)
    optimiser = build_optimiser([*clip.parameters(), *head.parameters()], decay=0.05)
    log = Log("clip")
    for step in range(steps):
        set_rate(optimiser, learning_rate(step, steps, peak=2e-3, warm_up=min(100, steps // 10 + 1)))
        images, looks = corpus.sample(PICTURES, generator)
        texts, claims = zip(*(describe(look, rng) for look in looks[:CAPTIONS]), strict=True)
        with torch.autocast("cpu", torch.bfloat16):
            pictures = clip.visual(normalise(images).contiguous(memory_format=torch.channels_last))
            captions = encode_short(clip, tokens([*(call_by_name(name, rng) for name in NAMES), *texts]))
        loss = total_loss(clip, head, pictures.float(), captions.float(), looks, match(looks, claims))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimiser.step()
        with torch.no_grad():
            clip.logit_scale.clamp_(max=float(np.log(100)))
        log.add(step, loss=loss.item(), scale=clip.logit_scale.exp().item())
        if (step + 1) % 200 == 0:
            save_clip(clip, tokens.ids, out / "clip.safetensors")
    save_clip(clip, tokens.ids, out / "clip.safetensors")
    return out / "clip.safetensors"


def save_clip(clip: CLIP, ids: Tensor, path: Path) -> None:
    """All weights, the token table as ids and rows."""
    weights = {name: value for name, value in clip.state_dict().items() if name != "token_embedding.weight"}
    rows = clip.token_embedding.weight
    save_weights(weights | {"token_rows": rows, "token_ids": ids.to(torch.int32)}, path)


@torch.no_grad()
def zero_shot_accuracy(clip: CLIP, corpus: Corpus, *, digits: bool, seed: int = SEED, count: int = 4000) -> float:
    """Accuracy on newly sampled pictures of a corpus, digits among 10 names or letters among 26."""
    names = list(DIGIT_NAMES) if digits else list(string.ascii_lowercase)
    template = "a photo of the digit {}." if digits else "a photo of the letter {}."
    prompts = clip.encode_text(build_tokenizer()([template.format(name) for name in names]), normalize=True)
    generator, right, seen = torch.Generator().manual_seed(seed + 1), 0, 0
    while seen < count:
        images, looks = corpus.sample(500, generator, digits_only=digits)
        kept = [index for index, look in enumerate(looks) if (look.kind == "digit") == digits]
        guesses = (clip.encode_image(normalise(images[kept]), normalize=True) @ prompts.T).argmax(1)
        keys = string.digits if digits else string.ascii_lowercase
        truth = torch.tensor([keys.index((looks[index].character or "").lower()) for index in kept])
        right, seen = right + int((guesses == truth).sum()), seen + len(kept)
    return right / seen


def zero_shot_metrics(clip: CLIP, out: Path, *, fonts: str) -> dict[str, float]:
    """Accuracies on held-out families and on the development handwriting; empty for matplotlib's few families.

    Args:
        clip: trained.
        out: folder for the cache of masks.
        fonts: what it was trained on.
    """
    metrics: dict[str, float] = {}
    for name, source, part in (("held_out", fonts, "held_out"), ("development", "development", "train")):
        if fonts != "debian":
            continue  # matplotlib's few families are all trained on
        corpus = load_corpus(source, out, part=part)
        if not corpus.faces:
            continue  # the handwriting packages are not needed for training
        metrics[f"{name}_digits"] = round(zero_shot_accuracy(clip, corpus, digits=True), 4)
        metrics[f"{name}_letters"] = round(zero_shot_accuracy(clip, corpus, digits=False), 4)
    return metrics


def main(out: Path, *, steps: int = STEPS, fonts: str = "debian") -> dict[str, float]:
    """Train, evaluate on held-out families and on the development handwriting, write clip.json."""
    start = time.monotonic()
    path = train_clip(load_corpus(fonts, out), out, steps=steps)
    metrics: dict[str, float] = {"steps": steps, "seconds": round(time.monotonic() - start)}
    metrics |= zero_shot_metrics(read_clip(path), out, fonts=fonts)
    save_json(metrics, out / "clip.json")
    return metrics
