"""Attaching adapters whose arithmetic is C++'s."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .. import _C
from ..config import PeftConfig
from ..errors import Error
from ..slots import EmbeddingSlot, LinearSlot
from .mirror import Mirror, mirror_of

_BLOCKS = {
    "BOTTLENECK",
    "PARALLEL_ADAPTER",
    "COMPACTER",
    "PREFIX_TUNING",
    "ADAPTION_PROMPT",
    "REFT",
}


def attach_method(
    model: nn.Module, config: PeftConfig, name: str, loading: bool
) -> tuple[list[dict[str, Any]], list[str]]:
    """Attaches an adapter, not yet active; returns its places and warnings.

    When the method refuses, the model is as it was. Random starts come from torch's own generator.
    """
    mirror = mirror_of(model)
    refresh(mirror)
    if config.peft_type in _BLOCKS and mirror.family is None:
        raise Error(mirror.explain_no_place(config.peft_type))
    config = config.copy()
    config.modules_to_save = None  # whole modules are Python's
    trained = {id(p): p for p in model.parameters() if p.requires_grad}
    active = {path: list(slot.active_adapters) for path, slot in mirror.places.items()}
    seed = int(torch.randint(0, 2**62, ()))
    try:
        report = _C.inject(mirror.impl, config, name, seed, not loading)
    finally:
        # C++ trains what it has just attached and nothing else; here the caller decides.
        for parameter in trained.values():
            parameter.requires_grad_(True)
    for place in report["places"]:
        slot = mirror.place(place["path"])
        if isinstance(slot, (LinearSlot, EmbeddingSlot)):
            slot.attach_method(name)
        else:
            slot.attach(name)
        for parameter in slot.adapter_parameters(name):
            parameter.requires_grad_(False)
    for path, slot in mirror.places.items():
        names = [n for n in active.get(path, []) if n in slot.adapters]
        slot.slot.set_active(names)
    return report["places"], list(report["warnings"])


def refresh(mirror: Mirror) -> None:
    """Shows C++ the weights as the model has them now."""
    for slot in mirror.places.values():
        if isinstance(slot, LinearSlot):
            slot.refresh_base()


def is_method_adapter(model: nn.Module, name: str) -> bool:
    """Whether an adapter is one of those in C++."""
    mirror = mirror_of(model, make=False)
    return mirror is not None and any(name in s.adapters for s in mirror.places.values())


def method_tensors(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """The tensors of an adapter by the key they have in a file."""
    return {k: t.detach() for k, t in _C.adapter_tensors(mirror_of(model).impl, name)}


def set_method_tensors(model: nn.Module, tensors: dict[str, torch.Tensor], name: str) -> None:
    """Copies tensors of a file into an attached adapter."""
    impl = mirror_of(model).impl
    found = list(tensors.items())
    _fill(model, name, lambda: _C.set_adapter_tensors(impl, found, "the file", name))


def read_adapterhub(model: nn.Module, folder: str, name: str) -> None:
    """The same from a folder of AdapterHub's."""
    impl = mirror_of(model).impl
    _fill(model, name, lambda: _C.read_adapterhub(impl, folder, name))


def _fill(model: nn.Module, name: str, read: Callable[[], None]) -> None:
    slots = [s for s in mirror_of(model).places.values() if name in s.adapters]
    trainable = any(p.requires_grad for s in slots for p in s.adapters[name].trained())
    read()
    # What is trained may differ now: without its encoder a table is trained itself.
    for slot in slots:
        slot.adapters[name].requires_grad_(False)
        for parameter in slot.adapters[name].trained():
            parameter.requires_grad_(trainable)


def method_config(model: nn.Module, name: str) -> PeftConfig:
    """The configuration of an adapter as it is to be saved."""
    return _C.adapter_config(mirror_of(model).impl, name)
