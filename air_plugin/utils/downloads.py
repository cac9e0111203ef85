"""What is about to be downloaded: size, source and licence, in one line before it begins."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from air_plugin.utils.offline import is_offline
from air_plugin.utils.progress import report

log = logging.getLogger(__name__)

HUB_NAME = r"\w[\w.-]*/[\w.-]+"  # "./folder" is none
CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")  # the first one is preferred


def size_of(address: str, *, timeout: float = 10.0) -> int | None:
    """The size of a file in bytes, as its server states it; None where it does not."""
    request = Request(address, method="HEAD", headers={"User-Agent": "air-plugin", "Accept-Encoding": "identity"})
    try:
        with urlopen(request, timeout=timeout) as answer:
            length = answer.headers.get("Content-Length", "")
    except (OSError, HTTPException):  # OSError: URLError, HTTPError, a cut connection
        return None
    return int(length) if length.isdigit() else None


def in_words(size: int | None) -> str:
    """A size for people.

    Example:
        >>> in_words(94_300_000), in_words(2_750_000_000), in_words(None)
        ('94.3 MB', '2.8 GB', 'size unknown')
    """
    if size is None:
        return "size unknown"
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


# Backbones


def announce_backbone(name: str) -> None:
    """Log what `load_backbone` will download, if it will: a name of OpenAI's or open_clip's, or hf:OWNER/MODEL."""
    if name == "mini" or is_offline() or Path(name).is_dir():
        return
    if name.startswith("hf:"):
        repository = name.removeprefix("hf:")
        if _is_hub_name(repository) and not _is_cached(repository, "model.safetensors"):
            _announce(repository, lambda file: file == "model.safetensors")
        return
    import open_clip

    given, _, tag = name.partition(":")
    settings = open_clip.get_pretrained_cfg(given.replace("/", "-"), tag or "openai")
    if settings.get("hf_hub"):
        repository, file = os.path.split(settings["hf_hub"])
        files = (file,) if file else CLIP_FILES
        if not _is_cached(repository, *files):
            _announce(repository, lambda found: found == files[0])
    elif settings.get("url") and not place_of(settings).is_file():
        size = size_of(settings["url"])
        if size is not None:
            _say(place_of(settings).name, size, settings["url"], "see there")


def repository_of(name: str) -> str:
    """The hub's repository of a backbone's pretrained tag; the name itself where there is none."""
    import open_clip

    given, _, tag = name.partition(":")
    settings = open_clip.get_pretrained_cfg(given.replace("/", "-"), tag or "openai")
    return os.path.dirname(settings.get("hf_hub") or "") or name


def weights_of(settings: Mapping[str, Any]) -> str:
    """The arguments of `hf download` for a pretrained tag, from "owner/repository/" or "owner/repository/file"."""
    repository, file = os.path.split(settings["hf_hub"])
    return f"{repository} {file or CLIP_FILES[0]}"


def place_of(settings: Mapping[str, Any]) -> Path:
    """Where open_clip looks for a file that has an address of its own."""
    return Path("~/.cache/clip").expanduser() / os.path.basename(settings["url"])


# Generators


def announce_generator(
    name: str, *, revision: str = "", variant: str = "", safety_checker: bool = False, lcm_lora: str = "", **_: Any
) -> None:
    """Log what `load_generator` will download, if it will; arguments as there."""
    if is_offline():
        return
    if _is_hub_name(lcm_lora) and not _is_cached(lcm_lora, "pytorch_lora_weights.safetensors"):
        _announce(lcm_lora, lambda file: file == "pytorch_lora_weights.safetensors")
    if not _is_hub_name(name):
        return
    index = _cached(name, "model_index.json", revision)
    if index is not None and any(list(index.parent.glob(f"{part}/*.safetensors")) for part in ("unet", "transformer")):
        return

    def is_read(file: str) -> bool:
        """Whether diffusers reads it: weights of a part of the pipeline, of the variant."""
        part, _, last = file.partition("/")
        if not last.endswith(".safetensors") or (part == "safety_checker" and not safety_checker):
            return False
        kind = re.sub(r"-\d+-of-\d+", "", last.removesuffix(".safetensors")).partition(".")[2]
        return kind == variant

    _announce(name, is_read, revision=revision)


def _is_hub_name(name: str) -> bool:
    return bool(re.fullmatch(HUB_NAME, name)) and not Path(name).exists() and not name.endswith(".safetensors")


# The hub


def _cached(repository: str, file: str, revision: str = "") -> Path | None:
    """A file of the hub on this machine."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, file, revision=revision or None)
    return Path(found) if isinstance(found, str) else None


def _is_cached(repository: str, *files: str) -> bool:
    """Whether one of these files is on this machine."""
    return any(_cached(repository, file) is not None for file in files)


def _announce(repository: str, is_read: Callable[[str], bool], *, revision: str = "") -> None:
    """Log a download from the hub; nothing where the hub does not answer, which the download itself explains."""
    from huggingface_hub import HfApi, constants

    try:
        info = HfApi().model_info(repository, revision=revision or None, files_metadata=True, timeout=10)
    except Exception as error:  # the hub's, the network's: whatever is wrong, the loader meets it, too
        log.debug("%s: %s", repository, error)
        return
    sizes = [file.size for file in info.siblings or [] if is_read(file.rfilename)]
    known = [size for size in sizes if size is not None]
    licence = getattr(info.card_data, "license", None) or "see there"
    _say(repository, sum(known) if known else None, f"{constants.ENDPOINT}/{repository}", str(licence))


def _say(name: str, size: int | None, address: str, licence: str) -> None:
    log.info("downloading %s: %s, from %s, licence: %s", name, in_words(size), address, licence)
    report(f"downloading {name} ({in_words(size)})")
