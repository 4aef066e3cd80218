"""Which module classes have a fused forward.

A family registers one function per class name:

    @fuses("LlamaMLP")
    def mlp(self, plain, x): ...

`self` is the module, `plain` its own class's forward, bound, for whatever the fused one does not
cover; further arguments are those of the call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

_FUSED: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {}


def fuses(*class_names: str, needs: Sequence[str] = ()) -> Callable[..., Any]:
    """Registers a forward for classes of transformers that have the attributes `needs`."""

    def register(forward: Callable[..., Any]) -> Callable[..., Any]:
        for name in class_names:
            _FUSED[name] = (forward, tuple(needs))
        return forward

    return register


def fused_forward(module: nn.Module) -> Callable[..., Any] | None:
    """The fused forward of a module of transformers, or None."""
    cls = type(module)
    if not cls.__module__.startswith("transformers."):
        return None
    entry = _FUSED.get(cls.__name__)
    if entry is None or not all(hasattr(module, name) for name in entry[1]):
        return None
    return entry[0]


def known_classes() -> list[str]:
    return sorted(_FUSED)


class Forward:
    """Stands in a module's __dict__ as its forward; copies and pickles with the module."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module = module
        self.name = name
        functools.update_wrapper(self, type(module).forward, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        plain = functools.partial(type(self.module).forward, self.module)
        if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
            # A compiler fuses by itself; autocast is the plain forward's affair.
            return plain(*args, **kwargs)
        return _FUSED[self.name][0](self.module, plain, *args, **kwargs)


def is_fused(module: nn.Module) -> bool:
    return isinstance(module.__dict__.get("forward"), Forward)


def undisturbed(*modules: nn.Module) -> bool:
    """Whether calling these modules is nothing but their forward: then they need not be called."""
    return not any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
        for m in modules
    ) and all("forward" not in m.__dict__ or is_fused(m) for m in modules)
