"""Modules that are imported at their first use: what needs no torch does not wait for it.

What declares or checks options, draws data or writes the report imports them from here;
``tests/test_architecture.py`` keeps it so. Types are those of the modules themselves.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


class _Lazy:
    """Stands for a module: imports it when one of its names is read."""

    def __init__(self, module: str) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self._module), name)


if TYPE_CHECKING:
    import torch as torch
    import torch.distributed as dist
    from torchvision import io as torchvision_io
    from torchvision import tv_tensors as tv_tensors
    from torchvision.transforms.v2 import functional as image_functions

    from utils import loss as loss
else:
    torch, dist, loss = _Lazy("torch"), _Lazy("torch.distributed"), _Lazy("utils.loss")
    torchvision_io, tv_tensors = _Lazy("torchvision.io"), _Lazy("torchvision.tv_tensors")
    image_functions = _Lazy("torchvision.transforms.v2.functional")


def no_grad(function: F) -> F:
    """Decorator for functions without gradient: ``torch.no_grad()`` of the first call, not of the import."""

    @functools.wraps(function)
    def without_gradient(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return function(*args, **kwargs)

    return without_gradient  # type: ignore[return-value]
