"""From a name in the config to a backbone: OpenAI's, open_clip's, SigLIP, files and folders."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from air_plugin import mini
from air_plugin.clip import openai_archive
from air_plugin.clip.backbone import Backbone
from air_plugin.clip.huggingface import PREFIX, load_huggingface
from air_plugin.utils.downloads import announce_backbone, place_of, repository_of, weights_of
from air_plugin.utils.errors import UserError, unknown
from air_plugin.utils.hub import is_unreachable, refusal
from air_plugin.utils.offline import go_offline, is_offline
from air_plugin.utils.tensors import DTYPES, save_tensors

log = logging.getLogger(__name__)

OPENAI_NAMES = ("RN50", "RN101", "RN50x4", "RN50x16", "ViT-B/32", "ViT-B/16", "ViT-L/14")
PICKLES = (".pt", ".pth", ".bin")


def load_backbone(
    name: str, *, precision: str = "fp32", autocast: bool = True, device: str | torch.device = "cpu"
) -> Backbone:
    """Load a backbone. Where `is_offline()`, nothing is downloaded, and files that are missing are an error.

    Args:
        name: `mini` (embedded, the default); `mini_vit` (the same with a ViT); OpenAI names ("ViT-B/32"); an open_clip
            architecture with its pretrained tag ("ViT-B-16:laion2b_s34b_b88k", "ViT-B-16-SigLIP:webli") or a local
            weight file ("ViT-B-32-quickgelu:weights.safetensors"); "hf:OWNER/MODEL" or "hf:FOLDER", see
            `clip.huggingface`; or a folder that open_clip or the hub saved (open_clip_config.json, weights, tokenizer).
            The architecture of a file must be the one that its authors used: with a slash ("ViT-B/32:FILE") it is
            OpenAI's, with QuickGELU (GeoRSCLIP's base), with a hyphen ("ViT-B-32:FILE") it is open_clip's, with GELU
            (as RemoteCLIP's authors load it). The wrong one loads without an error. OpenAI's own files
            ("ViT-B/16:ViT-B-16.pt") are TorchScript archives; they are read where their SHA-256 is the published one.
        precision: fp32, fp16 or bf16, of the weights of both towers.
        autocast: on a GPU with tensor cores, let the image tower compute in fp16 where `precision` is fp32. The weights
            stay in fp32, and so does the text tower. It changes nothing on the CPU.
        device: of the model.

    Raises:
        UserError: the name is not known, a file is missing, or a file holds anything but tensors.

    Example:
        >>> load_backbone("mini").encode_texts(["a photo of the digit seven."]).shape
        torch.Size([1, 128])
    """
    if precision not in DTYPES:
        raise unknown("precision", precision, DTYPES)
    if is_offline():
        go_offline()
    announce_backbone(name)
    if name.startswith(PREFIX):
        backbone = load_huggingface(name)
    else:
        backbone = _load_mini(name) if name in mini.BACKBONES else _load_open_clip(name, precision)
    backbone.model.to(device).eval().requires_grad_(False)
    if precision != "fp32" and (name in mini.BACKBONES or name.startswith(PREFIX)):
        backbone.model.to(DTYPES[precision])
    half = fast_half(torch.device(device)) if autocast and precision == "fp32" else None
    return replace(backbone, autocast=half, precision=precision)


def fast_half(device: torch.device) -> torch.dtype | None:
    """fp16 on a GPU with tensor cores (from compute capability 7.0 on), otherwise None.

    Not bf16, which is as fast: it has 8 times fewer steps between two powers of 2, and CLIP was trained in fp16.
    """
    fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)
    return torch.float16 if fast else None


def _load_mini(name: str) -> Backbone:
    import open_clip

    preprocess = open_clip.image_transform(mini.IMAGE_SIZE, is_train=False, mean=mini.MEAN, std=mini.STD)
    model, tokenizer = mini.load_clip(name), mini.tokenizer()
    return Backbone(name, model, preprocess, tokenizer, mini.IMAGE_SIZE, model.context_length)


def _load_open_clip(name: str, precision: str) -> Backbone:
    import open_clip

    if Path(name).is_dir():
        architecture, source, options = _folder(Path(name))
    else:
        architecture, source, options = _resolve(name)
    try:
        with _without_repetition(), ExitStack() as stack:
            if source and openai_archive.is_published(Path(source)):
                source = str(stack.enter_context(openai_archive.as_safetensors(Path(source))))
                options["force_quick_gelu"] = True
            tokenizer = _tokenizer(name, architecture)
            model, preprocess = open_clip.create_model_from_pretrained(
                architecture, pretrained=source, precision=precision, **options
            )
    except Exception as error:
        unreachable = is_unreachable(error) and not refusal(error, repository_of(name))
        explained = _unfetched(name, architecture, source) if unreachable else _explained(name, source, error)
        if explained is None:
            raise
        raise explained from error
    size = model.visual.image_size
    length = getattr(model, "context_length", None) or model.text.context_length
    return Backbone(name, model, preprocess, tokenizer, size[0] if isinstance(size, tuple) else size, length)


@contextmanager
def _without_repetition() -> Iterator[None]:
    """Report a failed download by our one line, and show each line of the hub's library once.

    open_clip logs an error on the root logger before it raises it. Its first record there also gives that logger a
    handler, which would repeat the records that other libraries show through handlers of their own.
    """

    def is_new(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("Failed to download weights for tag")

    root, hub = logging.getLogger(), logging.getLogger("huggingface_hub")
    handlers, propagated = list(root.handlers), hub.propagate
    root.addFilter(is_new)
    hub.propagate = propagated and bool(handlers)  # an earlier handler was set on purpose
    try:
        yield
    finally:
        root.removeFilter(is_new)
        root.handlers[:] = handlers
        hub.propagate = propagated


def _unfetched(name: str, architecture: str, source: str | None) -> UserError:
    """The error for a download that fails because the network does not answer; it names every file that is needed."""
    import open_clip

    settings = open_clip.get_pretrained_cfg(architecture, source or "")  # empty for a file
    text = open_clip.get_model_config(architecture)["text_cfg"]
    needed = [weights_of(settings)] if settings.get("hf_hub") else []
    needed += [_tokenizer_of(text["hf_tokenizer_name"])] if text.get("hf_tokenizer_name") else []
    if needed:
        return _missing(name, *needed, why="the network does not answer")
    return UserError(f"backbone '{name}' is not on this machine, and the network does not answer; {_by_hand(settings)}")


def _explained(name: str, source: str | None, error: Exception) -> UserError | None:
    """open_clip's error as an error for the user; None where it is a defect of this package."""
    if type(error).__name__ == "UnpicklingError":  # torch reads tensors only (weights_only), and this has more
        return UserError(
            f"{source} is damaged or holds more than tensors, and then it could run any program; nothing "
            "of it was loaded; ask its authors for safetensors"
        )
    if "TorchScript" in str(error):
        return UserError(
            f"{source} is a TorchScript archive, which holds a program, and none of OpenAI's files by its SHA-256; "
            "it is not loaded; OpenAI's weights as safetensors come with a tag, for instance ViT-B/32 alone"
        )
    refused = refusal(error, repository_of(name))
    if refused:
        return UserError(f"backbone '{name}' cannot be fetched: {refused}")
    expected = (RuntimeError, ValueError, OSError, AssertionError, KeyError, EOFError, SafetensorError)
    if isinstance(error, expected):
        message = " ".join(str(error).split()) or type(error).__name__
        return UserError(f"backbone '{name}' cannot be loaded: {message[:300]}")
    return None


def _folder(path: Path) -> tuple[str, None, dict[str, Any]]:
    """A local folder as open_clip's loader takes it."""
    import open_clip

    _require_file(path / "open_clip_config.json")
    _require_file(path / "open_clip_model.safetensors")
    try:
        config = open_clip.get_model_config(f"local-dir:{path}")
        _require_own_text_tower(str(path), config)
    except (ValueError, KeyError, AttributeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}/open_clip_config.json is not a model's settings as open_clip saves them") from error
    if config["text_cfg"].get("hf_tokenizer_name"):
        _require_file(path / "tokenizer_config.json")
    return f"local-dir:{path}", None, {}


def _resolve(name: str) -> tuple[str, str, dict[str, Any]]:
    """A name to open_clip's architecture, its tag or file, and options."""
    import open_clip

    given, _, source = name.partition(":")
    if given in OPENAI_NAMES and not source:
        source = "openai"
    architecture = given.replace("/", "-")
    if architecture not in open_clip.list_models():
        error = unknown("backbone", name, [*mini.BACKBONES, *OPENAI_NAMES, *open_clip.list_models()])
        if "did you mean" not in str(error) and ("/" in name or Path(name).suffix):
            raise UserError(f"backbone '{name}' is no folder and no ARCHITECTURE:FILE; see load_backbone for the forms")
        raise error
    config = open_clip.get_model_config(architecture)
    _require_own_text_tower(name, config)
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if source in tags:
        settings = open_clip.get_pretrained_cfg(architecture, source)
        # OpenAI's weights need QuickGELU; the plain architecture would load them without an error and be wrong.
        options = {"force_quick_gelu": bool(settings.get("quick_gelu"))}
        if is_offline():
            source, options = _on_disk(name, settings), {**options, **_preprocessing([settings])}
    elif Path(source).suffix in (".safetensors", *PICKLES) or "/" in source or (source and Path(source).exists()):
        _require_weights(name, Path(source))
        options = {"force_quick_gelu": "/" in given and given in OPENAI_NAMES}
        options.update(_preprocessing([open_clip.get_pretrained_cfg(architecture, tag) for tag in tags]))
    else:
        raise UserError(f"backbone '{name}' names no weights; write {architecture}:TAG, TAG one of: {', '.join(tags)}")
    return architecture, source, options


def _preprocessing(settings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How images are prepared, where all pretrained weights of an architecture agree; a file does not tell."""
    options = {}
    for option in ("mean", "std", "interpolation", "resize_mode"):
        values = {one[option] for one in settings if option in one}
        if len(values) == 1:
            options[f"image_{option}"] = values.pop()
    return options


def _on_disk(name: str, settings: Mapping[str, Any]) -> str:
    """The file of a pretrained tag, without a network.

    Raises:
        UserError: it is not on this machine; the message tells how to get it.
    """
    from open_clip.pretrained import download_pretrained

    if settings.get("hf_hub"):
        try:
            return download_pretrained(dict(settings))
        except FileNotFoundError as error:
            raise _missing(name, weights_of(settings)) from error
    path = place_of(settings)
    if not path.is_file():
        raise UserError(
            f"backbone '{name}' is not on this machine, and offline nothing is fetched; {_by_hand(settings)}"
        )
    return str(path)


def _tokenizer_of(repository: str) -> str:
    """The arguments of `hf download` for a tokenizer alone."""
    return f"{repository} --include '*token*' '*.model'"


def _by_hand(settings: Mapping[str, Any]) -> str:
    return f"get {settings['url']} elsewhere and put it at {place_of(settings)}"


def _tokenizer(name: str, architecture: str) -> Callable[..., Tensor]:
    """An architecture's tokenizer; offline, a tokenizer of the hub is read from the hub's cache."""
    import open_clip
    from huggingface_hub import try_to_load_from_cache

    text = open_clip.get_model_config(architecture)["text_cfg"]
    repository = text.get("hf_tokenizer_name")
    if not repository or not is_offline() or architecture.startswith("local-dir:"):
        return open_clip.get_tokenizer(architecture)
    file = try_to_load_from_cache(repository, "tokenizer_config.json")
    if not isinstance(file, str):
        raise _missing(name, _tokenizer_of(repository))
    # As a folder: by its name, transformers asks the hub for files that are not there.
    return open_clip.tokenizer.HFTokenizer(
        os.path.dirname(file),
        context_length=text["context_length"],
        tokenizer_mode=text.get("tokenizer_mode"),
        **text.get("tokenizer_kwargs", {}),
    )


def _missing(name: str, *needed: str, why: str = "offline nothing is fetched") -> UserError:
    """The error for missing files of the hub; `needed` are arguments of `hf download`."""
    repositories = " and ".join(dict.fromkeys(one.split()[0] for one in needed))
    commands = " && ".join(f"hf download {one}" for one in needed)
    return UserError(
        f"backbone '{name}': hub files of {repositories} are not on this machine, and {why}; with a network: {commands}"
    )


def _require_own_text_tower(name: str, config: Mapping[str, Any]) -> None:
    text = config["text_cfg"]
    if text.get("hf_model_name") or text.get("embed_cls"):
        raise UserError(
            f"backbone '{name}' has a text tower of another kind than CLIP's, in which no prompts can be "
            "learned here; take a CLIP or SigLIP architecture"
        )


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"backbone file {path} is missing")


def _require_weights(name: str, path: Path) -> None:
    if path.suffix not in (".safetensors", *PICKLES):
        raise UserError(f"{path} is no weight file; give one of .safetensors, {', '.join(PICKLES)}")
    _require_file(path)
    if path.suffix in PICKLES and not openai_archive.is_published(path):
        log.warning(
            '%s is a pickle, of which only tensors are read; make it safetensors once: air convert "%s"', path, name
        )


def convert(name: str) -> Path:
    """Write the weights of ARCHITECTURE:FILE as safetensors beside FILE, and return the path of the new file.

    Raises:
        UserError: as `load_backbone`, or FILE is no pickle, or the new file exists already.
    """
    source = Path(name.partition(":")[2])
    if source.suffix not in PICKLES:
        raise UserError(f"'{name}' is not ARCHITECTURE:FILE with a file of {', '.join(PICKLES)}")
    target = source.with_suffix(".safetensors")
    if target.exists():
        raise UserError(f"{target} is there already")
    save_tensors(target, load_backbone(name).model.state_dict())
    return target
