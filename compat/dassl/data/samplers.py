"""Samplers by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.utils.data import RandomSampler, Sampler, SequentialSampler

from .._left_out import left_out, refuse_names

if TYPE_CHECKING:
    from yacs.config import CfgNode

__getattr__ = refuse_names(__name__, "RandomDomainSampler", "SeqDomainSampler", "RandomClassSampler")


def build_sampler(
    sampler_type: str,
    cfg: CfgNode | None = None,
    data_source: Any = None,
    batch_size: int = 32,
    n_domain: int = 0,
    n_ins: int = 16,
) -> Sampler[int]:
    """A RandomSampler or SequentialSampler; the other arguments concern samplers that are left out."""
    if sampler_type == "RandomSampler":
        return RandomSampler(data_source)
    if sampler_type == "SequentialSampler":
        return SequentialSampler(data_source)
    known = "RandomSampler or SequentialSampler"
    raise ValueError(f"The sampler must be {known}, not {sampler_type!r}; " + left_out("any other sampler"))
