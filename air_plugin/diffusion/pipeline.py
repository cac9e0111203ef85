"""Loading a generator: a text-to-image pipeline of diffusers.

Supported are the families of families.py: `StableDiffusionPipeline` (SD 1.5, SD 2.1 and SD-Turbo, whose files name the
text tower and the kind of prediction), `StableDiffusionXLPipeline`, `StableDiffusion3Pipeline` (also 3.5),
`FluxPipeline` and `SanaPipeline`. Few-step models are one of these with another sampler: SD-Turbo and FLUX.1 schnell
have their own scheduler, and an LCM has an adapter that is attached during generation.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from air_plugin.config import Sampler
from air_plugin.diffusion.families import PIPELINES, denoiser_of, family_of
from air_plugin.diffusion.family import Conditioning
from air_plugin.diffusion.int8 import quantize
from air_plugin.diffusion.text_limits import require_fit
from air_plugin.utils.digests import content_digest
from air_plugin.utils.downloads import HUB_NAME, announce_generator
from air_plugin.utils.errors import UserError, first_line, unknown
from air_plugin.utils.hub import is_unreachable, refusal
from air_plugin.utils.offline import is_offline
from air_plugin.utils.tensors import DTYPES, tensor_digest

LIBRARIES = ("diffusers", "transformers", "stable_diffusion")  # the last: how model_index.json names the safety checker
SCHEDULERS = {
    "dpm": "DPMSolverMultistepScheduler",
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "lcm": "LCMScheduler",
}
WEIGHTS = "pytorch_lora_weights.safetensors"  # diffusers' own name: pipe.load_lora_weights(folder) reads it
ACCELERATOR = "accelerator"


@dataclass(frozen=True)
class Generator:
    """A text-to-image pipeline. Made by `load_generator`.

    pipeline: of diffusers, without adapters.
    fingerprint: SHA-256 of its weights.
    accelerator: file of the adapter that makes it a few-step model. It is attached during generation only: the adapter
        of the target images is trained without it (LCM-LoRA, arXiv 2311.05556, adds the two).
    """

    pipeline: Any
    fingerprint: str
    accelerator: Path | None = None

    @property
    def training(self) -> dict[str, Any]:
        """What determines an adapter besides weights and data: type, noise and kind of prediction. JSON values."""
        config = self.pipeline.scheduler.config
        keys = family_of(self.pipeline).noise
        return {"dtype": str(denoiser_of(self.pipeline).dtype), "noise": {key: str(config.get(key)) for key in keys}}

    @property
    def sampling(self) -> dict[str, Any]:
        """What determines an image besides weights, prompt and seed. JSON values."""
        scheduler, checker = self.pipeline.scheduler, getattr(self.pipeline, "safety_checker", None)
        config = {key: str(value) for key, value in scheduler.config.items() if not key.startswith("_")}
        return {
            "dtype": str(denoiser_of(self.pipeline).dtype),
            "scheduler": {"class": type(scheduler).__name__, **config},
            "accelerator": content_digest([self.accelerator]) if self.accelerator else None,
            "safety_checker": tensor_digest(checker.state_dict()) if checker is not None else None,
        }


def load_generator(
    name: str,
    *,
    revision: str = "",
    variant: str = "",
    scheduler: Sampler = "dpm",
    lcm_lora: str = "",
    lcm_lora_revision: str = "",
    safety_checker: bool = False,
    precision: str = "fp32",
    int8: bool = False,
    device: str | torch.device = "cpu",
) -> Generator:
    """Load a text-to-image pipeline of a known family: Stable Diffusion 1, 2, XL, 3, FLUX.1 or Sana.

    Args:
        name: `mini` (the embedded default), a hub name ("stable-diffusion-v1-5/stable-diffusion-v1-5") or a local
            folder in diffusers' layout. Weights are read from safetensors only, and code beside them is not run.
        revision: commit on the hub; empty is the newest.
        variant: of the weight files ("fp16"); empty is the plain ones.
        scheduler: dpm (DPM-Solver++), ddim, euler, lcm, or own, the one that the pipeline's folder names.
        lcm_lora: adapter of a few-step model: a hub name, a folder or a safetensors file; empty is none.
        lcm_lora_revision: commit of it.
        safety_checker: use the one that comes with the pipeline.
        precision: fp32, fp16 or bf16.
        int8: 8-bit weights, see `int8.quantize`; the fingerprint is theirs.
        device: of the models.

    Raises:
        UserError: it cannot be loaded; the message gives the reason.
    """
    if precision not in DTYPES:
        raise unknown("precision", precision, DTYPES)
    if scheduler not in get_args(Sampler):
        raise unknown("scheduler", scheduler, get_args(Sampler))
    announce_generator(name, revision=revision, variant=variant, safety_checker=safety_checker, lcm_lora=lcm_lora)
    if name == "mini":
        from air_plugin import mini

        pipeline = mini.load_pipeline(DTYPES[precision])
    else:
        pipeline = _load_pipeline(name, revision, variant, safety_checker, DTYPES[precision])
    if safety_checker and getattr(pipeline, "safety_checker", None) is None:
        raise UserError(f"AIR.SAFETY_CHECKER is True, but generator '{name}' comes without one")
    _require_what_it_takes(pipeline, name, scheduler, lcm_lora)
    if scheduler != "own":
        pipeline.scheduler = _make_scheduler(SCHEDULERS[scheduler], pipeline.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    fingerprint = _freeze(pipeline, int8=int8)
    family_of(pipeline).release(pipeline)
    pipeline.to(device)
    accelerator = _find_adapter(lcm_lora, lcm_lora_revision) if lcm_lora else None
    if accelerator:  # a bad file is an error now, not after hours of training
        try:
            attach_accelerator(pipeline, accelerator)
        finally:
            pipeline.unet.unload_lora()
    return Generator(pipeline, fingerprint, accelerator)


def _load_pipeline(name: str, revision: str, variant: str, safety_checker: bool, dtype: torch.dtype) -> Any:
    import diffusers
    from safetensors import SafetensorError

    name = os.path.expanduser(name)
    local = Path(name).is_dir()
    if not local:
        _require_hub_name(name)
    where = {"revision": revision or None, "local_files_only": is_offline()}
    options: dict[str, Any] = {"dtype" if _takes_dtype(diffusers.__version__) else "torch_dtype": dtype}
    try:
        with _quiet_loading():
            kind = _kind_of(name, diffusers.DiffusionPipeline.load_config(name, **where))
            options |= family_of(kind).load_options(kind, safety_checker=safety_checker)
            return getattr(diffusers, kind).from_pretrained(
                name, use_safetensors=True, variant=variant or None, **where, **options
            )
    except Exception as error:
        faults = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError)
        if isinstance(error, UserError) or not (isinstance(error, faults) or is_unreachable(error)):
            raise
        refused = None if local else refusal(error, name)
        if not local and (is_offline() or (is_unreachable(error) and not refused)):
            at = f" --revision {revision}" if revision else ""
            why = "the network is not to be used" if is_offline() else "the network does not answer"
            raise UserError(
                f"generator '{name}' is not whole on this disk and {why}; "
                f"fetch it elsewhere with 'hf download {name}{at}', or give a folder as AIR.GENERATOR"
            ) from error
        at = f" at AIR.REVISION {revision}" if revision and not local else ""
        raise UserError(f"generator '{name}'{at} cannot be loaded: {refused or first_line(error)}") from error


def _require_hub_name(name: str) -> None:
    """Raise a UserError where a name that is no folder cannot be one of the hub's either."""
    if Path(name).exists():
        raise UserError(f"AIR.GENERATOR {name} is a file; give a folder in diffusers' layout (model_index.json)")
    if re.fullmatch(HUB_NAME, name):
        return
    if "/" in name or "\\" in name:
        raise UserError(f"AIR.GENERATOR names the folder {name}, which does not exist")
    raise UserError(f"AIR.GENERATOR is '{name}'; it must be mini, a hub name OWNER/MODEL, or a local folder")


