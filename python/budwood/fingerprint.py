"""What an adapter remembers of the base it was trained on."""

from __future__ import annotations

import torch
from torch import nn

from . import _C
from .switches import weight_slots
from .weights import DENSE, weight_parts

KEY = "budwood.base"


def base_fingerprint(model: nn.Module, adapter_name: str) -> str:
    """Some numbers of each weight that an adapter changes, as JSON; "" when there is none to see.

    Sampled places depend on a module's path and size alone, so another program finds them again.
    Weights that are merged, sharded or on the meta device are left out.
    """
    weights = []
    for path, slot in weight_slots(model):
        if adapter_name not in slot.adapter_names() or slot.merged:
            continue
        layer = slot.base_layer
        if isinstance(layer, nn.Embedding):
            parts, form, shape = [layer.weight], DENSE, list(layer.weight.shape)
        elif hasattr(layer, "in_features") or layer.weight.dim() == 2:
            parts, form, shape = weight_parts(layer)
        else:  # a convolution
            continue
        plain = all(type(p.data) is torch.Tensor and not p.is_meta for p in parts)
        if plain:
            weights.append((path, [p.detach() for p in parts], form, *shape))
    return _C.base_fingerprint(weights) if weights else ""
