"""Slots: the modules of a model where adapters attach.

A slot wraps one linear layer, keeps it as `base_layer`, and holds any number of named LoRA
adapters (arXiv 2106.09685): y = x Wᵀ + b + Σ s (D(x) Aᵀ) Bᵀ, A [r, in], B [out, r]. Parameter
names are those of HF PEFT (`base_layer.weight`, `lora_A.<name>.weight`, `lora_B.<name>.weight`).
Adapters of other methods are C++'s (methods/): a slot holds their tensors under `adapters.<name>`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from . import _C
from .errors import Error
from .weights import (
    DENSE_TRANSPOSED,
    compute_dtype,
    is_called_plainly,
    is_packed,
    storage_of,
    value_dtype,
    weight_parts,
)


class Slot(nn.Module):
    """What all slots share: named adapters, of which some are active, and a switch for all."""

    def __init__(self) -> None:
        super().__init__()
        self.active_adapters: list[str] = []
        self.adapters_enabled = True
        #: Which rows of a batch use which adapter (mixed_batch.py); None: the active ones.
        self.row_groups: Any = None

    def adapter_names(self) -> list[str]:
        """Names of the attached adapters, in order of attachment."""
        raise NotImplementedError

    def adapter_parameters(self, name: str) -> Iterable[nn.Parameter]:
        """Trainable tensors of one adapter."""
        raise NotImplementedError

    def detach(self, name: str) -> None:
        """Removes one adapter."""
        raise NotImplementedError

    def set_adapter(self, names: list[str], trainable: bool = True) -> None:
        """Makes exactly these adapters active and, of all adapters, only them trainable."""
        self.active_adapters = [name for name in names if name in self.adapter_names()]
        for name in self.adapter_names():
            wanted = trainable and name in self.active_adapters
            for parameter in self.adapter_parameters(name):
                parameter.requires_grad_(wanted)

    def set_adapter_weight(self, name: str, weight: float) -> None:
        """Multiplies what one adapter changes, without touching its parameters; 1 unless set."""
        raise NotImplementedError

    def enable_adapters(self, enabled: bool) -> None:
        """With False, forward is the bare base, bit for bit."""
        self.adapters_enabled = enabled


class WeightSlot(Slot):
    """A layer `base_layer` whose weight adapters can be merged into."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.merged_adapters: list[str] = []
        self._merge_again: list[str] = []

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    def is_merged(self, name: str) -> bool:
        """Whether the base holds an adapter, or will again when adapters are enabled."""
        return name in self.merged_adapters or name in self._merge_again

    def require_unmerged(self, name: str) -> None:
        """Raises when an adapter that is to be detached is merged."""
        if self.is_merged(name):
            raise Error(f"[detach] adapter {name!r} is merged into the base: unmerge it first")

    def get_base_layer(self) -> nn.Module:
        return self.base_layer

    def merge(self, names: list[str] | None = None) -> None:
        """Folds adapters, by default the active ones, into a new weight."""
        raise NotImplementedError

    def unmerge(self) -> None:
        """Restores the base bit for bit."""
        raise NotImplementedError

    def base_before_merge(self) -> nn.Parameter | None:
        """The base weight that a merge has set aside."""
        raise NotImplementedError

    def enable_adapters(self, enabled: bool) -> None:
        if not enabled and self.merged_adapters:
            merged = self.merged_adapters
            self.unmerge()
            self._merge_again = merged
        elif enabled and self._merge_again:
            names, self._merge_again = self._merge_again, []
            self.merge(names)
        super().enable_adapters(enabled)


