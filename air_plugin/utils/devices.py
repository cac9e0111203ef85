"""The device that models are loaded to."""

from __future__ import annotations

from air_plugin.utils.errors import UserError


def pick_device(name: str = "") -> str:
    """The device of that name ("cuda", "cuda:1", "cpu"); without a name a GPU where there is one, else the CPU.

    Raises:
        UserError: it cannot be used.
    """
    import torch

    if not name:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device '{name}' cannot be used: {str(error).splitlines()[0]}") from error
    return name
