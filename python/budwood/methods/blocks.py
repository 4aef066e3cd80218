"""Adapters at the output of sub-layers: hooks that give h to the C++ slot and take the new h."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .. import _C
from .attached import PlaceSlot, first_of, with_first
from .families import Site
from .layout import layout_of


class BlockPlace(PlaceSlot):
    """The output of one sub-layer of a block."""

    def __init__(self, slot: _C.BlockSlot, model: nn.Module, block: nn.Module, site: Site) -> None:
        super().__init__(slot)
        self.__dict__.update(owner=model, site=site, stream=None, inside=False)
        norm = block.get_submodule(site.norm) if site.norm else None
        self.__dict__["norm"] = norm
        watched = block.get_submodule(site.stream)
        self._hooks = [
            watched.register_forward_pre_hook(self._see_stream, with_kwargs=True),
            block.get_submodule(site.output).register_forward_hook(self._adapt),
        ]
        if site.part == "feed_forward":
            self._hooks.append(block.register_forward_hook(self._edit))

    def _see_stream(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.runs() and not self.inside:
            number = 1 if self.site.norm else 0
            self.__dict__["stream"] = (
                args[number] if len(args) > number else list(kwargs.values())[number - len(args)]
            )

    def _norm(self, x: torch.Tensor) -> torch.Tensor:
        # The norm is the block's own, and its hooks must not take this call for the block's.
        self.__dict__["inside"] = True
        try:
            return self.norm(x)
        finally:
            self.__dict__["inside"] = False

    def _adapt(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not self.runs():
            return None
        h = first_of(output)
        x = self.stream.view_as(h)
        norm = self._norm if self.norm is not None else None
        return with_first(output, self.slot.adapt(h, x, norm, layout_of(self.owner, h)))

    def _edit(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not self.runs():
            return None
        stream = first_of(output)
        return with_first(output, self.slot.edit(stream, layout_of(self.owner, stream)))
