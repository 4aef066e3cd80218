"""AdamW in less memory: torch optimisers over Budwood's rules for one tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from .. import _C
from ..errors import Error
from .named import loss_of


class RuleOptimizer(torch.optim.Optimizer):
    """Updates each tensor by a rule of the C++ library; its state is what the rule remembers."""

    def rule(self, group: dict[str, Any]) -> Any:
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = loss_of(closure)
        for group in self.param_groups:
            rule = self.rule(group)
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.is_sparse:
                    raise Error(f"[{type(self).__name__}] gradients are dense, found a sparse one")
                state = self.state[p]
                if not state:
                    state.update(rule.fresh(p))
                state.update(rule.update(p, p.grad, dict(state), float(group["lr"])))
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but codes stay codes: torch would cast them to the parameters' dtype."""
        super().load_state_dict(state_dict)
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        own = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(saved, own, strict=True):
            if i not in state_dict["state"]:
                continue
            for name, value in state_dict["state"][i].items():
                device = "cpu" if name == "step" else p.device
                self.state[p][name] = value.to(device=device, copy=True)


class AdamW8bit(RuleOptimizer):
    """AdamW whose two moments take a byte each (arXiv 2110.02861), on the CPU.

    Codes of a dynamic map in blocks of `block_size` elements, each with its largest magnitude; 2.03
    bytes for each parameter instead of 8. Tensors of fewer than `min_8bit_size` elements keep fp32
    moments. Settings and their meaning are torch.optim.AdamW's; a positive second moment never
    becomes 0, so that elements with a rare gradient do not jump.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        block_size: int = 256,
        min_8bit_size: int = 4096,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults |= {"block_size": block_size, "min_8bit_size": min_8bit_size}
        super().__init__(params, defaults)
        for group in self.param_groups:
            self.rule(group)  # says now what does not hold

    def rule(self, group: dict[str, Any]) -> Any:
        return _C.UpdateRule(
            "adamw8bit",
            **adam_options(group),
            block_size=group["block_size"],
            min_8bit_size=group["min_8bit_size"],
        )


class GaLoreAdamW(RuleOptimizer):
    """AdamW on gradients projected to a low rank (arXiv 2403.03507).

    Groups with a "rank" hold the matrices that are projected; the rest is plain AdamW. `rank`,
    `update_proj_gap` (steps between two decompositions) and `scale` are options of such a group, as
    in the paper's code; `galore_groups(model)` makes groups of a model's projections.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )
        for group in self.param_groups:
            self.rule(group)

    def rule(self, group: dict[str, Any]) -> Any:
        if "rank" not in group:
            return _C.UpdateRule("adamw", **adam_options(group))
        return _C.UpdateRule(
            "galore",
            **adam_options(group),
            rank=group["rank"],
            refresh_every=group.get("update_proj_gap", 200),
            scale=group.get("scale", 0.25),
        )


def galore_groups(
    model: nn.Module, rank: int = 128, update_proj_gap: int = 200, scale: float = 0.25
) -> list[dict[str, Any]]:
    """Parameter groups for GaLoreAdamW: weights of nn.Linear in blocks are projected, all else that
    requires grad is not. A head and token tables, which are in no block, are left out of them."""
    projected, rest, seen = [], [], set()
    matrices = {
        id(module.weight)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(part.isdigit() for part in path.split("."))
    }
    for p in model.parameters():
        if not p.requires_grad or id(p) in seen:
            continue
        seen.add(id(p))
        (projected if id(p) in matrices and min(p.shape) >= rank else rest).append(p)
    if not projected:
        raise Error(f"[galore_groups] no trainable matrix in a block has {rank} rows and columns")
    options = {"rank": rank, "update_proj_gap": update_proj_gap, "scale": scale}
    return [{"params": projected, **options}] + ([{"params": rest}] if rest else [])


def adam_options(group: dict[str, Any]) -> dict[str, Any]:
    beta1, beta2 = group["betas"]
    return {
        "beta1": beta1,
        "beta2": beta2,
        "eps": group["eps"],
        "weight_decay": group["weight_decay"],
        "decay_vectors": True,
    }