def _takes_dtype(version: str) -> bool:
    """Whether this version of diffusers takes `dtype`; older ones take `torch_dtype`."""
    return tuple(int(part) for part in version.split(".")[:2]) >= (0, 40)


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Show progress bars of diffusers and transformers on a terminal only, and no warning of the hub's library."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    shown = [library for library in (of_diffusers, of_transformers) if library.is_progress_bar_enabled()]
    if sys.stderr.isatty():
        shown = []
    for library in shown:
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The `local_dir_use_symlinks` argument is deprecated")
            yield
    finally:
        for library in shown:
            library.enable_progress_bar()


def _kind_of(name: str, index: dict[str, Any]) -> str:
    """The class that model_index.json names; a pipeline that needs other code is refused."""
    kind = index.get("_class_name")
    if kind not in PIPELINES:
        raise UserError(f"generator '{name}' is a {kind}; supported are {', '.join(PIPELINES)}")
    for part, source in index.items():
        library = source[0] if isinstance(source, (list, tuple)) and source else None
        if library is not None and library not in LIBRARIES:
            raise UserError(f"generator '{name}': its {part} needs code of its own ('{library}'), which is not run")
    return str(kind)


def _freeze(pipeline: Any, *, int8: bool) -> str:
    """Make the weights constants, in 8 bits where `int8`; returns their fingerprint."""
    family = family_of(pipeline)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    models = [getattr(pipeline, name, None) for name in (family.part, *family.encoders)]
    for model in models if int8 else ():
        if model is not None:
            quantize(model)
    return _fingerprint(pipeline)


