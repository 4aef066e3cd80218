"""MeZO: training with forward passes only."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from typing import Any

import torch

from .. import _C
from ..errors import Error
from .named import Parameters, named_parameters


class MeZO(torch.optim.Optimizer):
    """MeZO (arXiv 2305.17333): gradient descent from two losses, in the memory of inference.

        optimizer = budwood.optim.MeZO(model, lr=1e-6)
        for batch in batches:
            optimizer.step(lambda: model(**batch).loss)

    Each step moves the parameters along random directions that are a function of (seed, step,
    tensor, element), by how much the loss differs on the two sides. The closure is called twice
    without gradients and must be the same function both times: dropout is to be off. Parameters are
    float32; of a 4-bit base train an adapter. The run is `log`: a scalar for each step, from which
    `MeZO.replay` makes the result out of the start, bit for bit.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-6,
        *,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        named = named_parameters(params, "MeZO")
        super().__init__([p for _, p in named], {"lr": lr})
        self._impl = _C.Mezo(named, eps, weight_decay, seed)

    @property
    def log(self) -> Any:
        """What the run was so far; `log.save(path)` writes it."""
        return self._impl.log

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> float:
        """One step; returns the mean of the two losses."""
        if closure is None:
            raise Error("[MeZO] step takes a closure that returns the loss: there is no backward")

        def loss() -> float:
            before = torch.get_rng_state()
            value = float(closure())
            if not torch.equal(before, torch.get_rng_state()):
                raise Error(
                    "[MeZO] the closure draws random numbers, but two losses of the same function "
                    "are compared: set dropout to 0, or the model to eval()"
                )
            return value

        return self._impl.step(loss, float(self.param_groups[0]["lr"]))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self.param_groups:
            raise Error("[MeZO] all parameters are given at the beginning")
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        state = dict(self._impl.state())
        return {"state": state, "param_groups": super().state_dict()["param_groups"]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._impl.restore(list(state_dict["state"].items()))
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})

    @staticmethod
    def replay(params: Parameters, log: str | PathLike[str] | Any) -> None:
        """Makes of parameters as they were at the start of a run those at its end."""
        loaded = log if isinstance(log, _C.MezoLog) else _C.MezoLog.load(log)
        _C.mezo_replay(named_parameters(params, "MeZO.replay"), loaded)
