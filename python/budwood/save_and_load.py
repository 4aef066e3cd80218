"""The tensors of an adapter under the names that HF PEFT's files give them, and back into a model.

A file's key is the module path below the adapted model with the adapter's name left out, for
example `model.layers.0.self_attn.q_proj.lora_A.weight`; HF PEFT puts `base_model.model.` in front.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from .errors import Error
from .methods.inject import is_method_adapter, method_tensors, set_method_tensors
from .saved_modules import SavedModule
from .slots import EmbeddingSlot, LinearSlot, LoraSlot
from .switches import adapters_of, biases_of, check_names, slots

PREFIX = "base_model.model."
#: Tensors of these names are budwood's own and belong to no module.
PRIVATE = "budwood."
EMBEDDING_NAMES = ("embed_tokens", "lm_head")


class LoadResult(NamedTuple):
    """What HF PEFT returns from loading; here both are empty, since anything else raises."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    adapter_name: str = "default",
    save_embedding_layers: bool | str = "auto",
) -> dict[str, torch.Tensor]:
    """The tensors of one adapter by file key, with the prefix that the paths of `model` have.

    Values come from `state_dict`, a state dict of the same model, when it is given (sharded
    training gathers one). Token tables are added with `save_embedding_layers=True`, and by "auto"
    when an adapter targets one of them or when their size differs from the base model's
    configuration.
    """
    check_names(model, [adapter_name], "get_peft_model_state_dict")
    tensors = {}
    base = _base_of(model)
    beside_prompts = False
    if is_method_adapter(base, adapter_name):
        tensors.update(method_tensors(base, adapter_name))
        beside_prompts = _config_of(model, adapter_name).is_prompt_learning
    for key, (name, tensor) in _places(model, adapter_name).items():
        if state_dict is not None and name is not None:
            if name not in state_dict:
                raise Error(f"[get_peft_model_state_dict] the given state_dict has no {name!r}")
            tensor = state_dict[name]
        # Whole modules beside prompts have one level of prefix less, as HF PEFT reads them.
        tensors["base_model." + _bare(key) if beside_prompts else key] = tensor.detach()
    for key, tensor in _token_tables(model, adapter_name).items():
        if save_embedding_layers is True or (
            save_embedding_layers == "auto"
            and (key.endswith(".base_layer.weight") or _vocabulary_changed(model, adapter_name))
        ):
            tensors.setdefault(key, tensor.detach())
    return tensors


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, torch.Tensor],
    adapter_name: str = "default",
) -> LoadResult:
    """Copies tensors by file key, with or without `base_model.model.`, into an attached adapter.

    Missing, unknown and wrongly shaped tensors are one Error that lists them all; then nothing has
    been copied. Values are converted to the dtype of the adapter.
    """
    where = "set_peft_model_state_dict"
    check_names(model, [adapter_name], where)
    base = _base_of(model)
    if is_method_adapter(base, adapter_name):
        peft_model_state_dict = _set_method(base, adapter_name, peft_model_state_dict)
    wanted = {_bare(key): t for key, (_, t) in _places(model, adapter_name).items()}
    tables = {_bare(key): t for key, t in _token_tables(model, adapter_name).items()}
    found = {_bare(k): t for k, t in peft_model_state_dict.items() if not k.startswith(PRIVATE)}
    tables = {key: t for key, t in tables.items() if key in found and key not in wanted}
    for key in _written_twice(model, adapter_name):
        found.pop(_bare(key), None)

    faults = [f"missing {key} {list(t.shape)}" for key, t in wanted.items() if key not in found]
    for key, tensor in found.items():
        target = wanted.get(key, tables.get(key))
        if target is None:
            faults.append(f"unknown {key} {list(tensor.shape)}")
        elif tensor.shape != target.shape:
            hint = ": resize the model's token embeddings first" if key in tables else ""
            faults.append(
                f"{key} has shape {list(tensor.shape)}, the model wants {list(target.shape)}{hint}"
            )
        elif not torch.isfinite(tensor).all():
            faults.append(f"{key} holds a value that is not finite")
    if tables and any(isinstance(s, LoraSlot) and s.merged for _, s in slots(model)):
        faults.append("token tables cannot be loaded while an adapter is merged: unmerge it first")
    if faults:
        raise Error(
            f"[{where}] {len(faults)} tensors do not fit adapter {adapter_name!r} of this "
            + "model:\n  "
            + "\n  ".join(faults)
        )
    with torch.no_grad():
        for key, target in {**wanted, **tables}.items():
            target.copy_(found[key])
    return LoadResult([], [])


