"""Parameters with their names, which say what they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from ..errors import Error

Parameters = nn.Module | Iterable[tuple[str, torch.Tensor]] | Iterable[torch.Tensor]


def named_parameters(given: Parameters, who: str) -> list[tuple[str, torch.Tensor]]:
    """What requires grad, each tensor once: of a model, of (name, tensor) pairs or of tensors."""
    items = given.named_parameters() if isinstance(given, nn.Module) else given
    named, seen = [], set()
    for i, item in enumerate(items):
        name, p = item if isinstance(item, tuple) else (f"parameter {i}", item)
        if not isinstance(p, torch.Tensor):
            raise Error(f"[{who}] wanted a model or its parameters, found {type(p).__name__}")
        if p.requires_grad and id(p) not in seen:
            seen.add(id(p))
            named.append((name, p))
    if not named:
        raise Error(f"[{who}] no parameter requires grad")
    return named


def loss_of(closure: Callable[[], Any] | None) -> Any:
    """What a step's closure returns, with gradients on; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
