"""LoRA on a quantised base that begins with what quantising took away."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from os import PathLike
from typing import Any

import torch
from torch import nn

from . import _C
from .errors import Error
from .quantized import QuantizedLinear
from .switches import linear_slots
from .weights import is_packed, weight_parts

WHERE = "[start_from_original]"


@torch.no_grad()
def start_from_original(
    model: nn.Module,
    original: str | PathLike[str],
    *,
    adapter_name: str = "default",
    method: str = "loftq",
    iterations: int = 1,
    calibrate: Callable[[], Any] | None = None,
) -> list[dict[str, Any]]:
    """Sets A and B of a fresh LoRA adapter so that base and adapter are near the original weights.

    method
        - "loftq" (arXiv 2310.08659): s B A is the best approximation of W - Q. With `iterations`
          above 1, Q is quantised anew from W - s B A in turns, and the best is kept.
        - "qpissa" (arXiv 2404.02948): s B A is the best approximation of W, Q the rest, quantised.
        - "eora" (arXiv 2410.21271): as loftq, where the error is that of the outputs on what
          `calibrate()` sends through the model.

    `original` is the plain model: a folder (its matrices are read one at a time) or a GGUF file.
    Methods that make another Q need layers of `budwood.quantize_model`; save that base with the
    adapter, which is of use only with it. Returns for each place its path, rank, and the relative
    errors before and after.
    """
    slots = [(path, slot) for path, slot in linear_slots(model) if adapter_name in slot.lora_A]
    if not slots:
        raise Error(f"{WHERE} the model has no LoRA adapter {adapter_name!r} on a projection")
    for path, slot in slots:
        _check(path, slot, adapter_name, changes=method == "qpissa" or iterations > 1)
    covariances = _covariances(slots, calibrate) if method == "eora" else {}
    weights = _C.OriginalWeights(original)
    report = []
    for path, slot in slots:
        a, b = slot.lora_A[adapter_name].weight, slot.lora_B[adapter_name].weight
        parts, format, shape = weight_parts(slot.base_layer)
        name = path.removeprefix("base_model.model.")
        start = _C.residual_start(
            weights.matrix(name),
            [part.cpu() for part in parts],
            format,
            shape,
            a.shape[0],
            slot.scaling[adapter_name],
            method,
            iterations,
            covariances.get(path),
        )
        a.copy_(start["a"])
        b.copy_(start["b"])
        if start["parts"] is not None:
            slot.base_layer.replace_parts(start["parts"])
        keys = ("before", "after", "iteration")
        report.append({"path": name, "rank": a.shape[0], **{key: start[key] for key in keys}})
    return report


def _check(path: str, slot: Any, name: str, changes: bool) -> None:
    if not is_packed(slot.base_layer):
        raise Error(f"{WHERE} {path} is not quantised: nothing was taken from it")
    if slot.lora_B[name].weight.count_nonzero() != 0:
        raise Error(f"{WHERE} the adapter at {path} is not fresh: its B is not 0")
    if changes and not isinstance(slot.base_layer, QuantizedLinear):
        raise Error(
            f"{WHERE} {path} is a {type(slot.base_layer).__name__}, whose weight is not made anew: "
            "take loftq with one iteration, or quantise with budwood.quantize_model"
        )


def _covariances(
    slots: list[tuple[str, Any]], calibrate: Callable[[], Any] | None
) -> dict[str, torch.Tensor]:
    """The mean of x xᵀ [in, in] at each slot."""
    if calibrate is None:
        raise Error(f"{WHERE} eora looks at data: pass calibrate=, which runs the model on it")
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}

    def look(path: str, x: torch.Tensor) -> None:
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        product = rows.T @ rows
        sums[path] = sums[path] + product if path in sums else product
        counts[path] = counts.get(path, 0) + rows.shape[0]

    with ExitStack() as stack:
        for path, slot in slots:
            handle = slot.register_forward_pre_hook(lambda _, args, path=path: look(path, args[0]))
            stack.callback(handle.remove)
        calibrate()
    missing = [path for path, _ in slots if path not in sums]
    if missing:
        raise Error(f"{WHERE} calibrate() sent nothing through {missing[0]}")
    return {path: (total / counts[path]).cpu() for path, total in sums.items()}
