"""The switches over all slots of a model: what runs, merging, taking slots out again."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import nn

from .biases import TrainedBiases
from .errors import Error
from .saved_modules import SavedModule
from .slots import LinearSlot, Slot, WeightSlot

_BIASES = "_budwood_biases"


def slots(model: nn.Module) -> Iterator[tuple[str, Slot]]:
    """All slots of a model with their paths."""
    for path, module in model.named_modules():
        if isinstance(module, Slot):
            yield path, module


def linear_slots(model: nn.Module) -> Iterator[tuple[str, LinearSlot]]:
    """All linear slots of a model with their paths."""
    for path, slot in slots(model):
        if isinstance(slot, LinearSlot):
            yield path, slot


def weight_slots(model: nn.Module) -> Iterator[tuple[str, WeightSlot]]:
    """All slots that have a weight to merge into, with their paths."""
    for path, slot in slots(model):
        if isinstance(slot, WeightSlot):
            yield path, slot


def adapters_of(model: nn.Module) -> list[str]:
    """Names of all adapters attached to a model, in order of attachment."""
    names: dict[str, None] = {}
    for _, slot in slots(model):
        names.update(dict.fromkeys(slot.adapter_names()))
    return list(names)


def biases_of(model: nn.Module) -> TrainedBiases | None:
    """The base biases that an adapter of this model trains, if one does."""
    return model.__dict__.get(_BIASES)


def set_biases(model: nn.Module, biases: TrainedBiases | None) -> None:
    if biases is None:
        model.__dict__.pop(_BIASES, None)
    else:
        model.__dict__[_BIASES] = biases


def check_names(model: nn.Module, names: list[str], where: str) -> None:
    """Raises when one of the names is not the name of an attached adapter."""
    for name in names:
        if name not in adapters_of(model):
            raise Error(
                f"[{where}] no adapter named {name!r} is attached; there are {adapters_of(model)}"
            )


def set_adapter(model: nn.Module, names: list[str], trainable: bool = True) -> None:
    """Makes exactly these adapters active and, of all adapters, only them trainable."""
    check_names(model, names, "set_adapter")
    for path, slot in slots(model):
        if isinstance(slot, SavedModule):
            slot.check_one_of(names, path)
    for _, slot in slots(model):
        slot.set_adapter(names, trainable)
    biases = biases_of(model)
    if biases is not None:
        biases.set_active(model, biases.adapter in names, trainable)


def set_adapter_weight(model: nn.Module, name: str, weight: float) -> None:
    """Multiplies what an adapter changes at every place."""
    check_names(model, [name], "set_adapter_weight")
    if not math.isfinite(weight):
        raise Error(f"[set_adapter_weight] the weight of {name!r} is {weight}")
    for path, slot in weight_slots(model):
        if slot.is_merged(name):
            raise Error(f"[set_adapter_weight] {name!r} is merged at {path}: unmerge it first")
    for _, slot in slots(model):
        if name in slot.adapter_names():
            slot.set_adapter_weight(name, float(weight))


def set_composition(model: nn.Module, composition: str) -> None:
    """How several active adapters of a block act: "stack" or "parallel"."""
    if composition not in ("stack", "parallel"):
        raise Error(f"[set_adapter] composition is 'stack' or 'parallel', found {composition!r}")
    for _, slot in slots(model):
        place = slot.__dict__.get("slot")
        if place is not None:
            place.set_composition(composition)


def active_adapters(model: nn.Module) -> list[str]:
    """Names of the adapters that are active somewhere in a model."""
    active = {name for _, slot in slots(model) for name in slot.active_adapters}
    return [name for name in adapters_of(model) if name in active]


def adapters_enabled(model: nn.Module) -> bool:
    """Whether adapters run."""
    return all(slot.adapters_enabled for _, slot in slots(model))


def enable_adapters(model: nn.Module, enabled: bool) -> None:
    """Switches all adapters on or off; off is the bare base, bit for bit."""
    biases = biases_of(model)
    # A merged bias holds the trained one, so slots leave a merge first and enter it last.
    if enabled and biases is not None:
        biases.set_enabled(model, True)
    for _, slot in slots(model):
        slot.enable_adapters(enabled)
    if not enabled and biases is not None:
        biases.set_enabled(model, False)


def detach(model: nn.Module, name: str) -> None:
    """Removes an adapter from all slots; slots without adapters stay and compute the base."""
    check_names(model, [name], "delete_adapter")
    if any(slot.is_merged(name) for _, slot in weight_slots(model)):
        raise Error(f"[delete_adapter] adapter {name!r} is merged into the base: unmerge it first")
    biases = biases_of(model)
    if biases is not None and biases.adapter == name:
        biases.set_active(model, False, False)
        set_biases(model, None)
    for _, slot in slots(model):
        if name in slot.adapter_names():
            slot.detach(name)


def merge(model: nn.Module, names: list[str] | None = None) -> None:
    """Folds adapters, by default the active ones, into the base: in all slots or in none."""
    check_names(model, names or [], "merge")
    _require_mergeable(model, active_adapters(model) if names is None else names)
    if not adapters_enabled(model):
        raise Error("[merge] the adapters are disabled: enable them first")
    done: list[tuple[WeightSlot, list[str]]] = []
    for path, slot in weight_slots(model):
        before = list(slot.merged_adapters)
        try:
            slot.merge(names)
        except Error as error:
            for merged, names_before in done:
                merged.unmerge()
                merged.merge(names_before)
            raise Error(f"{error} (module {path})") from None
        done.append((slot, before))


def _require_mergeable(model: nn.Module, names: list[str]) -> None:
    for path, slot in slots(model):
        if isinstance(slot, (WeightSlot, SavedModule)):
            continue
        for name in names:
            if name in slot.adapter_names():
                kind = slot.adapters[name].impl.config.peft_type
                raise Error(
                    f"[merge] {name!r} is {kind} and cannot be merged: what it does at {path} is "
                    "no change of a weight"
                )


def unmerge(model: nn.Module) -> None:
    """Restores all base weights bit for bit."""
    for _, slot in weight_slots(model):
        slot.unmerge()


def remove_slots(model: nn.Module, keep_trained: bool) -> None:
    """Puts the layers that slots wrap back.

    With `keep_trained`, trained copies of modules and trained base biases stay in the model;
    without, the model is its base again. Base weights stay as they are, merged or not.
    """
    biases = biases_of(model)
    if biases is not None and not keep_trained:
        biases.set_active(model, False, False)
    for _, slot in list(slots(model)):
        if isinstance(slot, WeightSlot):
            replace(model, slot, slot.base_layer)
        elif isinstance(slot, SavedModule):
            replace(model, slot, slot.current() if keep_trained else slot.original_module)
    from .methods.mirror import mirror_of

    mirror = mirror_of(model, make=False)
    if mirror is not None:
        mirror.remove()
    set_biases(model, None)
    model.__dict__.pop("peft_config", None)


def replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts a module in every place where another one stands; a shared layer has several."""
    for parent in list(model.modules()):
        if parent is new:
            continue
        for name, child in parent._modules.items():
            if child is old:
                setattr(parent, name, new)