def _require_what_it_takes(pipeline: Any, name: str, scheduler: str, lcm_lora: str) -> None:
    """Raise a UserError where the scheduler or a few-step adapter is not for this family."""
    family, kind = family_of(pipeline), type(pipeline).__name__
    if scheduler not in family.samplers:
        known = " or ".join(family.samplers)
        raise UserError(f"AIR.SCHEDULER is {scheduler}, but generator '{name}' is a {kind}, which needs {known}")
    if lcm_lora and family.part != "unet":
        raise UserError(f"AIR.LCM_LORA is for generators with a U-Net, but generator '{name}' is a {kind}")


def _make_scheduler(kind: str, scheduler: Any) -> Any:
    """A scheduler of class `kind` with the noise, the kind of prediction and the spacing of `scheduler`."""
    import diffusers

    scheduler_class = getattr(diffusers, kind)
    return scheduler if type(scheduler) is scheduler_class else scheduler_class.from_config(scheduler.config)


def _find_adapter(name: str, revision: str) -> Path:
    """The file of AIR.LCM_LORA: a file, in a folder, or from the hub."""
    path = Path(name) / WEIGHTS if Path(name).is_dir() else Path(name)
    if not path.is_file() and re.fullmatch(HUB_NAME, name) and path.suffix != ".safetensors":
        from huggingface_hub import hf_hub_download

        try:
            path = Path(hf_hub_download(name, WEIGHTS, revision=revision or None, local_files_only=is_offline()))
        except Exception as error:
            unreachable = not is_offline() and is_unreachable(error)
            if not (unreachable or isinstance(error, (OSError, ValueError))):
                raise
            silent = "the network does not answer" if unreachable else first_line(error)
            why = refusal(error, name) or silent
            raise UserError(f"AIR.LCM_LORA '{name}' cannot be fetched: {why}") from error
    if path.suffix != ".safetensors" or not path.is_file():
        raise UserError(f"AIR.LCM_LORA is '{name}'; give a hub name, a .safetensors file or a folder with {WEIGHTS}")
    return path


def attach_accelerator(pipeline: Any, path: Path) -> None:
    """Attach the adapter of a few-step model to the U-Net, under the name "accelerator".

    Raises:
        UserError: the file is no adapter of this U-Net. diffusers ignores unknown names, so the layers are counted.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
        if not all(name.startswith(("lora_unet_", "unet.")) for name in names):
            raise ValueError("it has weights for more than the U-Net")
        state, alphas = pipeline.lora_state_dict(
            str(path.parent), weight_name=path.name, unet_config=pipeline.unet.config
        )
        with warnings.catch_warnings():  # the adapter of the images is attached already, on purpose
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            pipeline.load_lora_into_unet(state, network_alphas=alphas, unet=pipeline.unet, adapter_name=ACCELERATOR)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(f"AIR.LCM_LORA {path} is no adapter of this generator: {first_line(error)}") from error
    expected = sum(bool(re.search(r"lora(_|\.)(down|A)(\.\w+)?\.weight$", name)) for name in names)
    found = sum(ACCELERATOR in getattr(layer, "lora_A", {}) for layer in pipeline.unet.modules())
    if not expected or found != expected:
        raise UserError(f"AIR.LCM_LORA {path} is no adapter of this generator: {found} of its {expected} layers fit")


def require_size(pipeline: Any, size: int) -> None:
    """Raise a UserError where `size` is no multiple of the pixels of a latent or token."""
    factor = family_of(pipeline).multiple_of(pipeline)
    if size % factor:
        near = max(factor, round(size / factor) * factor)
        raise UserError(f"AIR.SIZE is {size}; this generator needs a multiple of {factor}, for instance {near}")


def _fingerprint(pipeline: Any) -> str:
    family = family_of(pipeline)
    parts = {family.part: denoiser_of(pipeline), "vae": pipeline.vae}
    for number, name in enumerate(family.encoders, start=1):
        if (encoder := getattr(pipeline, name, None)) is not None:
            parts["text" if number == 1 else f"text_{number}"] = encoder
    state = {f"{part}.{name}": value for part, m in parts.items() for name, value in m.state_dict().items()}
    return tensor_digest(state)


@torch.no_grad()
def encode_prompts(pipeline: Any, prompts: list[str]) -> Conditioning:
    """The text inputs of the denoiser for T prompts.

    Raises:
        UserError: a prompt is longer than a text tower.
    """
    require_fit(pipeline, prompts)
    return family_of(pipeline).encode(pipeline, prompts)
