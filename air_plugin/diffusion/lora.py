"""LoRA: the generator is adapted to the unlabelled target images (AiR, section on adaptation)."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from air_plugin.config import LoraSettings
from air_plugin.diffusion.families import denoiser_of, family_of
from air_plugin.diffusion.family import Conditioning
from air_plugin.diffusion.lora_step import AdapterWeights, Examples, LoraStep, Losses
from air_plugin.diffusion.pipeline import ACCELERATOR, WEIGHTS, Generator, attach_accelerator, encode_prompts
from air_plugin.utils.digests import content_digest
from air_plugin.utils.errors import unknown
from air_plugin.utils.images import load_rgb
from air_plugin.utils.progress import Progress
from air_plugin.utils.seeding import stable_seed
from air_plugin.utils.store import Entry, Store
from air_plugin.utils.tensors import load_tensors, save_tensors

log = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.safetensors"
ADAPTER = "target"
READ_EVERY = 10  # steps on a GPU between two readings of the loss


def train_lora(
    generator: Generator,
    paths: Sequence[str | Path],
    captions: Sequence[str],
    *,
    settings: LoraSettings,
    size: int,
    seed: int,
    store: Store,
    graphs: bool = True,
) -> tuple[Path, str, bool]:
    """Train an adapter, or take it from the store; an interrupted training resumes from its last checkpoint.

    The objective is that of the base model: its noise and its kind of prediction. Few-step models are no exception: an
    LCM's adapter is not attached during training, and SD-Turbo is trained like an ordinary model.

    Every step has its own random generator, seeded by (seed, step), so a resumed run equals an undisturbed one: bit by
    bit on a CPU; on a GPU up to the order in which its kernels add, which is not the same from run to run either. An
    adapter's key does not tell the two devices apart, nor whether there were graphs.

    Args:
        generator: the pipeline; its weights are not changed, and the adapter is removed from it afterwards.
        paths: S images.
        captions: S texts.
        settings: rank, targets, steps and so on.
        size: side of the training images in pixels.
        seed: of the adapter's first weights, and of the order, noise and time steps.
        store: where the adapter is kept.
        graphs: on a GPU, capture the step as a CUDA graph (AIR.CUDA_GRAPHS).

    Returns:
        The folder (for pipe.load_lora_weights), its key, and whether it was in the store.
    """
    key = {
        "recipe": 1,
        "generator": generator.fingerprint,
        **generator.training,
        "images": content_digest(paths, cache=store.digests),
        "captions": list(captions),
        "rank": settings.rank,
        "targets": list(settings.targets),
        "steps": settings.steps,
        "lr": settings.lr,
        "batch": settings.batch,
        "size": size,
        "seed": seed,
    }
    with store.open("lora", key) as entry:
        cached = entry.complete
        if not cached:
            _train(generator.pipeline, paths, captions, entry, settings=settings, size=size, seed=seed, graphs=graphs)
        return entry.path, entry.key, cached


def _train(
    pipeline: Any,
    paths: Sequence[str | Path],
    captions: Sequence[str],
    entry: Entry,
    *,
    settings: LoraSettings,
    size: int,
    seed: int,
    graphs: bool,
) -> None:
    family, denoiser = family_of(pipeline), denoiser_of(pipeline)
    scheduler = family.training_scheduler(pipeline)
    moments = _encode_images(pipeline, paths, size)
    texts, which = _encode_captions(pipeline, captions)
    examples = Examples(
        moments,
        which,
        pipeline.vae.config.scaling_factor,
        scheduler.config.num_train_timesteps,
        offset=family.offset(pipeline),
        shift=family.shift(pipeline, size),
    )
    layers = add_adapter(denoiser, settings, seed)
    try:
        train_step = LoraStep(
            denoiser,
            scheduler,
            layers,
            texts,
            lr=settings.lr,
            size=size,
            loss=family.loss,
            added=family.added,
            graphs=graphs,
        )
        weights, checkpoint = train_step.weights, entry.path / CHECKPOINT
        every = 1 if pipeline.device.type == "cpu" else READ_EVERY
        losses = Losses(_load_checkpoint(checkpoint, weights), lr=settings.lr, every=every)
        start = len(losses.values)
        with Progress(settings.steps, title="LoRA", unit="steps") as progress:
            progress.skip(start)
            for step in range(start, settings.steps):
                losses.add(train_step(examples.batch(settings.batch, seed=seed, step=step)))
                progress.update(loss=float(np.mean(losses.values[-50:])) if losses.values else None)
                if (step + 1) % settings.checkpoint == 0 and step + 1 < settings.steps:
                    _save_checkpoint(checkpoint, weights, losses.read())
        curve = losses.read()
        weights.finalize()
        _save_weights(pipeline, entry.path)
        entry.finish([WEIGHTS, *_save_curve(entry.path, curve)])
    finally:
        denoiser.unload_lora()  # delete_adapters would leave empty layers in the model


def _save_curve(folder: Path, losses: list[float]) -> list[str]:
    """Write the loss curve as a tensor, and for TensorBoard where it is installed; returns the names of the files."""
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)  # of a run that was killed here
    save_tensors(folder / "losses.safetensors", {"loss": torch.tensor(losses)})
    if find_spec("tensorboard") is None:
        return ["losses.safetensors"]
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(folder / "tensorboard") as writer:
        for step, value in enumerate(losses):
            writer.add_scalar("lora/loss", value, step)
    curves = [path.relative_to(folder).as_posix() for path in (folder / "tensorboard").iterdir()]
    return ["losses.safetensors", *curves]


@torch.no_grad()
def _encode_images(pipeline: Any, paths: Sequence[str | Path], size: int) -> Tensor:
    """(S, 2c, h, w): mean and log-variance of each image's latent, encoded once."""
    from torchvision.transforms import v2

    transform = v2.Compose(
        [
            v2.Resize(size, interpolation=v2.InterpolationMode.BICUBIC),
            v2.CenterCrop(size),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    vae, moments = pipeline.vae, []
    dtype = vae.dtype
    if dtype == torch.float16 and vae.config.get("force_upcast"):  # SDXL's overflows in fp16
        vae.to(torch.float32)
    batch = max(1, min(32, 32 * 256**2 // size**2))  # the same number of pixels at every size
    try:
        for start in range(0, len(paths), batch):
            pixels = torch.stack([transform(load_rgb(path)) for path in paths[start : start + batch]])
            pixels = pixels.to(pipeline.device, vae.dtype)
            moments.append(family_of(pipeline).moments(pipeline, pixels).float().cpu())
    finally:
        if vae.dtype != dtype:
            vae.to(dtype)
    return torch.cat(moments)


def _encode_captions(pipeline: Any, captions: Sequence[str]) -> tuple[Conditioning, Tensor]:
    """The T distinct captions, encoded, and the (S,) index of each image's caption among them."""
    distinct = sorted(set(captions))
    parts = [encode_prompts(pipeline, distinct[i : i + 64]) for i in range(0, len(distinct), 64)]
    return Conditioning.joined(parts), torch.tensor([distinct.index(caption) for caption in captions])


# What stands before the name by which a layer is the same in every block: "to_q", "ff.net.2", "proj_in", "conv1".
_WITHIN_BLOCK = re.compile(r"^\.(.*(attn[12]|transformer_blocks\.\d+|attentions\.\d+|resnets\.\d+|samplers\.\d+)\.)?")


def add_adapter(denoiser: Any, settings: LoraSettings, seed: int) -> dict[str, torch.nn.Parameter]:
    """Attach low-rank adapters and return their parameters, which are fp32 at every precision of the base."""
    from peft import LoraConfig

    layers = [
        f".{name}" for name, layer in denoiser.named_modules() if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d))
    ]
    for target in settings.targets:  # peft reports an error only where no target exists
        if not any(name.endswith(f".{target}") for name in layers):
            raise unknown("layer in AIR.LORA.TARGETS", target, {_WITHIN_BLOCK.sub("", name) for name in layers})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stable_seed("lora-init", seed))
        denoiser.add_adapter(
            LoraConfig(
                r=settings.rank,
                lora_alpha=settings.rank,
                init_lora_weights="gaussian",
                target_modules=list(settings.targets),
            )
        )
    parameters = {name: value for name, value in denoiser.named_parameters() if value.requires_grad}
    for value in parameters.values():
        value.data = value.data.float()
    return parameters


def _save_weights(pipeline: Any, folder: Path) -> None:
    """Write the adapter in diffusers' format, under peft's names.

    diffusers' convert_state_dict_to_diffusers renames only the attention layers, which the loader then ignores.
    """
    from peft.utils import get_peft_model_state_dict

    family_of(pipeline).save_adapter(pipeline, folder, get_peft_model_state_dict(denoiser_of(pipeline)))


@contextmanager
def adapter_loaded(pipeline: Any, folder: Path | None, *, accelerator: Path | None = None) -> Iterator[None]:
    """Context in which the pipeline has the adapter in `folder` and the accelerator, both at full strength.

    Args:
        pipeline: without adapters, before and afterwards.
        folder: of an adapter from `train_lora`, or None.
        accelerator: file of a few-step model's adapter, or None.

    Example:
        >>> with adapter_loaded(generator.pipeline, folder, accelerator=generator.accelerator):
        ...     report = generate(generator.pipeline, jobs, images, batch_size=8)
    """
    if folder is None and accelerator is None:
        yield
        return
    part, denoiser = family_of(pipeline).part, denoiser_of(pipeline)
    try:
        if folder is not None:
            denoiser.load_lora_adapter(folder, weight_name=WEIGHTS, prefix=part, adapter_name=ADAPTER)
        if accelerator is not None:
            attach_accelerator(pipeline, accelerator)
        if folder is not None and accelerator is not None:
            denoiser.set_adapters([ADAPTER, ACCELERATOR], weights=[1.0, 1.0])
        yield
    finally:
        denoiser.unload_lora()


def _save_checkpoint(path: Path, weights: AdapterWeights, losses: list[float]) -> None:
    save_tensors(path, {"losses": torch.tensor(losses, dtype=torch.float64), **weights.state()})


def _load_checkpoint(path: Path, weights: AdapterWeights) -> list[float]:
    """Restore an interrupted training; returns the losses of its steps, none where there is no checkpoint."""
    tensors = load_tensors(path)
    if tensors is None:
        return []
    weights.load_state(tensors)
    losses = tensors["losses"].tolist()
    log.info("LoRA: resumes at step %d (%s)", len(losses), path)
    return losses