def _base_of(model: nn.Module) -> nn.Module:
    """The model in which adapters were injected."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _set_method(
    base: nn.Module, name: str, found: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Hands a method its tensors; what is left are whole modules and biases."""
    others = {_bare(key) for key in _places(base, name)} | set(_token_tables(base, name))
    left = {key: t for key, t in found.items() if _file_key(key) in others}
    own = {key: t for key, t in found.items() if key not in left}
    set_method_tensors(base, own, name)
    return {_file_key(key): t for key, t in left.items()}


def _file_key(key: str) -> str:
    """A key without the prefix; HF PEFT gives whole modules beside prompts a shorter one."""
    bare = _bare(key)
    return bare.removeprefix("base_model.") if bare.startswith("base_model.") else bare


def with_prefix(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """File keys as HF PEFT writes them."""
    own = ("prompt_embeddings", "base_model.", PRIVATE)
    return {key if key.startswith(own) else PREFIX + key: tensor for key, tensor in tensors.items()}


def _bare(key: str) -> str:
    return key.removeprefix(PREFIX)


def _places(model: nn.Module, name: str) -> dict[str, tuple[str | None, torch.Tensor]]:
    """File key -> (key in the model's state dict, tensor) of all tensors of an adapter."""
    places: dict[str, tuple[str | None, torch.Tensor]] = {}
    for path, slot in slots(model):
        if name not in slot.adapter_names():
            continue
        if isinstance(slot, LoraSlot) and name in slot.lora_A:
            for part in ("lora_A", "lora_B"):
                for tail, tensor in getattr(slot, part)[name].named_parameters():
                    places[f"{path}.{part}.{tail}"] = (f"{path}.{part}.{name}.{tail}", tensor)
        elif isinstance(slot, SavedModule):
            for tail, tensor in slot.modules_to_save[name].state_dict(keep_vars=True).items():
                places[f"{path}.{tail}"] = (f"{path}.modules_to_save.{name}.{tail}", tensor)
    for path, module in model.named_modules():
        biases = biases_of(module)
        if biases is not None and biases.adapter == name:
            for tail, tensor in biases.values(module).items():
                key = f"{path}.{tail}" if path else tail
                places[key] = (key if biases.applied else None, tensor)
    return places


def _token_tables(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """File key -> tensor of the frozen token tables that a file may hold."""
    tables = {}
    for path, module in model.named_modules():
        held = isinstance(module, (LinearSlot, EmbeddingSlot)) and name in module.adapter_names()
        if held and name in module.adapters and module.adapters[name].impl.companion():
            held = False  # single rows are in the file, not the table
        if held and _is_low_rank(model, name):
            last = path.split(".")[-1]
            if last in EMBEDDING_NAMES:
                tables[f"{path}.base_layer.weight"] = module.base_layer.weight
    modules = {id(module): path for path, module in model.named_modules()}
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        # A model without such a method, or one that does not implement it, has no such table.
        try:
            module = getattr(model, getter)()
        except (AttributeError, NotImplementedError):
            continue
        path = modules.get(id(module))
        weight = getattr(module, "weight", None)
        if path and not isinstance(module, (LinearSlot, SavedModule)) and weight is not None:
            tables[f"{path}.weight"] = weight
    return tables


def _is_low_rank(model: nn.Module, name: str) -> bool:
    return _config_of(model, name).peft_type == "LORA"


def _written_twice(model: nn.Module, name: str) -> list[str]:
    """Keys that HF PEFT's bias="all" writes for biases inside modules_to_save."""
    keys = []
    for path, slot in slots(model):
        if isinstance(slot, SavedModule) and name in slot.modules_to_save:
            for tail, _ in slot.original_module.named_parameters():
                if tail.split(".")[-1] == "bias":
                    keys += [
                        f"{path}.{kind}.{tail}" for kind in ("original_module", "modules_to_save")
                    ]
    return keys


def _vocabulary_changed(model: nn.Module, name: str) -> bool:
    """Whether the tables were resized, where the base is a folder with a config.json."""
    folder = _config_of(model, name).base_model_name_or_path
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    file = os.path.join(folder or "", "config.json")
    if not folder or size is None or not os.path.isfile(file):
        return False
    with open(file, encoding="utf-8") as stream:
        before = json.load(stream).get("vocab_size")
    return before is not None and before != size


def _config_of(model: nn.Module, name: str) -> Any:
    configs = getattr(model, "peft_config", {})
    if name not in configs:
        raise Error(
            f"[get_peft_model_state_dict] no config of adapter {name!r}; attached are "
            f"{adapters_of(model)}"
        )
    return configs[name]
