"""LoRA+ and LoRA-FA."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..errors import Error
from ..switches import linear_slots
from .named import loss_of


def lora_plus_groups(
    model: nn.Module,
    lr: float,
    ratio: float = 16.0,
    embedding_lr: float = 1e-6,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Groups of LoRA+ (arXiv 2402.12354) for any torch optimiser.

    A learns with `lr`; B and every one-dimensional tensor with `ratio` times that; the factors of
    token tables with `embedding_lr`. One-dimensional tensors do not decay. The groups hold every
    parameter that requires grad exactly once; with ratio 1 they are plain LoRA.

        optimizer = torch.optim.AdamW(budwood.optim.lora_plus_groups(model, lr=1e-4))
    """
    if not ratio > 0:
        raise Error(f"[lora_plus_groups] the ratio of the learning rates is above 0, found {ratio}")
    slow, fast, flat, tables = [], [], [], []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if "lora_embedding_" in name:
            tables.append(p)
        elif p.dim() == 1:
            flat.append(p)
        elif "lora_B" in name:
            fast.append(p)
        else:
            slow.append(p)
    groups = [
        {"params": slow, "lr": lr, "weight_decay": weight_decay},
        {"params": fast, "lr": lr * ratio, "weight_decay": weight_decay},
        {"params": flat, "lr": lr * ratio, "weight_decay": 0.0},
        {"params": tables, "lr": embedding_lr, "weight_decay": weight_decay},
    ]
    return [group for group in groups if group["params"]]


class LoraFA(torch.optim.AdamW):
    """AdamW of LoRA-FA (arXiv 2308.03303): A stays at its random start, B is trained.

    B's gradient G becomes G (A Aᵀ + 1e-8 I)⁻¹ / s², the step of B whose effect on the weight is
    nearest to full fine-tuning's. Since A is frozen, the inverse is computed once. Everything else
    that the model trains is updated as it is. The adapter and its file are LoRA's.

    Creating it takes A of every active LoRA adapter out of training.
    """

    def __init__(self, model: nn.Module, lr: float = 1e-3, **options: Any) -> None:
        self._inverses: dict[nn.Parameter, torch.Tensor] = {}
        for a, b, scaling in _factors(model):
            a.requires_grad_(False)
            with torch.no_grad():
                gram = a.double() @ a.double().T
                gram.diagonal().add_(1e-8)
                self._inverses[b] = (torch.linalg.inv(gram) / scaling**2).to(b.dtype)
        if not self._inverses:
            raise Error("[LoraFA] the model has no active LoRA adapter of a projection")
        super().__init__([p for p in model.parameters() if p.requires_grad], lr=lr, **options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = loss_of(closure)
        for b, inverse in self._inverses.items():
            if b.grad is not None:
                b.grad = b.grad @ inverse.to(b.device)
        super().step()
        return loss


def _factors(model: nn.Module) -> Iterator[tuple[nn.Parameter, nn.Parameter, float]]:
    """(A, B, s) of every active LoRA adapter."""
    for path, slot in linear_slots(model):
        for name in slot.active_adapters:
            if name in slot.lora_A:
                yield slot.lora_A[name].weight, slot.lora_B[name].weight, slot.scaling[name]
            elif name in slot.adapters and slot.adapters[name].impl.config.peft_type == "LORA":
                own = dict(slot.adapters[name].impl.named_parameters())
                config = slot.adapters[name].impl.config
                yield own["lora_A"], own["lora_B"], config.scaling(path)
