"""`PeftModel`: a torch model with adapters, behind HF PEFT's interface."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import _C, switches
from .adapter_folder import find_folder, read_weights, write_adapter
from .config import PeftConfig, as_config, read_config, with_task_heads
from .controls import AdapterControls
from .errors import Error
from .fingerprint import KEY, base_fingerprint
from .hf_peft import LooksLikePeft
from .inject import InjectReport, inject
from .methods.inject import is_method_adapter, method_config, read_adapterhub
from .methods.mirror import mirror_of
from .mixed_batch import use_adapters
from .model_card import write_model_card
from .save_and_load import (
    LoadResult,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
    with_prefix,
)
from .weights import count_parameters


class AdaptedModel(AdapterControls, nn.Module):
    """Holds the model as `.model`; it gives parameters HF PEFT's prefix `base_model.model.`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def injected_model(self) -> nn.Module:
        return self.model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)


class PeftModel(LooksLikePeft, AdapterControls, nn.Module):
    """A model whose linear layers carry adapters, while everything else is frozen.

    The model is changed in place: `unload()` or `merge_and_unload()` give it back. Attributes that
    are not found here are those of the model. To HF's Trainer it is an instance of `peft.PeftModel`
    as soon as the package peft is imported.
    """

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        *,
        loading: bool = False,
    ) -> None:
        super().__init__()
        _check_base(model)
        self.base_model = AdaptedModel(model)
        self.reports: dict[str, InjectReport] = {}
        self._attach(adapter_name, peft_config, autocast_adapter_dtype, loading)
        if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            self._require_input_grads()

    def injected_model(self) -> nn.Module:
        return self.base_model.model

    def get_base_model(self) -> nn.Module:
        """The wrapped model, with its adapters."""
        return self.base_model.model

    @property
    def active_peft_config(self) -> PeftConfig:
        return self.peft_config[self.active_adapters[0]]

    @property
    def peft_type(self) -> str:
        return self.active_peft_config.peft_type

    @property
    def modules_to_save(self) -> set[str] | None:
        names = {m for c in self.peft_config.values() for m in c.modules_to_save or ()}
        return names or None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """The model's forward. `adapter_names` gives each row of the batch an adapter of its own;
        "__base__" is none."""
        if adapter_names is not None:
            with use_adapters(self.get_base_model(), adapter_names):
                return self.forward(*args, **kwargs)
        _refuse_special(kwargs)
        mirror = mirror_of(self.get_base_model(), make=False)
        if mirror is None or not self.training:
            return self.get_base_model()(*args, **kwargs)
        _C.before_step(mirror.impl, self.__dict__.setdefault("_forwards", 0))
        self.__dict__["_forwards"] += 1
        output = self.get_base_model()(*args, **kwargs)
        loss = getattr(output, "loss", None)
        added = _C.penalty(mirror.impl) if loss is not None else None
        if added is not None:
            output.loss = loss + added.to(loss.device)
        return output

    def update_and_allocate(self, global_step: int) -> None:
        """AdaLoRA's part of a step: call it after optimizer.step(), before zero_grad()."""
        mirror = mirror_of(self.get_base_model(), make=False)
        if mirror is not None:
            _C.after_step(mirror.impl, global_step)

    def generate(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        if adapter_names is not None:
            with use_adapters(self.get_base_model(), adapter_names):
                return self.generate(*args, **kwargs)
        _refuse_special(kwargs)
        return self.get_base_model().generate(*args, **kwargs)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) parameters, shared ones counted once."""
        return count_parameters(self)

    def print_trainable_parameters(self) -> None:
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || "
            f"trainable%: {100 * trainable / total:.4f}"
        )

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Attaches a new adapter; it is neither active nor trainable before `set_adapter`."""
        self._attach(adapter_name, peft_config, autocast_adapter_dtype, loading=False)

    def _attach(self, name: str, config: PeftConfig, autocast: bool, loading: bool) -> None:
        config = with_task_heads(as_config(config))
        self.reports[name] = inject(
            self.get_base_model(), config, name, loading=loading, autocast_adapter_dtype=autocast
        )

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Turns recomputation on; the embeddings' output then requires grad, as adapters need."""
        self._enable_checkpointing("activation_checkpointing_enable", args, kwargs)

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """The older name of activation_checkpointing_enable."""
        self._enable_checkpointing("gradient_checkpointing_enable", args, kwargs)

    def _enable_checkpointing(self, name: str, args: Any, kwargs: Any) -> None:
        enable = getattr(self.get_base_model(), name, None)
        if enable is None:
            raise Error(f"[{name}] {type(self.get_base_model()).__name__} has no method {name}")
        enable(*args, **kwargs)
        self._require_input_grads()

    def _require_input_grads(self) -> None:
        # With frozen embeddings no input of a recomputed block requires grad, and the re-entrant
        # kind of checkpointing then returns no gradients, silently.
        try:
            embeddings = self.get_base_model().get_input_embeddings()
        except (AttributeError, NotImplementedError):
            return
        if embeddings is not None and "_input_grads" not in self.__dict__:
            self.__dict__["_input_grads"] = embeddings.register_forward_hook(_require_grad)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        subfolder: str | None = None,
        **hub: Any,
    ) -> PeftModel:
        """Loads an adapter folder, of budwood or of HF PEFT, onto its base model.

        Without `is_trainable` the adapter is frozen and the model put in eval mode. Missing,
        unknown and wrongly shaped tensors are one Error that lists them all, and the model is as it
        was.
        """
        from .mapping import peft_model_class

        folder = find_folder(model_id, subfolder, **hub)
        config = (as_config(config) if config else read_config(folder)).copy()
        config.inference_mode = not is_trainable
        if cls is PeftModel:
            cls = peft_model_class(config.task_type)
        required = [(p, p.requires_grad) for p in model.parameters()]
        wrapped = None
        try:
            wrapped = cls(model, config, adapter_name, autocast_adapter_dtype, loading=True)
            _read_into(wrapped, folder, adapter_name)
        except Exception:
            if wrapped is not None:
                wrapped.unload()
            for parameter, before in required:
                parameter.requires_grad_(before)
            raise
        return wrapped if is_trainable else wrapped.eval()

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        subfolder: str | None = None,
        **hub: Any,
    ) -> LoadResult:
        """Loads a folder as a further adapter, not yet active, or into one that is there already.

        Without `is_trainable` the model is put in eval mode, as by HF PEFT.
        """
        folder = find_folder(model_id, subfolder, **hub)
        new = adapter_name not in switches.adapters_of(self.get_base_model())
        if new:
            config = read_config(folder).copy()
            config.inference_mode = not is_trainable
            self._attach(adapter_name, config, autocast_adapter_dtype, loading=True)
        try:
            result = _read_into(self, folder, adapter_name)
        except Exception:
            if new:
                switches.detach(self.get_base_model(), adapter_name)
                self.peft_config.pop(adapter_name)
            raise
        if new and is_trainable:
            self.set_requires_grad(adapter_name)
        if not is_trainable:
            self.eval()
        return result

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: bool | str = "auto",
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Writes adapters as folders in HF PEFT's layout.

        "default" goes into the folder itself, any other adapter into a sub-folder of its name.
        """
        directory = Path(save_directory)
        if directory.is_file():
            raise Error(f"[save_pretrained] {directory} is a file, not a folder")
        model = self.get_base_model()
        names = switches.adapters_of(model) if selected_adapters is None else selected_adapters
        switches.check_names(model, names, "save_pretrained")
        for name in names:
            tensors = get_peft_model_state_dict(self, state_dict, name, save_embedding_layers)
            if not is_main_process:
                continue
            config = self.peft_config[name].copy()
            if is_method_adapter(model, name):
                whole = config.modules_to_save
                config = method_config(model, name)
                config.modules_to_save = whole
                config.base_model_name_or_path = self.peft_config[name].base_model_name_or_path
            config.inference_mode = True
            if config.task_type is None:
                config.auto_mapping = {
                    "base_model_class": type(model).__name__,
                    "parent_library": type(model).__module__,
                }
            folder = directory if name == "default" else directory / name
            base = base_fingerprint(model, name)
            metadata = {KEY: base} if base else None
            write_adapter(folder, config, with_prefix(tensors), safe_serialization, metadata)
        if is_main_process and names:
            self.create_or_update_model_card(directory)

    def save_adapterhub(
        self, save_directory: str | os.PathLike[str], adapter_name: str = "default"
    ) -> None:
        """Writes an adapter as a folder of AdapterHub's library `adapters`.

        For bottleneck, parallel and Compacter adapters, prefix and prompt tuning.
        `adapters` loads it with use_safetensors=True.
        """
        model = self.get_base_model()
        switches.check_names(model, [adapter_name], "save_adapterhub")
        if not is_method_adapter(model, adapter_name):
            raise Error(
                f"[save_adapterhub] {adapter_name!r} is LoRA, which AdapterHub's layout is not "
                "written for"
            )
        _C.save_adapterhub(mirror_of(model).impl, str(save_directory), adapter_name)

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        """Writes README.md for the active adapter, unless the folder has one."""
        from . import __version__

        name = (self.active_adapters or list(self.peft_config))[0]
        write_model_card(Path(output_dir), self.peft_config[name], __version__)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> None:
        raise Error(
            "[push_to_hub] is not implemented: call save_pretrained(folder), then "
            "huggingface_hub.upload_folder"
        )


def _read_into(model: PeftModel, folder: Path, name: str) -> LoadResult:
    """The tensors of a folder into an adapter that was attached from its configuration."""
    if not _C.is_adapterhub_folder(str(folder)):
        return set_peft_model_state_dict(model, read_weights(folder), name)
    read_adapterhub(model.get_base_model(), str(folder), name)
    return LoadResult([], [])


def _check_base(model: nn.Module) -> None:
    if isinstance(model, PeftModel):
        raise Error("[PeftModel] the model is a PeftModel already: use its add_adapter")
    names = switches.adapters_of(model)
    if names:
        raise Error(
            f"[PeftModel] the model has adapters {names} already: use add_adapter of its "
            "PeftModel, or unload() it first"
        )


def _refuse_special(kwargs: dict[str, Any]) -> None:
    for name in ("alora_offsets",):
        if kwargs.get(name) is not None:
            raise Error(f"[forward] the argument {name} is not implemented")
        kwargs.pop(name, None)


def _require_grad(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
    output.requires_grad_(True)
