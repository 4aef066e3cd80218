"""How the weight of a layer travels through operators: as (parts, format, [out, in]).

The one place that looks at what a layer is made of; slots ask nothing else.
"""

from __future__ import annotations

import functools

import torch
from torch import nn

from .errors import Error

DENSE = 0
DENSE_TRANSPOSED = 1
INT8_ROWS = 2
NF4 = 3
FP4 = 4


def is_conv1d(layer: nn.Module) -> bool:
    """Whether a layer is transformers' Conv1D, which stores Wᵀ [in, out]."""
    return _is_a(layer, "transformers.pytorch_utils", "Conv1D")


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer computes x Wᵀ + b in its own forward, from a plain or a packed matrix."""
    if is_packed(layer):
        return True
    computes = is_conv1d(layer) or (
        isinstance(layer, nn.Linear)
        and type(layer).forward is nn.Linear.forward
        # Its weight is read by nn.MultiheadAttention, its forward is never called.
        and not isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear)
    )
    return computes and layer.weight.is_floating_point() and layer.weight.dim() == 2


def is_packed(layer: nn.Module) -> bool:
    """Whether a layer's weight is codes: budwood's QuantizedLinear, or one of bitsandbytes."""
    return _is_ours(layer) or _is_bnb4(layer) or _is_bnb8(layer)


def weight_parts(layer: nn.Module) -> tuple[list[torch.Tensor], int, list[int]]:
    """(parts, format, [out, in]) of a layer, as torch.ops.budwood.linear takes them."""
    if _is_ours(layer):
        return layer.parts(), layer.format, [layer.out_features, layer.in_features]
    if _is_bnb4(layer):
        return _bnb4_parts(layer)
    if _is_bnb8(layer):
        return _bnb8_parts(layer)
    weight = layer.weight
    if is_conv1d(layer):
        return [weight], DENSE_TRANSPOSED, [weight.shape[1], weight.shape[0]]
    if isinstance(layer, nn.Linear):
        return [weight], DENSE, [weight.shape[0], weight.shape[1]]
    raise Error(
        f"[weight_parts] a linear slot holds a torch.nn.Linear, a transformers Conv1D or a packed "
        f"layer, found {type(layer).__module__}.{type(layer).__qualname__}"
    )


def storage_of(layer: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device of a layer and dtype in which its adapters start."""
    return layer.weight.device, torch.float32 if is_packed(layer) else layer.weight.dtype


def value_dtype(layer: nn.Module) -> torch.dtype:
    """dtype of the values that a layer's weight stands for."""
    if _is_ours(layer):
        return layer.dtype
    if _is_bnb4(layer):
        return layer.weight.quant_state.dtype
    return torch.float16 if _is_bnb8(layer) else layer.weight.dtype


def compute_dtype(layer: nn.Module, x: torch.Tensor) -> torch.dtype:
    """dtype in which a layer multiplies x: a packed one may have one of its own."""
    return getattr(layer, "compute_dtype", None) or x.dtype if is_packed(layer) else x.dtype


def _is_a(layer: nn.Module, module: str, name: str) -> bool:
    # By name along the class hierarchy: the package may not be installed.
    return any(c.__name__ == name and c.__module__ == module for c in type(layer).__mro__)


def _is_ours(layer: nn.Module) -> bool:
    return _is_a(layer, "budwood.quantized", "QuantizedLinear")


def _is_bnb4(layer: nn.Module) -> bool:
    return _is_a(layer, "bitsandbytes.nn.modules", "Linear4bit") and (
        getattr(layer.weight, "quant_state", None) is not None
    )


def _is_bnb8(layer: nn.Module) -> bool:
    return _is_a(layer, "bitsandbytes.nn.modules", "Linear8bitLt") and (
        layer.weight.dtype == torch.int8
    )


def _bnb4_parts(layer: nn.Module) -> tuple[list[torch.Tensor], int, list[int]]:
    state = layer.weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        # An inference forward of bitsandbytes repacks its codes for processors with AVX512_BF16.
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu_inverse(
            layer.weight.data, state
        )
        state = layer.weight.quant_state
    codes = layer.weight.data.contiguous().view(torch.uint8).reshape(-1)
    block_size = _one(state.blocksize)
    shape = [int(size) for size in state.shape]
    form = {"nf4": NF4, "fp4": FP4}.get(state.quant_type)
    if form is None:
        raise Error(
            f"[weight_parts] bitsandbytes' {state.quant_type!r} is not supported; supported: nf4, "
            "fp4"
        )
    if not state.nested:
        # After repacking and back the scales are bfloat16.
        return [codes, state.absmax.float(), block_size], form, shape
    nested = state.state2
    if nested.blocksize != 256:
        raise Error(f"[weight_parts] nested block size {nested.blocksize}, wanted 256")
    offset = state.offset.reshape(1).to(torch.float32)
    return [codes, state.absmax, block_size, nested.absmax, nested.code, offset], form, shape


def _bnb8_parts(layer: nn.Module) -> tuple[list[torch.Tensor], int, list[int]]:
    codes = layer.weight.data
    scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    if scales is None:
        raise Error("[weight_parts] the row scales of a Linear8bitLt are missing")
    return [codes, scales], INT8_ROWS, [codes.shape[0], codes.shape[1]]


@functools.cache
def _one(value: int) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.int64)


def is_called_plainly(layer: nn.Module) -> bool:
    """Whether calling a layer is nothing but its forward: no hooks, no replaced forward."""
    hooks = (
        layer._forward_hooks,
        layer._forward_pre_hooks,
        layer._backward_hooks,
        layer._backward_pre_hooks,
    )
    return not any(hooks) and "forward" not in layer.__dict__


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) numbers of a model, shared ones once, codes as what they stand for."""
    seen: set[int] = set()
    trainable = total = 0
    for module in model.modules():
        if is_packed(module) and id(module.weight) not in seen:
            shape = weight_parts(module)[2]
            total += shape[0] * shape[1]
            own = module._parameters | module._buffers
            seen.update(id(tensor) for name, tensor in own.items() if name != "bias")
    for parameter in model.parameters():
        if id(parameter) not in seen:
            total += parameter.numel()
            trainable += parameter.numel() if parameter.requires_grad else 0
    return trainable, total
