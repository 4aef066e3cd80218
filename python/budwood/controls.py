"""What a wrapped model can do with its adapters, under HF PEFT's method names."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from . import switches
from .combine import check_combination, combine, combined_rank
from .config import LoraConfig, PeftConfig, is_plain_lora
from .errors import Error
from .inject import inject
from .quantized import describe_quantization


class AdapterControls:
    """Methods over the adapters of `self.injected_model()`."""

    def injected_model(self) -> nn.Module:
        """The model whose modules hold the adapters."""
        raise NotImplementedError

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """Configs by adapter name."""
        return self.injected_model().__dict__.setdefault("peft_config", {})

    @property
    def active_adapters(self) -> list[str]:
        return switches.active_adapters(self.injected_model())

    @property
    def active_adapter(self) -> str | list[str]:
        """The name of the active adapter; a list when there are several or none."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    def set_adapter(
        self,
        adapter_name: str | list[str],
        inference_mode: bool = False,
        *,
        composition: str = "stack",
    ) -> None:
        """Makes one adapter, or several, active and trainable.

        What adapters of layers add is a sum. Several bottlenecks or edits of one block act each on
        what the one before it made ("stack"), or all on the same with their changes added up
        ("parallel").
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        model = self.injected_model()
        switches.set_composition(model, composition)
        switches.set_adapter(model, names, trainable=not inference_mode)

    def set_adapter_weight(self, adapter_name: str, weight: float) -> None:
        """Multiplies what an adapter changes (1 = as trained), from the next call on.

        Its parameters stay as they are, and a saved folder does not have the weight; merging does.
        Whole modules and token rows that are trained along are not halved.
        """
        switches.set_adapter_weight(self.injected_model(), adapter_name, weight)

    def set_requires_grad(self, adapter_names: str | list[str], requires_grad: bool = True) -> None:
        """Freezes or unfreezes adapters, active or not."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        switches.check_names(self.injected_model(), names, "set_requires_grad")
        for _, slot in switches.slots(self.injected_model()):
            for name in names:
                if name in slot.adapter_names():
                    for parameter in slot.adapter_parameters(name):
                        parameter.requires_grad_(requires_grad)

    def enable_adapter_layers(self) -> None:
        switches.enable_adapters(self.injected_model(), True)

    def disable_adapter_layers(self) -> None:
        switches.enable_adapters(self.injected_model(), False)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Runs the bare base inside a `with`, also when adapters are merged."""
        enabled = switches.adapters_enabled(self.injected_model())
        self.disable_adapter_layers()
        try:
            yield
        finally:
            if enabled:
                self.enable_adapter_layers()

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter. When no active one is left, the first of the others is activated."""
        model = self.injected_model()
        switches.detach(model, adapter_name)
        self.peft_config.pop(adapter_name, None)
        left = switches.adapters_of(model)
        if left and not self.active_adapters:
            warnings.warn(
                f"adapter {adapter_name!r} was active and is deleted; {left[0]!r} is active now",
                stacklevel=2,
            )
            self.set_adapter(left[0])

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Folds adapters (by default the active ones) into the base weights, in all layers or none.

        A result that is not finite is always refused, so `safe_merge` changes nothing.
        """
        switches.merge(self.injected_model(), adapter_names)

    def unmerge_adapter(self) -> None:
        """Restores the base weights bit for bit."""
        switches.unmerge(self.injected_model())

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        """Folds adapters into the base for good and returns the plain model.

        A result that is not finite is always refused, so `safe_merge` changes nothing.
        """
        model = self.injected_model()
        switches.merge(model, adapter_names)
        replaced = [slot.base_before_merge() for _, slot in switches.weight_slots(model)]
        switches.remove_slots(model, keep_trained=True)
        _untie(model, [weight for weight in replaced if weight is not None])
        describe_quantization(model)
        return model

    def unload(self) -> nn.Module:
        """Removes all adapters and returns the base model as it was."""
        model = self.injected_model()
        switches.unmerge(model)
        switches.remove_slots(model, keep_trained=False)
        return model

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
    ) -> None:
        """Adds an adapter that is a weighted sum of others; it is not yet active.

        `combination_type` is "cat" (exact, ranks add up), "svd" (best approximation at `svd_rank`)
        or "linear" (equal ranks, approximate). The SVD is one of small factors, so
        `svd_full_matrices` and `svd_driver` have no effect.
        """
        model = self.injected_model()
        check_combination(combination_type)
        switches.check_names(model, adapters, "add_weighted_adapter")
        if not adapters or len(adapters) != len(weights) or len(set(adapters)) != len(adapters):
            raise Error(
                "[add_weighted_adapter] wants different adapters and one weight for each, found "
                f"{len(adapters)} adapters {adapters} and {len(weights)} weights"
            )
        _check_combinable({name: self.peft_config[name] for name in adapters})
        held = {
            path: slot
            for path, slot in switches.linear_slots(model)
            if any(name in slot.lora_A for name in adapters)
        }
        rank = combined_rank(held, adapters, combination_type, svd_rank)
        first = self.peft_config[adapters[0]]
        config = LoraConfig(
            r=rank,
            lora_alpha=rank,
            target_modules=sorted(held),
            lora_dropout=first.lora_dropout,
            task_type=first.task_type,
            base_model_name_or_path=first.base_model_name_or_path,
        )
        inject(model, config, adapter_name)
        for slot in held.values():
            a, b = combine(slot, adapters, weights, combination_type, rank, svd_clamp)
            with torch.no_grad():
                slot.lora_A[adapter_name].weight.copy_(a)
                slot.lora_B[adapter_name].weight.copy_(b)


def _check_combinable(configs: dict[str, PeftConfig]) -> None:
    for name, config in configs.items():
        if not is_plain_lora(config):
            raise Error(
                f"[add_weighted_adapter] adapter {name!r} is not plain LoRA, and only such can be "
                "combined into one"
            )
        for what, there in (
            ("lora_bias", config.lora_bias),
            ("modules_to_save", config.modules_to_save),
            (f"bias={config.bias!r}", config.bias != "none"),
        ):
            if there:
                raise Error(
                    f"[add_weighted_adapter] adapter {name!r} has {what}, which a low-rank adapter "
                    "cannot hold"
                )


def _untie(model: nn.Module, replaced: list[torch.Tensor]) -> None:
    """Tells the model's config when a merge has parted a tied head from its embedding."""
    ids = {id(weight) for weight in replaced}
    if any(id(p) in ids for p in model.parameters()):
        config = getattr(model, "config", None)
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
        warnings.warn(
            "a merged layer shared its weight with another module, which keeps the old values: the "
            "two are no longer tied",
            stacklevel=3,
        )
