"""Which backbone and generator `auto` means on this machine, and the settings that go with them."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from air_plugin.config import merge_file, merge_options, own_config, refuse_drop_in_keys, require_ranges
from air_plugin.utils.errors import UserError
from air_plugin.utils.hub import is_unreachable, refusal
from air_plugin.utils.offline import go_offline, is_offline

log = logging.getLogger(__name__)

AUTO, MINI = "auto", "mini"
BACKBONE = "ViT-B/32"  # what auto means on a GPU
PACKAGE = Path(__file__).parents[1]
GENERATORS = {MINI: PACKAGE / "mini" / "settings.yaml", AUTO: Path(__file__).with_name("sd15.yaml")}
PLUS = Path(__file__).with_name("plus.yaml")  # Gaussian classes, EM, lambda without labels; no training of prompts
EMBEDDED = (
    "the embedded models are used, since %s; they were trained on rendered type alone: good for digits, letters and "
    "for trying things out, not for photos (for these, backbone='ViT-B/32' with a generator of the hub, on a GPU)"
)


def user_cache() -> Path:
    """The folder of a person's caches for this package: $XDG_CACHE_HOME/air_plugin, else ~/.cache/air_plugin."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "air_plugin"


def choose(backbone: str, generator: str, device: str) -> tuple[str, str]:
    """The names that `auto` stands for, of a backbone and a generator; other names stay as they are.

    On a GPU auto is ViT-B/32 and Stable Diffusion 1.5, where their files are in the hub's cache or the hub answers;
    else the embedded models, with one line in the log. The generator follows a backbone that is named `mini`.
    """
    if AUTO not in (backbone, generator):
        return backbone, generator
    why = "there is no GPU" if not device.startswith("cuda") else ""
    if not why and backbone != MINI and generator == AUTO:
        why = missing_generator()
    if not why and backbone == AUTO and generator != MINI:
        why = missing_backbone()
    if not why:
        return BACKBONE if backbone == AUTO and generator != MINI else _unless_auto(backbone), _follow(
            backbone, generator
        )
    log.warning(EMBEDDED, why)
    return _unless_auto(backbone), _unless_auto(generator)


def _unless_auto(name: str) -> str:
    return MINI if name == AUTO else name


def _follow(backbone: str, generator: str) -> str:
    """The generator on a GPU: Stable Diffusion, but the embedded one with the embedded backbone."""
    return _unless_auto(generator) if backbone == MINI else generator


def missing_generator() -> str:
    """Why Stable Diffusion 1.5 cannot be loaded; empty where its files are here or the hub answers."""
    from huggingface_hub import hf_hub_download

    air = settings_of(BACKBONE, AUTO, seed=0).AIR
    return _missing(air.GENERATOR, lambda: hf_hub_download(air.GENERATOR, "model_index.json", revision=air.REVISION))


def missing_backbone() -> str:
    """Why ViT-B/32 cannot be loaded; empty where its file is here or the hub answers."""
    import open_clip
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    settings = open_clip.get_pretrained_cfg(BACKBONE.replace("/", "-"), "openai")
    repository, file = os.path.split(settings.get("hf_hub") or "")
    if not repository:
        return ""  # open_clip fetches it from an address of its own
    if isinstance(try_to_load_from_cache(repository, file or "open_clip_model.safetensors"), str):
        return ""
    return _missing(repository, lambda: hf_hub_download(repository, file or "open_clip_config.json"))


def _missing(repository: str, fetch: Any) -> str:
    """Why the hub gives no small file of a repository; empty where it does."""
    if is_offline():
        go_offline()
    try:
        fetch()
    except Exception as error:
        refused = refusal(error, repository)
        if not refused and not is_unreachable(error):
            raise
        return refused or f"{repository} is not in the hub's cache, and the hub does not answer"
    return ""


def settings_of(
    backbone: str,
    generator: str,
    *,
    seed: int,
    template: str = "a photo of a {}.",
    device: str = "",
    options: Mapping[str, Any] | None = None,
) -> Any:
    """The config of a fit: the generator's settings, the preset `plus`, then the caller's own.

    Args:
        backbone: its name.
        generator: auto, mini, a name on the hub or a folder.
        seed: of adapter and images.
        template: of captions and zero-shot labels.
        device: a generator of the hub computes in fp32 on the CPU.
        options: KEY -> value, for instance {"AIR.M": 60}.

    Raises:
        UserError: a key is unknown, or a value out of range.
    """
    cfg = own_config(seed)
    merge_file(cfg, GENERATORS[MINI if generator == MINI else AUTO])
    merge_file(cfg, PLUS)
    cfg.MODEL.BACKBONE.NAME, cfg.DATASET.TEMPLATE, cfg.AIR.GENERATION_PER_SEED = backbone, template, True
    if backbone == generator == MINI:
        cfg.AIR.THREADS = 1  # so small models gain little from two, and two collapse where another process is busy
    if generator not in (MINI, AUTO):
        cfg.AIR.GENERATOR, cfg.AIR.REVISION = generator, ""
    if generator != MINI and device.startswith("cpu"):
        cfg.AIR.PRECISION = "fp32"
    if options is not None and not isinstance(options, Mapping):
        raise UserError(f"settings is {options!r}; it must be a mapping, for instance {{'AIR.M': 60}}")
    merge_options(cfg, [word for key, value in (options or {}).items() for word in (key, value)])
    require_ranges(cfg)
    refuse_drop_in_keys(cfg)
    return cfg
