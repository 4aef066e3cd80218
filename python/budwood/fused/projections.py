"""Linear layers that read the same input, in one operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import _C
from ..slots import LinearSlot
from ..weights import compute_dtype, is_called_plainly, is_linear, weight_parts

# What is read, with its formula for layers that cannot be computed together.
_READINGS = {
    "plain": lambda x: x,
    "rms_norm": torch.ops.budwood.rms_norm,
    "layer_norm": torch.ops.budwood.layer_norm,
    "swiglu": torch.ops.budwood.swiglu,
    "geglu": lambda gate, up: torch.ops.budwood.geglu(gate, up, "none"),
    "geglu_tanh": lambda gate, up: torch.ops.budwood.geglu(gate, up, "tanh"),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
_WITH_EPS = ("rms_norm", "layer_norm")


class Source:
    """What projections read: a function of tensors, computed again in the backward.

    reading: "plain" (x), "rms_norm" (x, weight), "layer_norm" (x, weight, bias), "swiglu", "geglu",
    "geglu_tanh" (gate, up), "gelu" or "gelu_tanh" (x).
    """

    def __init__(self, reading: str, *inputs: torch.Tensor, eps: float = 0.0) -> None:
        self.reading, self.inputs, self.eps = reading, inputs, eps

    def value(self) -> torch.Tensor:
        eps = (self.eps,) if self.reading in _WITH_EPS else ()
        return _READINGS[self.reading](*self.inputs, *eps)


def project(source: Source, layers: Sequence[nn.Module]) -> list[torch.Tensor]:
    """The results of linear layers (bare, or with adapters of budwood or HF PEFT) for one input."""
    dtype = source.inputs[0].dtype
    projections = [projection_of(layer, dtype) for layer in layers]
    if all(p is not None for p in projections):
        return _C.project(source.reading, list(source.inputs), source.eps, projections)
    x = source.value()
    return [layer(x) for layer in layers]


def projection_of(layer: nn.Module, dtype: torch.dtype) -> tuple[Any, ...] | None:
    """(parts, format, [out, in], bias, A, B, scaling) of a layer that is one frozen product with at
    most one LoRA term for inputs of that dtype; None for any other."""
    base, a, b, scaling = layer, None, None, 1.0
    if _has_lora(layer):
        names = _running(layer)
        if names is None or len(names) > 1 or not is_called_plainly(layer):
            return None
        base = layer.base_layer
        if names:
            (name,) = names
            a, b, scaling = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
            dropout = layer.lora_dropout[name]
            drops = isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0
            if drops or not _plain_factor(a) or not _plain_factor(b):
                return None
    if not is_linear(base) or not is_called_plainly(base):
        return None
    parts, form, shape = weight_parts(base)
    if any(part.requires_grad for part in parts) or compute_dtype(base, _Typed(dtype)) != dtype:
        return None
    bias = base.bias
    if b is not None and b.bias is not None:
        bias = b.bias * scaling if bias is None else bias + b.bias * scaling
    return (
        parts,
        form,
        shape,
        bias,
        None if a is None else a.weight,
        None if b is None else b.weight,
        scaling,
    )


class _Typed:
    """Stands for a tensor where only its dtype is asked for."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


def _has_lora(layer: nn.Module) -> bool:
    return isinstance(layer, LinearSlot) or _is_peft_lora(layer)


def _is_peft_lora(layer: nn.Module) -> bool:
    cls = type(layer)
    return cls.__module__.startswith("peft.tuners.lora.") and hasattr(layer, "lora_variant")


def _running(layer: nn.Module) -> list[str] | None:
    """Names of the adapters that take part in a forward; None where something special does."""
    if isinstance(layer, LinearSlot):
        if not layer.adapters_enabled:
            return []
        return [n for n in layer.active_adapters if n not in layer.merged_adapters]
    if layer.disable_adapters or layer.merged:
        return [] if layer.merged and not layer.disable_adapters else None
    names = [n for n in layer.active_adapters if n in layer.lora_A]
    special = any(n in layer.lora_variant for n in names)
    return None if special or not layer.cast_input_dtype_enabled else names


def _plain_factor(factor: nn.Module) -> bool:
    return type(factor) is nn.Linear and is_called_plainly(factor)
