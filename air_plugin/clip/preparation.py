"""What a preparation of images does, as JSON values: a part of the key of a feature table.

A `repr` is no key, since it may hold an address ("<function _convert_to_rgb at 0x7f...>"), which changes with every
process. Here an object is described by its type and attributes, and a function by its name.
"""

from __future__ import annotations

import enum
import functools
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping, Set
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor, nn

from air_plugin.utils.files import digest
from air_plugin.utils.tensors import tensor_digest

# What these packages define is described by its name. Other code may be changed under the same name by its author, who
# is the user, so the code itself is described, too.
LIBRARIES = {"torch", "torchvision", "open_clip", "dassl", "numpy", "PIL", *sys.stdlib_module_names} - {"__main__"}
MODULE_STATE = {"_parameters", "_buffers", "_modules"}
MODULE_INTERNALS = vars(nn.Module()).keys() - MODULE_STATE - {"training"}


def describe(step: Any) -> Any:
    """Describe a transform so that two transforms with one description prepare images in the same way.

    Args:
        step: an object, a function or a composition of them: of torchvision, open_clip, Dassl or a user.

    Returns:
        JSON values without addresses: the same in every process, and others where a type, a parameter, the order of the
        steps, or the code of a user's function or class is another one. Global variables that a function reads are not
        followed.

    Example:
        >>> describe(torchvision.transforms.Pad(2))
        {'type': 'torchvision.transforms.transforms.Pad', 'attributes': {'fill': 0, 'padding': 2, ...}}
    """
    return _describe(step, ())


def _describe(value: Any, parents: tuple[int, ...]) -> Any:
    if id(value) in parents:  # it holds itself
        return {"parent": len(parents) - parents.index(id(value))}
    inner = functools.partial(_describe, parents=(*parents, id(value)))
    if isinstance(value, enum.Enum):
        return {"type": _name(type(value)), "member": value.name}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Tensor):
        return {"tensor": tensor_digest({"": value})}
    if isinstance(value, (np.ndarray, np.generic, Image.Image)):
        array = np.asarray(value)
        return {"array": [str(array.dtype), list(array.shape), digest(array.tobytes())]}
    if isinstance(value, Mapping):
        return {"mapping": [[inner(key), inner(item)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return [inner(item) for item in value]
    if isinstance(value, Set):
        return {"set": sorted((inner(item) for item in value), key=str)}
    return _describe_code(value, inner)


def _describe_code(value: Any, inner: Callable[[Any], Any]) -> Any:
    if isinstance(value, functools.partial):
        return {"partial": inner(value.func), "arguments": inner(value.args), "keywords": inner(value.keywords)}
    if isinstance(value, MethodType):
        return {"method": inner(value.__func__), "of": inner(value.__self__)}
    if isinstance(value, FunctionType):
        return _describe_function(value, inner)
    if isinstance(value, CodeType):
        return {"code": value.co_code.hex(), "names": list(value.co_names), "constants": inner(value.co_consts)}
    if isinstance(value, type):
        return _describe_type(value, inner)
    return _describe_object(value, inner)


def _describe_function(function: FunctionType, inner: Callable[[Any], Any]) -> Any:
    if _is_of_library(function) and "<" not in function.__qualname__:  # neither a lambda nor local
        return _name(function)
    return {
        "function": _name(function),
        "code": inner(function.__code__),
        "defaults": inner([function.__defaults__, function.__kwdefaults__]),
        "bound": inner(inspect.getclosurevars(function).nonlocals),
    }


def _describe_type(kind: type, inner: Callable[[Any], Any]) -> Any:
    if _is_of_library(kind):
        return _name(kind)
    members = {}
    for name, member in vars(kind).items():
        member = getattr(member, "__func__", getattr(member, "fget", member))  # of class methods and properties
        if isinstance(member, FunctionType) or not (name.startswith("__") or inspect.isdatadescriptor(member)):
            members[name] = inner(member)
    return {"class": _name(kind), "bases": inner(kind.__bases__), "members": members}


def _describe_object(value: Any, inner: Callable[[Any], Any]) -> Any:
    slots = [vars(kind).get("__slots__", ()) for kind in type(value).__mro__]
    names = [name for part in slots for name in ([part] if isinstance(part, str) else part)]
    attributes = {name: getattr(value, name) for name in names if not name.startswith("__") and hasattr(value, name)}
    attributes |= getattr(value, "__dict__", {})
    if isinstance(value, nn.Module):
        attributes = {
            name: item
            for name, item in attributes.items()
            if name not in MODULE_INTERNALS and (name not in MODULE_STATE or item)
        }
    if not attributes:  # a type that needs none, or one written in C
        return {"type": inner(type(value)), "text": re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))}
    return {"type": inner(type(value)), "attributes": {name: inner(attributes[name]) for name in sorted(attributes)}}


def _is_of_library(thing: Any) -> bool:
    return str(thing.__module__).partition(".")[0] in LIBRARIES


def _name(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"
