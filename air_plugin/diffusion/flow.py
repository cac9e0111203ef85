"""Flow matching, common to the transformer generators Stable Diffusion 3, FLUX.1 and Sana."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from air_plugin.diffusion.family import Conditioning, Family, Rows
from air_plugin.diffusion.text_encoders import encode_each, take_off

NOISE = (
    "num_train_timesteps",
    "shift",
    "use_dynamic_shifting",
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
    "time_shift_type",
)


def flow_loss(predict: Callable[[Tensor], Tensor], latents: Tensor, *, noise: Tensor, levels: Tensor) -> Tensor:
    """The loss of a rectified flow (Esser et al. 2024, equations 13 and 14): mean squared error of the velocity.

        z_s = (1 - s) x + s e,   loss = mean (u(z_s) - (e - x))^2

    Args:
        predict: u, from (B, c, h, w) noisy latents to predictions of the same shape.
        latents: (B, c, h, w) x, scaled.
        noise: (B, c, h, w) e, standard normal.
        levels: (B,) s, in [0, 1].
    """
    s = levels[:, None, None, None]
    predicted = predict((1 - s) * latents + s * noise)
    return F.mse_loss(predicted.float(), (noise - latents).float())


def sample_levels(size: int, shift: float, rng: torch.Generator) -> Tensor:
    """(B,) noise levels of flow matching, in [0, 1]: logit-normal and shifted (Esser et al. 2024, eq. 19 and 23).

    s = sigmoid(n), n ~ N(0, 1),   s' = shift s / (1 + (shift - 1) s)
    """
    levels = torch.randn(size, generator=rng).sigmoid()
    return shift * levels / (1 + (shift - 1) * levels)


class FlowFamily(Family):
    """See `Family`: what the transformers share. Text encoders are on the device only while they encode."""

    part = "transformer"
    samplers: tuple[str, ...] = ("own",)
    noise: tuple[str, ...] = NOISE
    keeps_text_keys = False

    def load_options(self, kind: str, *, safety_checker: bool) -> dict[str, Any]:
        return {}

    def release(self, pipeline: Any) -> None:
        take_off(pipeline, self.encoders)

    def multiple_of(self, pipeline: Any) -> int:
        """Pixels of a token: the transformer joins 2 x 2 latents."""
        return 2 * int(pipeline.vae_scale_factor)

    @abstractmethod
    def encode_one(self, pipeline: Any, text: str | None) -> Rows:
        """(1, ...) arguments of the pipeline for a text, None: guidance's empty prompt. Encoders are on the device."""

    @abstractmethod
    def velocity(
        self, model: Any, scheduler: Any, noisy: Tensor, *, states: Tensor, levels: Tensor, added: dict[str, Tensor]
    ) -> Tensor:
        """(B, c, h, w) predictions for noisy latents at (B,) noise levels in [0, 1]; latents and states in its type."""

    def encode(self, pipeline: Any, texts: list[str]) -> Conditioning:
        rows = encode_each(pipeline, texts, self.encoders, self.encode_one)
        return Conditioning(rows["prompt_embeds"], rows.get("pooled_prompt_embeds"), rows.get("prompt_attention_mask"))

    def encode_rows(self, pipeline: Any, texts: list[str], *, empty: bool) -> tuple[Rows, Rows]:
        rows = encode_each(pipeline, [*texts, None] if empty else texts, self.encoders, self.encode_one)
        if not empty:
            return rows, {}
        no_rows = {f"negative_{name}": value[-1:] for name, value in rows.items()}
        return {name: value[:-1] for name, value in rows.items()}, no_rows

    def training_scheduler(self, pipeline: Any) -> Any:
        return pipeline.scheduler

    def shift(self, pipeline: Any, size: int) -> float | None:
        """The scheduler's factor (Esser et al. 2024, equation 23); where it depends on the tokens, at `size` pixels."""
        config = pipeline.scheduler.config
        if not config.get("use_dynamic_shifting", False):
            return float(config.shift)
        tokens = (size // self.multiple_of(pipeline)) ** 2
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        mu = config.base_shift + slope * (tokens - config.base_image_seq_len)
        return float(math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu)

    def offset(self, pipeline: Any) -> float:
        return float(pipeline.vae.config.get("shift_factor") or 0.0)

    def added(self, texts: Conditioning, size: int) -> dict[str, Tensor] | None:
        assert texts.pooled is not None
        return {"pooled_projections": texts.pooled}

    def loss(
        self,
        model: Any,
        scheduler: Any,
        latents: Tensor,
        *,
        states: Tensor,
        noise: Tensor,
        steps: Tensor,
        added: dict[str, Tensor] | None,
    ) -> Tensor:
        """`flow_loss`; `steps` are noise levels."""
        assert added is not None
        of_text = states.to(model.dtype)

        def predict(noisy: Tensor) -> Tensor:
            return self.velocity(model, scheduler, noisy.to(model.dtype), states=of_text, levels=steps, added=added)

        return flow_loss(predict, latents, noise=noise, levels=steps)

    def save_adapter(self, pipeline: Any, folder: Any, layers: dict[str, torch.Tensor]) -> None:
        pipeline.save_lora_weights(folder, transformer_lora_layers=layers, safe_serialization=True)
