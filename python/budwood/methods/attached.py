"""Modules that hold adapters whose arithmetic is C++'s."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .. import _C
from ..errors import Error
from ..slots import Slot


class Attached(nn.Module):
    """One adapter at one place: its tensors as parameters, the same that C++ computes with."""

    def __init__(self, impl: _C.Adapter) -> None:
        super().__init__()
        self.__dict__["impl"] = impl
        for name, tensor in impl.named_parameters():
            tensor._is_param = True  # what torch asks of a Parameter; the tensor stays C++'s own
            self.register_parameter(name, tensor)
        for name, tensor in impl.named_buffers():
            self.register_buffer(name, tensor, persistent=False)

    def trained(self) -> list[nn.Parameter]:
        """The parameters that are trained while the adapter is active."""
        return self.impl.trained()

    def train(self, mode: bool = True) -> Attached:
        self.impl.train(mode)
        return super().train(mode)

    def __deepcopy__(self, memo: dict[int, Any]) -> Attached:
        raise Error(
            f"[deepcopy] a model with a {self.impl.config.peft_type} adapter cannot be copied in "
            "memory: save the adapter and load it onto a copy of the base"
        )

    def __reduce__(self) -> Any:
        raise Error(
            f"[pickle] a {self.impl.config.peft_type} adapter is not pickled: save it with "
            "save_pretrained"
        )

    def extra_repr(self) -> str:
        return self.impl.config.peft_type


class PlaceSlot(Slot):
    """What the places of blocks, attention and input have in common. `slot` is the C++ slot."""

    def __init__(self, slot: _C.Slot) -> None:
        super().__init__()
        self.__dict__["slot"] = slot
        self.adapters = nn.ModuleDict()
        self._hooks: list[Any] = []

    def attach(self, name: str) -> None:
        """Takes in an adapter that the C++ slot has."""
        self.adapters[name] = Attached(self.slot.adapter(name)).train(self.training)

    def adapter_names(self) -> list[str]:
        return list(self.adapters)

    def adapter_parameters(self, name: str) -> Iterable[nn.Parameter]:
        return self.adapters[name].trained()

    def set_adapter_weight(self, name: str, weight: float) -> None:
        self.adapters[name].impl.weight = weight

    def detach(self, name: str) -> None:
        self.slot.detach(name)
        del self.adapters[name]
        self.active_adapters = [other for other in self.active_adapters if other != name]

    def set_adapter(self, names: list[str], trainable: bool = True) -> None:
        super().set_adapter(names, trainable)
        self.slot.set_active(self.active_adapters)

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self.slot.set_adapters_enabled(enabled)

    def runs(self) -> bool:
        """Whether an adapter takes part in forward."""
        return self.adapters_enabled and bool(self.active_adapters)

    def remove(self) -> None:
        """Takes the hooks out again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def first_of(output: Any) -> torch.Tensor:
    """The hidden states in what a module returns."""
    return output[0] if isinstance(output, tuple) else output


def with_first(output: Any, hidden: torch.Tensor) -> Any:
    """The same with other hidden states."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