class LoraSlot(WeightSlot):
    """A layer with LoRA adapters, their factors under HF PEFT's names."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.lora_dropout = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self._whole_scaling: dict[str, float] = {}  # of adapters that have a weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base_layer.bias

    def adapter_names(self) -> list[str]:
        return list(self.lora_A)

    def adapter_parameters(self, name: str) -> Iterable[nn.Parameter]:
        yield from self.lora_A[name].parameters()
        yield from self.lora_B[name].parameters()

    def attach(
        self,
        name: str,
        r: int,
        lora_alpha: float,
        scaling: float,
        dropout: float = 0.0,
        init: bool | str = True,
        lora_bias: bool = False,
        keep_dtype: bool = False,
    ) -> None:
        """Adds an adapter, not yet active. `init` is True, False or "gaussian", as in HF PEFT.

        With `keep_dtype` the adapter has the dtype of a 16 bit base instead of fp32.
        """
        if name in self.adapter_names():
            raise Error(f"[attach] an adapter named {name!r} is already attached")
        if r < 1:
            raise Error(f"[attach] the rank is a positive integer, found {r}")
        a, b = self.make_factors(r, lora_bias)
        if init:
            if init == "gaussian":
                nn.init.normal_(a.weight, std=1 / r)
            elif init is True:
                nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5))
            else:
                raise Error(f"[attach] the initialisation {init!r} is not implemented")
            for parameter in b.parameters():
                nn.init.zeros_(parameter)
        device, dtype = storage_of(self.base_layer)
        for part in (a, b):
            # HF PEFT's start values pass through the base's dtype; training is in fp32 all the
            # same.
            part.to(device=device, dtype=dtype)
            if dtype in (torch.float16, torch.bfloat16) and not keep_dtype:
                part.float()
            part.requires_grad_(False)
        self.lora_A[name], self.lora_B[name] = a, b
        self.lora_dropout[name] = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.r[name], self.lora_alpha[name], self.scaling[name] = r, lora_alpha, scaling
        self.lora_dropout[name].train(self.training)

    def set_adapter_weight(self, name: str, weight: float) -> None:
        whole = self._whole_scaling.setdefault(name, self.scaling[name])
        self.scaling[name] = whole * weight

    def make_factors(self, r: int, lora_bias: bool) -> tuple[nn.Module, nn.Module]:
        """A and B. HF PEFT makes them in the same order, so that one seed gives one adapter."""
        raise NotImplementedError

    def detach(self, name: str) -> None:
        self.require_unmerged(name)
        for held in (self.lora_A, self.lora_B, self.lora_dropout):
            del held[name]
        for values in (self.r, self.lora_alpha, self.scaling):
            del values[name]
        self._whole_scaling.pop(name, None)
        self.active_adapters = [other for other in self.active_adapters if other != name]

    def extra_repr(self) -> str:
        return f"r={self.r}, active={self.active_adapters}, merged={self.merged_adapters}"


class LinearSlot(LoraSlot):
    """A torch.nn.Linear, a transformers Conv1D or a packed layer, with LoRA adapters.

    x [..., in] -> y [..., out] in the dtype of the base layer's result. Adapters are fp32 on a 16
    bit base; x is cast to their dtype and the result back.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        _, _, (self.out_features, self.in_features) = weight_parts(base_layer)
        self.adapters = nn.ModuleDict()
        self.__dict__["slot"] = None  # the C++ slot, once an adapter of another method is here
        # What stood in base_layer before a merge: its parameters, or a packed layer whole. A tuple,
        # so that it is no child.
        self._unmerged: tuple[Any, ...] | None = None

    def adapter_names(self) -> list[str]:
        return [*self.lora_A, *self.adapters]

    def adapter_parameters(self, name: str) -> Iterable[nn.Parameter]:
        if name in self.adapters:
            yield from self.adapters[name].trained()
        else:
            yield from super().adapter_parameters(name)

    def use_methods(self, slot: Any) -> None:
        """Takes the C++ slot of this place."""
        self.__dict__["slot"] = slot

    def attach_method(self, name: str) -> None:
        """Takes in an adapter that the C++ slot has."""
        from .methods.attached import Attached

        self.adapters[name] = Attached(self.slot.adapter(name)).train(self.training)

    def set_adapter(self, names: list[str], trainable: bool = True) -> None:
        own = [name for name in names if name in self.adapter_names()]
        for name in own:
            if len(own) > 1 and name in self.adapters and not self.adapters[name].impl.composes():
                raise Error(
                    f"[set_adapter] {name!r} cannot be active beside another adapter at the same "
                    f"place; asked for were {own}"
                )
        super().set_adapter(names, trainable)
        if self.slot is not None:
            self.slot.set_active([n for n in self.active_adapters if n in self.adapters])

    def set_adapter_weight(self, name: str, weight: float) -> None:
        if name not in self.adapters:
            super().set_adapter_weight(name, weight)
        elif not self.adapters[name].impl.companion():
            self.adapters[name].impl.weight = weight

    def make_factors(self, r: int, lora_bias: bool) -> tuple[nn.Module, nn.Module]:
        return (
            nn.Linear(self.in_features, r, bias=False),
            nn.Linear(r, self.out_features, bias=lora_bias),
        )

    def detach(self, name: str) -> None:
        if name not in self.adapters:
            super().detach(name)
            return
        self.require_unmerged(name)
        self.slot.detach(name)
        del self.adapters[name]
        self.active_adapters = [other for other in self.active_adapters if other != name]

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        running = [n for n in self.active_adapters if n not in self.merged_adapters]
        if self.row_groups is not None and self.adapters_enabled:
            return self._forward_by_rows(x)
        if not self.adapters_enabled or not running:
            return self.base_layer(x, *args, **kwargs)
        return self._forward_running(x, running, *args, **kwargs)

    def _forward_by_rows(self, x: torch.Tensor) -> torch.Tensor:
        if not any(name in self.adapter_names() for name in self.row_groups.rows):
            return self.base_layer(x)

        def compute(name: str, rows: torch.Tensor) -> torch.Tensor:
            if name not in self.adapter_names():
                return self.base_layer(rows)
            if name in self.adapters:
                self.slot.set_active([name])
            return self._forward_running(rows, [name])

        try:
            return self.row_groups.apply(x, compute)
        finally:
            if self.slot is not None:
                self.slot.set_active([n for n in self.active_adapters if n in self.adapters])

    def _forward_running(
        self, x: torch.Tensor, running: list[str], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        plain = not args and not kwargs and is_called_plainly(self.base_layer)
        if any(name in self.adapters for name in running):
            return self._forward_methods(x, running)
        if len(running) == 1 and plain and self._is_one_product(running[0]):
            return self._forward_fused(x, running[0])
        if plain:
            parts, form, shape = weight_parts(self.base_layer)
            inner = x.to(compute_dtype(self.base_layer, x))
            y = torch.ops.budwood.linear(inner, parts, form, shape, self.base_layer.bias)
            y = y if inner is x else y.to(x.dtype)
        else:
            y = self.base_layer(x, *args, **kwargs)
        dtype = y.dtype
        for name in running:
            a, b = self.lora_A[name], self.lora_B[name]
            u = a(self.lora_dropout[name](x.to(a.weight.dtype)))
            y = y + b(u) * self.scaling[name]
        return y.to(dtype)

    def _forward_methods(self, x: torch.Tensor, running: list[str]) -> torch.Tensor:
        """Through the C++ slot, with the LoRA adapters that are kept here in front of its own."""
        self.refresh_base()
        inner = x.to(compute_dtype(self.base_layer, x))
        y = self.slot.forward(inner, self._lora_terms(running, self.training))
        return y if inner is x else y.to(x.dtype)

    def refresh_base(self) -> None:
        """Shows the C++ slot what the base layer holds now."""
        layer = self.base_layer
        seen = (id(layer.weight), id(layer.bias))
        if self.__dict__.get("_seen") != seen:
            parts, form, (out, in_) = weight_parts(layer)
            self.slot.set_base(parts, form, out, in_, layer.bias)
            self.__dict__["_seen"] = seen

    def _lora_terms(self, names: list[str], training: bool) -> list[dict[str, Any]]:
        terms = []
        for name in names:
            if name in self.lora_A:
                drop = self.lora_dropout[name]
                b = self.lora_B[name]
                terms.append(
                    {
                        "a": self.lora_A[name].weight,
                        "b": b.weight,
                        "bias": b.bias,
                        "scaling": self.scaling[name],
                        "dropout": drop.p if training and isinstance(drop, nn.Dropout) else 0.0,
                    }
                )
        return terms

    def _is_one_product(self, name: str) -> bool:
        dropout = self.lora_dropout[name]
        drops = isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0
        return not drops and not self.base_layer.weight.requires_grad

    def _forward_fused(self, x: torch.Tensor, name: str) -> torch.Tensor:
        parts, form, shape = weight_parts(self.base_layer)
        a, b, scaling = self.lora_A[name], self.lora_B[name], self.scaling[name]
        bias = self.base_layer.bias
        if b.bias is not None:
            bias = b.bias * scaling if bias is None else bias + b.bias * scaling
        inner = x.to(compute_dtype(self.base_layer, x))
        y = torch.ops.budwood.lora_linear(
            inner, parts, form, shape, bias, a.weight, b.weight, scaling
        )
        return y if inner is x else y.to(x.dtype)

    @torch.no_grad()
    def delta(self, name: str) -> torch.Tensor:
        """s B A of one LoRA adapter in fp64, [out, in]."""
        if name in self.adapters:
            raise Error(f"[delta] {name!r} is not a plain LoRA adapter")
        a, b = self.lora_A[name].weight.double(), self.lora_B[name].weight.double()
        return self.scaling[name] * (b @ a)

    @torch.no_grad()
    def merge(self, names: list[str] | None = None) -> None:
        """Folds adapters into a new weight: products and sum in fp64, one rounding at the end.

        The old parameters are kept, so unmerge is exact. Raises, and changes nothing, when the
        result is not finite.
        """
        names = self.active_adapters if names is None else names
        added = [n for n in names if n in self.adapter_names() and n not in self.merged_adapters]
        if not added:
            return
        if is_packed(self.base_layer) or len(self._unmerged or ()) == 1:
            self._merge_packed(added)
            return
        old_weight, old_bias = self._unmerged or (self.base_layer.weight, self.base_layer.bias)
        merged = [*self.merged_adapters, *added]
        parts = [old_weight], weight_parts(self.base_layer)[1]
        weight, bias = self._folded(parts, old_weight.dtype, old_bias, merged)
        self._unmerged = (old_weight, old_bias)
        self.merged_adapters = merged
        # New parameters instead of new data: a tied embedding keeps the old ones.
        self.base_layer.weight = nn.Parameter(weight, requires_grad=old_weight.requires_grad)
        if bias is not None:
            self.base_layer.bias = nn.Parameter(bias, requires_grad=old_bias.requires_grad)

    def _merge_packed(self, added: list[str]) -> None:
        """Codes cannot hold a merged weight: a plain layer takes the packed one's place."""
        packed = self._unmerged[0] if self._unmerged else self.base_layer
        merged = [*self.merged_adapters, *added]
        parts, form, _ = weight_parts(packed)
        weight, bias = self._folded((parts, form), value_dtype(packed), packed.bias, merged)
        layer = nn.Linear(
            self.in_features, self.out_features, bias=packed.bias is not None, device="meta"
        )
        layer.weight = nn.Parameter(weight, requires_grad=False)
        if packed.bias is not None:
            bias = packed.bias.detach() if bias is None else bias
            layer.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=False)
        self._unmerged, self.merged_adapters = (packed,), merged
        self.base_layer = layer.train(packed.training)

    def _folded(
        self,
        base: tuple[list[torch.Tensor], int],
        dtype: torch.dtype,
        bias: torch.Tensor | None,
        names: list[str],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        parts, form = base
        shape = [self.out_features, self.in_features]
        transposed = form == DENSE_TRANSPOSED
        folded = torch.empty(
            shape[::-1] if transposed else shape, dtype=dtype, device=parts[0].device
        )
        target = folded.t() if transposed else folded
        step = max(1, (1 << 22) // self.in_features)
        methods = [name for name in names if name in self.adapters]
        if methods:
            # C++ folds into the base as it was before any merge.
            self.slot.set_base(parts, form, *shape, bias)
            self.__dict__["_seen"] = None
        for begin in range(0, self.out_features, step):
            end = min(self.out_features, begin + step)
            rows = _C.dequantize(parts, form, shape, "float64", begin, end)
            if methods:
                rows = self.slot.fold_rows(rows, begin, self._lora_terms(names, False), methods)
            else:
                rows = _C.fold_rows(rows, begin, self._lora_terms(names, False))
            target[begin:end] = _C.rounded_once(rows, folded)
        with_bias = [n for n in names if n in self.lora_B and self.lora_B[n].bias is not None]
        if with_bias and bias is None:
            raise Error(
                f"[merge] adapter {with_bias[0]!r} has a bias (lora_bias=True), but the base layer "
                "has none to fold it into"
            )
        total = None
        if with_bias:
            total = bias.double()
            for name in with_bias:
                total = total + self.scaling[name] * self.lora_B[name].bias.double()
            total = total.to(bias.dtype)
        if methods:
            total = self.slot.fold_bias(self._lora_terms(names, False), methods)
        for what, tensor in (("weight", folded), ("bias", total)):
            if tensor is not None and not torch.isfinite(tensor).all():
                raise Error(
                    f"[merge] the {what} with {names} folded in is not finite in "
                    f"{tensor.dtype}; nothing was changed"
                )
        return folded, total

    def unmerge(self) -> None:
        """Restores the base bit for bit."""
        self._merge_again = []
        if self._unmerged is None:
            return
        if len(self._unmerged) == 1:
            (self.base_layer,) = self._unmerged
        else:
            self.base_layer.weight, bias = self._unmerged
            if bias is not None:
                self.base_layer.bias = bias
        self._unmerged, self.merged_adapters = None, []

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        if self.slot is not None:
            self.slot.set_adapters_enabled(enabled)

    def base_before_merge(self) -> nn.Parameter | None:
        """The base weight that a merge has set aside; None when that is a packed layer."""
        return self._unmerged[0] if self._unmerged and len(self._unmerged) == 2 else None

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> LinearSlot:
        super()._apply(fn, recurse)
        for kept in self._unmerged or ():
            if isinstance(kept, nn.Module):
                kept._apply(fn)
            elif kept is not None:
                kept.data = fn(kept.data)
        return self


class EmbeddingSlot(WeightSlot):
    """A torch.nn.Embedding with adapters, whose arithmetic is C++'s. ids [...] -> [..., dim]."""

    def __init__(self, base_layer: nn.Embedding, slot: Any) -> None:
        super().__init__(base_layer)
        self.__dict__["slot"] = slot
        self.adapters = nn.ModuleDict()
        self._unmerged: nn.Parameter | None = None

    def merge(self, names: list[str] | None = None) -> None:
        """Folds adapters into a new table, as LinearSlot does. A tied head keeps the old one."""
        names = self.active_adapters if names is None else names
        added = [n for n in names if n in self.adapters and n not in self.merged_adapters]
        if not added:
            return
        merged = [*self.merged_adapters, *added]
        old = self.base_layer.weight if self._unmerged is None else self._unmerged
        self.slot.unmerge()
        self.slot.merge(merged)
        table = self.slot.weight_parts()[0]
        self._unmerged, self.merged_adapters = old, merged
        self.base_layer.weight = nn.Parameter(table.detach(), requires_grad=old.requires_grad)

    def unmerge(self) -> None:
        """Restores the table bit for bit."""
        self._merge_again = []
        if self._unmerged is not None:
            self.slot.unmerge()
            self.base_layer.weight = self._unmerged
            self._unmerged, self.merged_adapters = None, []

    def base_before_merge(self) -> nn.Parameter | None:
        """The table that a merge has set aside."""
        return self._unmerged

    @property
    def num_embeddings(self) -> int:
        return self.base_layer.num_embeddings

    @property
    def embedding_dim(self) -> int:
        return self.base_layer.embedding_dim

    def adapter_names(self) -> list[str]:
        return list(self.adapters)

    def adapter_parameters(self, name: str) -> Iterable[nn.Parameter]:
        return self.adapters[name].trained()

    def set_adapter_weight(self, name: str, weight: float) -> None:
        if not self.adapters[name].impl.companion():
            self.adapters[name].impl.weight = weight

    def attach_method(self, name: str) -> None:
        """Takes in an adapter that the C++ slot has."""
        from .methods.attached import Attached

        self.adapters[name] = Attached(self.slot.adapter(name)).train(self.training)

    def detach(self, name: str) -> None:
        self.require_unmerged(name)
        self.slot.detach(name)
        del self.adapters[name]
        self.active_adapters = [other for other in self.active_adapters if other != name]

    def set_adapter(self, names: list[str], trainable: bool = True) -> None:
        super().set_adapter(names, trainable)
        self.slot.set_active(self.active_adapters)

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self.slot.set_adapters_enabled(enabled)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if self.row_groups is not None and self.adapters_enabled:
            try:
                return self.row_groups.apply(ids, self._forward_one)
            finally:
                self.slot.set_active(self.active_adapters)
        rows = self.base_layer(ids)
        if not self.adapters_enabled or not self.active_adapters or self.merged_adapters:
            return rows
        return self._adapt(ids, rows)

    def _forward_one(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        rows = self.base_layer(ids)
        if name not in self.adapters:
            return rows
        self.slot.set_active([name])
        return self._adapt(ids, rows)

    def _adapt(self, ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        scale = getattr(self.base_layer, "embed_scale", None)  # Gemma multiplies its rows
        if scale is None:
            return self.slot.adapt(ids, rows)
        return self.slot.adapt(ids, rows / scale) * scale
