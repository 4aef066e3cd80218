"""How the weight of a layer travels through operators: as (parts, format, [out, in]).

The one place that looks at what a layer is made of; slots ask nothing else.
"""

from __future__ import annotations

import torch
from torch import nn

from .errors import Error

DENSE = 0
DENSE_TRANSPOSED = 1


def is_conv1d(layer: nn.Module) -> bool:
    """Whether a layer is transformers' Conv1D, which stores Wᵀ [in, out]."""
    # By name along the class hierarchy: transformers may not be installed.
    return any(
        c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils"
        for c in type(layer).__mro__
    )


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer computes x Wᵀ + b in its own forward from a floating point matrix."""
    computes = is_conv1d(layer) or (
        isinstance(layer, nn.Linear)
        and type(layer).forward is nn.Linear.forward
        # Its weight is read by nn.MultiheadAttention, its forward is never called.
        and not isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear)
    )
    return computes and layer.weight.is_floating_point() and layer.weight.dim() == 2


def weight_parts(layer: nn.Module) -> tuple[list[torch.Tensor], int, list[int]]:
    """(parts, format, [out, in]) of a layer, as torch.ops.budwood.linear takes them."""
    weight = layer.weight
    if is_conv1d(layer):
        return [weight], DENSE_TRANSPOSED, [weight.shape[1], weight.shape[0]]
    if isinstance(layer, nn.Linear):
        return [weight], DENSE, [weight.shape[0], weight.shape[1]]
    raise Error(
        f"[weight_parts] a linear slot holds a torch.nn.Linear or a transformers Conv1D, found "
        f"{type(layer).__module__}.{type(layer).__qualname__}"
    )


def storage_of(layer: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device of a layer and dtype of the values its weight stands for."""
    return layer.weight.device, layer.weight.dtype


def is_called_plainly(layer: nn.Module) -> bool:
    """Whether calling a layer is nothing but its forward: no hooks, no replaced forward."""
    hooks = (
        layer._forward_hooks,
        layer._forward_pre_hooks,
        layer._backward_hooks,
        layer._backward_pre_hooks,
    )
    return not any(hooks) and "forward" not in layer.__dict__
