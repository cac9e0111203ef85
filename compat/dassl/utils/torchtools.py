"""Checkpoints and parameters."""

from __future__ import annotations

import os
import os.path as osp
import pickle
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._left_out import refuse_names
from .tools import mkdir_if_missing

__getattr__ = refuse_names(
    __name__, "adjust_learning_rate", "init_network_weights", "open_all_layers", "open_specified_layers"
)


def save_checkpoint(
    state: dict[str, Any],
    save_dir: str,
    is_best: bool = False,
    remove_module_from_keys: bool = True,
    model_name: str = "",
) -> None:
    """Save a training state, and note the file's name in `<save_dir>/checkpoint`.

    Each file is written under a temporary name and then renamed, so that a run that is killed leaves whole
    files.

    Args:
        state: state_dict, epoch (how many are done), and what else is to be saved.
        save_dir: a model's directory.
        is_best: whether to save the same as `model-best.pth.tar`, too.
        remove_module_from_keys: whether to cut DataParallel's `module.` off the keys of state_dict.
        model_name: the file's name; `model.pth.tar-<epoch>` if empty.
    """
    mkdir_if_missing(save_dir)
    if remove_module_from_keys:
        state = {**state, "state_dict": _without_module(state["state_dict"])}
    model_name = model_name or f"model.pth.tar-{state['epoch']}"

    fpath = osp.join(save_dir, model_name)
    _write_atomically(fpath, lambda path: torch.save(state, path))
    print(f"Checkpoint saved to {fpath}")
    _write_atomically(osp.join(save_dir, "checkpoint"), lambda path: _write_line(path, model_name))

    if is_best:
        best_fpath = osp.join(save_dir, "model-best.pth.tar")
        _write_atomically(best_fpath, lambda path: torch.save(state, path))
        print(f'Best checkpoint saved to "{best_fpath}"')


def _without_module(state_dict: dict[str, Any]) -> dict[str, Any]:
    return {key.removeprefix("module."): value for key, value in state_dict.items()}


def _write_atomically(path: str, write: Callable[[str], Any]) -> None:
    temporary = Path(path + ".tmp")
    try:
        write(str(temporary))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # it is there only where something failed


def _write_line(path: str, line: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(line + "\n")


def load_checkpoint(fpath: str) -> dict[str, Any]:
    """Load a checkpoint that holds tensors and plain Python values; anything else is refused.

    Tensors come to the device they were on, or to the CPU where there is no CUDA.
    """
    if fpath is None:
        raise ValueError("load_checkpoint needs a file's path, not None")
    if not osp.isfile(fpath):
        raise FileNotFoundError(f'No checkpoint at "{fpath}"')
    map_location = None if torch.cuda.is_available() else "cpu"
    try:
        return torch.load(fpath, map_location=map_location, weights_only=True)
    except OSError:
        raise
    except pickle.UnpicklingError as error:
        reason = "it is not a checkpoint, or holds more than tensors and plain Python values"
        raise RuntimeError(f'Cannot load "{fpath}": {reason}') from error
    except Exception as error:  # torch.load raises many kinds, none of which names the file
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise RuntimeError(f'Cannot load "{fpath}" (damaged or cut short?): {reason}') from error


def latest_checkpoint(fdir: str) -> str:
    """Path of the file that `<fdir>/checkpoint` names."""
    pointer = osp.join(fdir, "checkpoint")
    with open(pointer, encoding="utf-8") as file:
        model_name = file.readline().strip()
    if not model_name:
        raise RuntimeError(f'"{pointer}" is empty; it should name a checkpoint beside it')
    return osp.join(fdir, model_name)


def resume_from_checkpoint(
    fdir: str, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, scheduler: Any = None
) -> int:
    """Load the latest checkpoint of a model's directory into the model, the optimizer and the scheduler.

    Returns:
        How many epochs were done.
    """
    fpath = latest_checkpoint(fdir)
    print(f'Loading checkpoint from "{fpath}"')
    checkpoint = load_checkpoint(fpath)
    model.load_state_dict(checkpoint["state_dict"])
    print("Loaded model weights")

    # The optimizer comes first: the scheduler then sets its learning rates.
    for name, part in (("optimizer", optimizer), ("scheduler", scheduler)):
        if part is not None and checkpoint.get(name) is not None:
            part.load_state_dict(checkpoint[name])
            print(f"Loaded {name}")

    print(f"Previous epoch: {checkpoint['epoch']}")
    return checkpoint["epoch"]


def count_num_param(model: nn.Module | None = None, params: Iterable[Any] | None = None) -> int:
    """Number of values in a module's parameters, or in `params`: tensors, or groups {"params": tensor}."""
    if model is not None:
        return sum(parameter.numel() for parameter in model.parameters())
    if params is not None:
        return sum((item["params"] if isinstance(item, dict) else item).numel() for item in params)
    raise ValueError("count_num_param needs a model or params")


def load_pretrained_weights(model: nn.Module, weight_path: str) -> None:
    """Load those weights of a file whose name and size match the model's; leave the others as they are."""
    checkpoint = load_checkpoint(weight_path)
    own = model.state_dict()
    given = _without_module(checkpoint.get("state_dict", checkpoint))
    matched = {key: value for key, value in given.items() if key in own and own[key].size() == value.size()}
    discarded = [key for key in given if key not in matched]

    if not matched:
        warnings.warn(f"Nothing in {weight_path} matches the model (check the names by hand)", stacklevel=2)
        return
    model.load_state_dict({**own, **matched})
    print(f"Loaded {len(matched)} of {len(given)} tensors from {weight_path}")
    if discarded:
        print(f"Not loaded, since the model has no such name or size: {discarded}")
