"""LISA and BAdam: a few blocks of a model at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import _C
from .named import Parameters, loss_of, named_parameters


class BlockOptimizer(torch.optim.Optimizer):
    """AdamW on the blocks that are trained now; the others are frozen (requires_grad is False), so
    they have no gradients and no moments.

    Blocks are the parameters that share a path up to its first number, as "model.layers.3".
    """

    def __init__(
        self,
        params: Parameters,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        **schedule: Any,
    ) -> None:
        named = named_parameters(params, type(self).__name__)
        super().__init__([p for _, p in named], {"lr": lr})
        self._impl = _C.Optimizer(
            named, "adamw", beta1=betas[0], beta2=betas[1], eps=eps, weight_decay=weight_decay
        )
        self._schedule = _C.BlockSchedule(named, **schedule)
        self._steps = 0
        self._schedule.apply(self._impl, 0)

    @property
    def blocks(self) -> list[str]:
        """Paths of all blocks."""
        return self._schedule.blocks

    @property
    def active_blocks(self) -> list[str]:
        """Those that are trained in the next step."""
        return [self.blocks[i] for i in self._schedule.active(self._steps)]

    @property
    def never_trained(self) -> list[str]:
        """Parameters that no period trains."""
        return self._schedule.never_trained

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = loss_of(closure)
        self._impl.step(float(self.param_groups[0]["lr"]))
        self._steps += 1
        self._schedule.apply(self._impl, self._steps)
        return loss

    def finish(self) -> None:
        """Makes everything trainable again that was when this optimiser was made."""
        self._schedule.thaw()

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {name: tensor.clone() for name, tensor in self._impl.state()}
        return {
            "state": state,
            "steps": self._steps,
            "param_groups": super().state_dict()["param_groups"],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._impl.restore(list(state_dict["state"].items()))
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        self._steps = state_dict["steps"]
        self._schedule.apply(self._impl, self._steps)


class LISA(BlockOptimizer):
    """LISA (arXiv 2403.17919): `active` random blocks for `every` steps, then others; everything
    that is in no block (tables, head, final norm) is trained always."""

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        active: int = 2,
        every: int = 20,
        seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            kind="lisa",
            active=active,
            every=every,
            order="random",
            seed=seed,
        )


class BAdam(BlockOptimizer):
    """BAdam (arXiv 2404.02827): one block after the other, each for `every` steps of Adam from
    nothing; order "random" (every block once before one comes again), "ascending" or "descending".
    What is in no block, tables and the head, is not trained."""

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        every: int = 100,
        order: str = "random",
        seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            kind="badam",
            active=1,
            every=every,
            order=order,
            seed=seed,
        )
