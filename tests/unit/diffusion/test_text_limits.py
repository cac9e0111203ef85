"""No text of a generator is cut: prompts, captions, and SDXL's second tower."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small_generators import make_pipeline
from small_models import air_settings, make_generator, make_spelling_tokenizer

from air_plugin.auxiliary.stages import adapt
from air_plugin.diffusion.generate import generate
from air_plugin.diffusion.jobs import plan_jobs
from air_plugin.diffusion.pipeline import encode_prompts
from air_plugin.diffusion.text_limits import require_fit
from air_plugin.utils.errors import UserError
from air_plugin.utils.store import Store

pytestmark = pytest.mark.public_reports

FITS, LONG = "f" * 30, "l" * 31  # the small tokenizers take 32 tokens, start and end included, and spell


@pytest.mark.parametrize("architecture", ["sd15", "sdxl"])
def test_a_prompt_fits_or_is_named(architecture: str):
    """Item 3: nothing is cut in silence."""
    pipeline = make_pipeline(architecture)
    assert len(encode_prompts(pipeline, ["", FITS]).states) == 2
    with pytest.raises(UserError, match=f"'{LONG}' has 33 tokens, .* takes 32 "):
        encode_prompts(pipeline, [FITS, LONG])


def test_the_second_tower_has_its_own_limit():
    """Item 3: SDXL's second tokenizer."""
    pipeline = make_pipeline("sdxl")
    pipeline.tokenizer_2.model_max_length = 20
    require_fit(pipeline, ["s" * 18])
    with pytest.raises(UserError, match=r"has 21 tokens, .* takes 20 "):
        encode_prompts(pipeline, ["s" * 19])


@pytest.mark.parametrize(("limit", "good"), [(40, True), (33, True), (32, False), (10**30, True), (None, True)])
def test_a_tokenizer_without_a_limit_takes_every_text(limit: int | None, good: bool):
    """Item 3: T5's tokenizers may name a limit of 10^30."""
    tokenizer: Any = make_spelling_tokenizer()
    tokenizer.model_max_length = limit
    pipeline = SimpleNamespace(tokenizer=make_spelling_tokenizer(), tokenizer_3=tokenizer)
    pipeline.tokenizer.model_max_length = 100
    if good:
        require_fit(pipeline, [LONG])
    else:
        with pytest.raises(UserError, match="33 tokens"):
            require_fit(pipeline, [LONG])


def test_generation_refuses_a_long_prompt_before_it_begins(tmp_path: Path):
    """Item 3: else every class would be generated from the same text."""
    options = {"images_per_class": 1, "seed": 0, "steps": 1, "guidance": 1.0, "size": 16, "weights": ""}
    jobs = plan_jobs(["sea", "dog"], template="v" * 29 + " {}", **options)
    with pytest.raises(UserError, match="v sea' has 34 tokens"):
        generate(make_generator().pipeline, jobs, tmp_path / "images", batch_size=1)
    assert not (tmp_path / "images").exists()


def test_a_long_caption_is_refused(pictures: list[str], store: Store):
    """Item 3: captions of the LoRA."""
    import torch

    settings = air_settings(**{"LORA.CAPTIONS": "generic", "LORA.GENERIC": LONG})
    with pytest.raises(UserError, match=f"'{LONG}' has 33 tokens"):
        adapt(make_generator(), ["a", "b"], pictures, probs=torch.full((7, 2), 0.5), settings=settings, store=store)
