"""Base biases that an adapter trains (`bias="all"` or `"lora_only"`)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from .slots import LoraSlot, Slot


class TrainedBiases:
    """The biases of one adapter, and the values that the base had.

    The model reads the trained values while their adapter is active and enabled, and the base's own
    otherwise, so that a disabled adapter leaves the base bit for bit.
    """

    def __init__(self, model: nn.Module, adapter: str, kind: str) -> None:
        self.adapter = adapter
        self.paths = [path for path, _ in trainable_biases(model, kind)]
        self.aside = {path: self._parameter(model, path).data.clone() for path in self.paths}
        self.applied = True
        self.active = True
        self.enabled = True

    def values(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Trained values by path. Writing into them changes the adapter."""
        if self.applied:
            return {path: self._parameter(model, path).data for path in self.paths}
        return dict(self.aside)

    def set_active(self, model: nn.Module, active: bool, trainable: bool) -> None:
        self.active = active
        self._swap(model)
        for path in self.paths:
            self._parameter(model, path).requires_grad_(active and trainable)

    def set_enabled(self, model: nn.Module, enabled: bool) -> None:
        self.enabled = enabled
        self._swap(model)

    def _swap(self, model: nn.Module) -> None:
        wanted = self.active and self.enabled
        if wanted == self.applied:
            return
        for path, value in self.aside.items():
            parameter = self._parameter(model, path)
            self.aside[path] = parameter.data
            parameter.data = value.to(parameter.data)
        self.applied = wanted

    def _parameter(self, model: nn.Module, path: str) -> nn.Parameter:
        return model.get_parameter(path)


def trainable_biases(model: nn.Module, kind: str) -> Iterator[tuple[str, nn.Parameter]]:
    """(path, parameter) of the base biases that `bias` names: all, or those of targets."""
    held = {path + ".": slot for path, slot in model.named_modules() if isinstance(slot, Slot)}
    for path, parameter in model.named_parameters():
        owner = next((prefix for prefix in held if path.startswith(prefix)), None)
        if owner is None:
            if kind == "all" and path.split(".")[-1] == "bias":
                yield path, parameter
        elif isinstance(held[owner], LoraSlot) and path == owner + "base_layer.bias":
            yield path, parameter
