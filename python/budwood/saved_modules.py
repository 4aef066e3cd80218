"""`modules_to_save`: whole modules that are trained as copies beside the adapters."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .errors import Error
from .slots import Slot


class SavedModule(Slot):
    """A module with a trained full copy for each adapter; the original stays frozen.

    Parameter names are HF PEFT's: `original_module.*` and `modules_to_save.<adapter>.*`. A copy
    keeps the dtype of the original.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original_module = original
        self.modules_to_save = nn.ModuleDict()

    def adapter_names(self) -> list[str]:
        return list(self.modules_to_save)

    def adapter_parameters(self, name: str) -> Iterable[nn.Parameter]:
        return self.modules_to_save[name].parameters()

    def attach(self, name: str) -> None:
        """Adds a copy of the original module, not yet active."""
        if name in self.modules_to_save:
            raise Error(f"[attach] a copy for adapter {name!r} is already there")
        self.modules_to_save[name] = copy.deepcopy(self.original_module).requires_grad_(False)

    def set_adapter_weight(self, name: str, weight: float) -> None:
        """A module that is replaced whole has no half."""

    def detach(self, name: str) -> None:
        del self.modules_to_save[name]
        self.active_adapters = [other for other in self.active_adapters if other != name]

    def set_adapter(self, names: list[str], trainable: bool = True) -> None:
        self.check_one_of(names, "a module")
        super().set_adapter(names, trainable)

    def check_one_of(self, names: list[str], path: str) -> None:
        """Raises when more than one of the named adapters has a copy here."""
        wanted = [name for name in names if name in self.modules_to_save]
        if len(wanted) > 1:
            raise Error(
                f"[set_adapter] {path} is in modules_to_save of {wanted}, and one copy of a module "
                "can be active at a time"
            )

    def current(self) -> nn.Module:
        """The copy of the active adapter, or the original."""
        if self.adapters_enabled and self.active_adapters:
            return self.modules_to_save[self.active_adapters[0]]
        return self.original_module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.row_groups is not None and self.adapters_enabled:
            x, *others = args

            def compute(name: str, rows: torch.Tensor) -> torch.Tensor:
                own = name in self.modules_to_save
                module = self.modules_to_save[name] if own else self.original_module
                return module(rows, *others, **kwargs)

            return self.row_groups.apply(x, compute)
        return self.current()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # A model may read `head.weight` or call a method of the module that stands here.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("original_module", "modules_to_save"):
                raise
            return getattr(self.current(), name)
