"""LOMO and AdaLomo: the backward updates."""

from __future__ import annotations

from typing import Any

import torch

from .. import _C
from ..errors import Error
from .named import Parameters, named_parameters


class FusedOptimizer(torch.optim.Optimizer):
    """Updates each tensor during the backward, as soon as its gradient is known.

        optimizer = budwood.optim.Lomo(model, lr=1e-2, clip_grad_norm=1.0)
        for batch in batches:
            optimizer.backward(model(**batch).loss)

    There is no step to be called (it does nothing), and gradients are not accumulated: put all
    losses of a step into one. Schedules of the learning rate work as with any torch optimiser.
    """

    def __init__(
        self, params: Parameters, name: str, lr: float, clip: dict[str, Any], **options: Any
    ) -> None:
        named = named_parameters(params, name)
        super().__init__([p for _, p in named], {"lr": lr, **options})
        self._impl = _C.FusedBackward(
            named, name.lower(), **{k: float(v) for k, v in clip.items() if v}, **options
        )
        #: Norm of the gradients of the last backward, before clipping; 0 when nothing was clipped.
        self.grad_norm = 0.0
        #: Whether it changed nothing because fp16 gradients overflowed.
        self.skipped = False

    def backward(self, loss: torch.Tensor) -> None:
        """Differentiates a loss and updates everything that it depends on."""
        rate = float(self.param_groups[0]["lr"])
        self.grad_norm, self.skipped, _ = self._impl.backward(loss, rate)

    def step(self, closure: Any = None) -> None:
        """Nothing: the backward has updated."""
        if closure is not None:
            raise Error(f"[{type(self).__name__}] call backward(loss) instead of step(closure)")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self.param_groups:
            raise Error(f"[{type(self).__name__}] all parameters are given at the beginning")
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        state = {name: tensor.clone() for name, tensor in self._impl.state()}
        return {"state": state, "param_groups": super().state_dict()["param_groups"]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._impl.restore(list(state_dict["state"].items()))
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})


class Lomo(FusedOptimizer):
    """LOMO (arXiv 2306.09782): gradient descent with one gradient alive at a time, and no state.

    `clip_grad_norm` takes a backward over the same graph before, in which only the norm is
    measured; the result is that of torch.nn.utils.clip_grad_norm_ and SGD. fp16 losses are scaled
    by themselves.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-2,
        *,
        clip_grad_norm: float | None = None,
        clip_grad_value: float | None = None,
        weight_decay: float = 0.0,
    ) -> None:
        clip = {"clip_norm": clip_grad_norm, "clip_value": clip_grad_value}
        super().__init__(params, "Lomo", lr, clip, weight_decay=weight_decay)


class AdaLomo(FusedOptimizer):
    """AdaLomo (arXiv 2310.10195): LOMO with a second moment that is the product of the means of a
    matrix's rows and columns, and updates in proportion to the parameters' root mean square."""

    def __init__(
        self,
        params: Parameters,
        lr: float = 5e-4,
        *,
        clip_grad_value: float | None = None,
        weight_decay: float = 0.0,
        clip_threshold: float = 1.0,
        least_scale: float = 1e-3,
    ) -> None:
        super().__init__(
            params,
            "AdaLomo",
            lr,
            {"clip_value": clip_grad_value},
            weight_decay=weight_decay,
            clip_threshold=clip_threshold,
            least_scale=least_scale,
        )
