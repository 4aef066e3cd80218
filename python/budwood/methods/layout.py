"""What the methods have to know of a forward: where the tokens of each row lie.

A hook before the model's forward reads the mask and the cache; slots ask while it runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

_KEY = "_budwood_forward"


@dataclass
class Forward:
    """The rows of one forward of a model."""

    padding: list[int] = field(default_factory=list)  #: places before the first token of each row
    prompt: list[int] = field(default_factory=list)  #: tokens of each row
    past: int = 0  #: places that a cache holds already


def past_length(kwargs: dict[str, Any]) -> int:
    """Places that the cache of a call holds."""
    cache = kwargs.get("past_key_values")
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0


def see(model: nn.Module, mask: torch.Tensor | None, past: int) -> None:
    """Keeps what a call of the model says of its rows."""
    forward = Forward(past=past)
    if past == 0 and mask is not None and mask.dim() == 2 and not bool(mask.all()):
        there = mask.ne(0)
        forward.padding = there.int().argmax(1).tolist()
        forward.prompt = there.sum(1).tolist()
    model.__dict__[_KEY] = forward


def layout_of(model: nn.Module, hidden: torch.Tensor) -> dict[str, Any]:
    """The rows of hidden states [batch, t, d] or [tokens, d], as C++ takes them."""
    forward = model.__dict__.get(_KEY) or Forward()
    rows, length = hidden.shape[:2] if hidden.dim() == 3 else (1, hidden.shape[0])
    fits = len(forward.padding) == rows
    return {
        "cu": [length * i for i in range(rows + 1)],
        "padding": forward.padding if fits else [],
        "prompt": forward.prompt if fits else [],
        "tokens": forward.prompt if fits else [],
        "from_start": forward.past == 0,
    }
