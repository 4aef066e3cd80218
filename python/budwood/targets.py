"""Which modules of a model a configuration targets. The rules are those of C++."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from . import _C
from .config import PeftConfig
from .saved_modules import SavedModule
from .slots import Slot, WeightSlot
from .weights import is_conv1d, is_linear


@dataclass
class Target:
    """A module that gets an adapter, with the values its patterns give it."""

    path: str
    r: int
    lora_alpha: float
    scaling: float


@dataclass
class Match:
    """What a configuration stands for in one model."""

    targets: list[Target]
    warnings: list[str]
    target_modules: set[str] | str | None  #: as it is to be saved


def adaptable_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of a model as it was before any slot; a slot stands for what it wraps."""
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if path and not path.startswith(inside):
            if isinstance(module, Slot):
                inside = (*inside, path + ".")
            yield path, module


def match_targets(config: PeftConfig, model: nn.Module, strict: bool) -> Match:
    """Finds the targets of a configuration; see budwood/peft/targets.h for the rules.

    An entry that matches nothing is an Error, or without `strict` a warning.
    """
    output = output_embedding(model)
    modules = [
        (path, _kind(module), module is not None and module is output)
        for path, module in adaptable_modules(model)
    ]
    model_type = getattr(getattr(model, "config", None), "model_type", None) or ""
    found = _C.match_targets(config, modules, model_type, strict)
    targets = [
        Target(path, config.rank(path), config.alpha(path), config.scaling(path))
        for path in found["matched"]
    ]
    return Match(targets, list(found["warnings"]), found["target_modules"])


def _kind(module: nn.Module) -> str:
    if isinstance(module, WeightSlot):
        module = module.base_layer
    elif isinstance(module, SavedModule):
        module = module.original_module
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "convolution"
    if not is_linear(module):
        return "other"
    return "conv1d" if is_conv1d(module) else "linear"


def output_embedding(model: nn.Module) -> nn.Module | None:
    """The projection to the vocabulary, if the model says which it is."""
    # A model without such a method, or one that does not implement it, has no such module.
    try:
        return model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
