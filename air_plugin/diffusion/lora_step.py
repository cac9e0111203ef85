"""A step of LoRA training: its batch, its loss, the adapter's weights and their optimiser.

On a CPU the layers use fp32 weights under autocast. On a GPU the whole step is a CUDA graph, and where the generator is
in bf16 the adapter computes in bf16, too: the optimiser keeps fp32 master weights, and nothing is cast in the layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from air_plugin.diffusion.family import Conditioning
from air_plugin.diffusion.flow import sample_levels
from air_plugin.utils.cuda_graph import Graph, GraphedStep
from air_plugin.utils.errors import UserError
from air_plugin.utils.seeding import stable_seed

Loss = Callable[..., Tensor]  # as `denoising_loss`
FIELDS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's state of a parameter


def denoising_loss(
    unet: Any,
    scheduler: Any,
    latents: Tensor,
    *,
    states: Tensor,
    noise: Tensor,
    steps: Tensor,
    added: dict[str, Tensor] | None = None,
) -> Tensor:
    """The denoising loss of a latent diffusion model: mean squared error of the predicted noise or velocity.

        x_t = sqrt(a_t) x + sqrt(1 - a_t) e,   loss = mean (u(x_t, t, text) - y)^2
        y = e (epsilon: Ho et al. 2020, eq. 14),   y = sqrt(a_t) e - sqrt(1 - a_t) x (v: Salimans and Ho 2022)

    Args:
        unet: the model.
        scheduler: with add_noise and get_velocity, as DDPMScheduler.
        latents: (B, c, h, w) x, scaled.
        states: (B, L, W) of the text encoder.
        noise: (B, c, h, w) e, standard normal.
        steps: (B,) time steps t.
        added: further inputs of SDXL's U-Net, see `Conditioning.added`.

    Raises:
        UserError: the model predicts something else.
    """
    noisy = scheduler.add_noise(latents, noise, steps)
    kind = scheduler.config.prediction_type
    if kind == "v_prediction":
        target = scheduler.get_velocity(latents, noise, steps)
    elif kind == "epsilon":
        target = noise
    else:
        raise UserError(f"the generator predicts '{kind}'; LoRA supports epsilon and v_prediction")
    if added is not None:
        added = {name: value.to(unet.dtype) if value.is_floating_point() else value for name, value in added.items()}
    predicted = unet(
        noisy.to(unet.dtype), steps, encoder_hidden_states=states.to(unet.dtype), added_cond_kwargs=added
    ).sample
    return F.mse_loss(predicted.float(), target.float())


@dataclass(frozen=True)
class Examples:
    """What is trained on, on the CPU.

    moments: (S, 2c, h, w) mean and log-variance of each image's latent.
    captions: (S,) index of each image's caption among the distinct ones.
    scaling: of the latents, the autoencoder's.
    noise_levels: number of time steps of the scheduler.
    offset: subtracted from latents before they are scaled, the autoencoder's.
    shift: of the noise levels of flow matching; None: uniform time steps of diffusion.
    """

    moments: Tensor
    captions: Tensor
    scaling: float
    noise_levels: int
    offset: float = 0.0
    shift: float | None = None

    def batch(self, size: int, *, seed: int, step: int) -> dict[str, Tensor]:
        """`size` random images with noise. The same for the same seed and step, in a resumed training, too.

        Returns:
            latents and noise (B, c, h, w), "steps" (B,), which are time steps or, for flow matching, noise levels in
            [0, 1], and "captions" (B,), indices of the distinct ones.
        """
        rng = torch.Generator().manual_seed(stable_seed("lora", seed, step))
        pick = torch.randint(len(self.moments), (size,), generator=rng)
        latents = sample_latents(self.moments[pick], self.scaling, rng)
        if self.offset:
            latents = latents - self.offset * self.scaling
        noise = torch.randn(latents.shape, generator=rng)
        if self.shift is None:
            steps = torch.randint(self.noise_levels, (size,), generator=rng)
        else:
            steps = sample_levels(size, self.shift, rng)
        return {"latents": latents, "noise": noise, "steps": steps, "captions": self.captions[pick]}


def sample_latents(moments: Tensor, scaling: float, rng: torch.Generator) -> Tensor:
    """(B, 2c, h, w) moments to (B, c, h, w) scaled latents, sampled from the posterior N(mean, variance)."""
    mean, log_variance = moments.chunk(2, dim=1)
    deviation = (0.5 * log_variance.clamp(-30, 20)).exp()
    return (mean + deviation * torch.randn(mean.shape, generator=rng)) * scaling


class AdapterWeights:
    """fp32 weights that the layers use as they are, and AdamW.

    Args:
        layers: the adapter's parameters, fp32, by name.
        lr: learning rate.
        fused: one kernel for all of AdamW, which can be part of a CUDA graph; for GPUs.
    """

    def __init__(self, layers: Mapping[str, torch.nn.Parameter], lr: float, *, fused: bool = False) -> None:
        self.layers = dict(layers)
        options: dict[str, Any] = {"fused": True, "capturable": self._device.type == "cuda"} if fused else {}
        self.optimizer = torch.optim.AdamW(self._trained(), lr=lr, **options)

    @property
    def _device(self) -> torch.device:
        return next(iter(self.layers.values())).device

    def _trained(self) -> list[torch.nn.Parameter]:
        """What the optimiser gets."""
        return list(self.layers.values())

    def update(self) -> None:
        """A step of the optimiser with the gradients of the layers."""
        self.optimizer.step()

    def state(self) -> dict[str, Tensor]:
        """Weights and the optimiser's state as fp32 tensors "FIELD.LAYER", the same names for every kind of weights."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.layers.items():
            tensors[f"parameter.{name}"] = parameter
            for field, value in self.optimizer.state[parameter].items():
                tensors[f"{field}.{name}"] = value
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned, of either kind of weights."""
        for name, parameter in self.layers.items():
            parameter.data.copy_(tensors[f"parameter.{name}"])
        self._load_optimizer([{field: tensors[f"{field}.{name}"] for field in FIELDS} for name in self.layers])

    def _load_optimizer(self, states: Sequence[dict[str, Tensor]]) -> None:
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": dict(enumerate(states)), "param_groups": groups})

    def finalize(self) -> None:
        """Put the fp32 weights into the layers, to be saved."""


class MasterWeights(AdapterWeights):
    """fp32 master weights in one tensor, which AdamW changes; the layers hold copies in the type of computation.

    Under autocast each layer casts its fp32 weights, and its gradient back; values and gradients are rounded to the
    same type here, but once for all layers.

    Args:
        layers: the adapter's parameters, fp32, by name; they become views of one tensor of type `dtype`.
        lr: learning rate.
        dtype: of the layers' computation.
    """

    def __init__(self, layers: Mapping[str, torch.nn.Parameter], lr: float, dtype: torch.dtype) -> None:
        self._master = torch.nn.Parameter(torch.cat([value.detach().flatten() for value in layers.values()]))
        self._computing = self._master.detach().to(dtype)
        super().__init__(layers, lr, fused=True)
        for parameter, part in zip(self.layers.values(), self._parts(self._computing), strict=True):
            parameter.data = part

    def _trained(self) -> list[torch.nn.Parameter]:
        return [self._master]

    def _parts(self, flat: Tensor) -> list[Tensor]:
        """Views of one tensor with the shapes of the layers' weights."""
        parts = flat.detach().split([value.numel() for value in self.layers.values()])
        return [part.view(value.shape) for part, value in zip(parts, self.layers.values(), strict=True)]

    @torch.no_grad()
    def update(self) -> None:
        gradients = [torch.zeros_like(value) if value.grad is None else value.grad for value in self.layers.values()]
        self._master.grad = torch.cat([gradient.flatten() for gradient in gradients]).float()
        self.optimizer.step()
        self._computing.copy_(self._master)

    def state(self) -> dict[str, Tensor]:
        state = self.optimizer.state[self._master]
        flat = {"parameter": self._master, "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
        tensors = {
            f"{field}.{name}": part
            for field, value in flat.items()
            for name, part in zip(self.layers, self._parts(value), strict=True)
        }
        return tensors | {f"step.{name}": state["step"].clone() for name in self.layers}

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        def flat(field: str) -> Tensor:
            return torch.cat([tensors[f"{field}.{name}"].flatten() for name in self.layers])

        self._master.copy_(flat("parameter"))
        self._computing.copy_(self._master)
        step = tensors[f"step.{next(iter(self.layers))}"]
        self._load_optimizer([{"step": step, "exp_avg": flat("exp_avg"), "exp_avg_sq": flat("exp_avg_sq")}])

    def finalize(self) -> None:
        for parameter, part in zip(self.layers.values(), self._parts(self._master), strict=True):
            parameter.grad = None  # of another type
            parameter.data = part


class LoraStep:
    """Trains the adapter of a denoiser step by step.

    Args:
        denoiser: with an adapter whose parameters alone are trained.
        scheduler: of the base model's training.
        layers: the adapter's parameters, fp32, by name.
        texts: the T distinct captions, encoded, on the device of the denoiser.
        lr: learning rate.
        size: side of the images in pixels.
        loss: of the base model; default: `denoising_loss`.
        added: further inputs of the denoiser, from the texts and the size.
        graphs: False: no CUDA graph.
        master: whether there are master weights; default: on a GPU where the denoiser is in bf16.
        graph: see `GraphedStep`.
    """

    def __init__(
        self,
        denoiser: Any,
        scheduler: Any,
        layers: Mapping[str, torch.nn.Parameter],
        texts: Conditioning,
        *,
        lr: float,
        size: int,
        loss: Loss | None = None,
        added: Callable[[Conditioning, int], dict[str, Tensor] | None] = Conditioning.added,
        graphs: bool = True,
        master: bool | None = None,
        graph: Graph | None = None,
    ) -> None:
        device = texts.states.device
        self._pinned = on_gpu = device.type == "cuda"
        if master is None:
            master = on_gpu and denoiser.dtype == torch.bfloat16
        fused = on_gpu or graph is not None
        self.weights = MasterWeights(layers, lr, denoiser.dtype) if master else AdapterWeights(layers, lr, fused=fused)
        step = partial(  # no method: a circle would keep the graph's memory alive
            _train_on,
            denoiser=denoiser,
            scheduler=scheduler,
            weights=self.weights,
            texts=texts,
            added=added(texts, size),
            autocast=denoiser.dtype != torch.float32 and not master,
            loss_of=loss,
        )
        self._run = GraphedStep(step, list(layers.values()), device=device, name="LoRA", enabled=graphs, graph=graph)

    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Train on a batch of `Examples`; returns its loss, on the device, without waiting for it."""
        if self._pinned:
            batch = {name: value.pin_memory() for name, value in batch.items()}
        return self._run(batch)["loss"]


def _train_on(
    batch: Mapping[str, Tensor],
    *,
    denoiser: Any,
    scheduler: Any,
    weights: AdapterWeights,
    texts: Conditioning,
    added: dict[str, Tensor] | None,
    autocast: bool,
    loss_of: Loss | None = None,
) -> dict[str, Tensor]:
    """Forward, backward and optimiser: what may be a CUDA graph. `texts` and `added` are of the distinct captions."""
    which = batch["captions"]
    with torch.autocast(which.device.type, dtype=denoiser.dtype, enabled=autocast):
        loss = (loss_of or denoising_loss)(
            denoiser,
            scheduler,
            batch["latents"],
            states=texts.states[which],
            noise=batch["noise"],
            steps=batch["steps"],
            added=None if added is None else {name: value[which] for name, value in added.items()},
        )
    loss.backward()
    weights.update()
    return {"loss": loss}


class Losses:
    """The loss of every step, as numbers. On a GPU they are read every `every` steps, so that nobody waits for them.

    Args:
        values: of the steps before an interruption.
        lr: for the message of an error.
        every: steps between two readings.
    """

    def __init__(self, values: Sequence[float], *, lr: float, every: int) -> None:
        self.values, self._lr, self._every = list(values), lr, every
        self._pending: list[Tensor] = []

    def add(self, loss: Tensor) -> None:
        """Add the loss of a step, a tensor without dimensions.

        Raises:
            UserError: a loss that was read is not finite.
        """
        self._pending.append(loss)
        if len(self._pending) >= self._every:
            self.read()

    def read(self) -> list[float]:
        """All losses so far; waits for the device.

        Raises:
            UserError: one is not finite.
        """
        if self._pending:
            self.values += torch.stack(self._pending).tolist()
            if not all(math.isfinite(value) for value in self.values[-len(self._pending) :]):
                raise UserError(f"LoRA: the loss is not finite; lower AIR.LORA.LR (now {self._lr})")
            self._pending.clear()
        return self.values
