"""Adapters of attention, through transformers' attention registry.

Each implementation that a model may have ("sdpa", "budwood", ...) gets a second entry that puts an
adapter's keys and values before those of the call and adds what attends beside it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from .. import _C
from ..errors import Error
from .attached import PlaceSlot, first_of, with_first
from .layout import layout_of

_SUFFIX = "+adapters"


class AttentionPlace(PlaceSlot):
    """The attention of one layer."""

    def __init__(
        self,
        slot: _C.AttentionSlot,
        module: nn.Module,
        projections: tuple[str, ...],
        after_projection: bool,
        owner: nn.Module,
    ) -> None:
        super().__init__(slot)
        self.__dict__.update(
            module=module,
            projections=projections,
            after_projection=after_projection,
            owner=owner,
            waiting=None,
            hidden=None,
            gated=None,
        )
        self._hooks = [module.register_forward_pre_hook(self._see_hidden, with_kwargs=True)]
        if after_projection:
            self._hooks.append(module.register_forward_hook(self._add_waiting))

    def _see_hidden(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.runs() and self.slot.gates_prefix():
            self.__dict__["hidden"] = args[0] if args else kwargs["hidden_states"]

    def prefix(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Keys and values [T, kv_heads, head_dim], or [batch, T, kv_heads, head_dim] with a gate.

        What continues a cache has the gates of the call that started it.
        """
        if not self.slot.gates_prefix():
            return self.slot.prefix()
        hidden, self.__dict__["hidden"] = self.hidden, None
        layout = layout_of(self.owner, hidden)
        if not layout["from_start"]:
            if self.gated is None or len(self.gated[0]) != len(hidden):
                raise Error(
                    "[prefix] a prefix with a gate continues a cache that it did not start: gates "
                    "are those of the tokens of the first call"
                )
            return self.gated
        k, v = self.slot.gated_prefix(hidden, layout)
        self.__dict__["gated"] = None if k.requires_grad else (k, v)
        return k, v

    def _add_waiting(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self.waiting is None:
            return None
        added, self.__dict__["waiting"] = self.waiting, None
        out = first_of(output)
        return with_first(output, out + added.reshape(out.shape).to(out.dtype))

    def project(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states [n, d] -> keys and values [n, kv_heads, head_dim] by the layer's own."""
        names = self.projections
        if len(names) == 1:
            k, v = getattr(self.module, names[0])(hidden[None])[0].chunk(3, -1)[1:]
        else:
            k, v = (getattr(self.module, name)(hidden[None])[0] for name in names)
        d = self.slot.head_dim
        return k.reshape(len(hidden), -1, d), v.reshape(len(hidden), -1, d)


def use_adapted_attention(model: nn.Module) -> None:
    """Has a model call the second entry of its attention implementation."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for config in _configs(model):
        own = config._attn_implementation
        if own is None or own.endswith(_SUFFIX):
            continue
        if own.startswith(("flash", "flex", "paged")):
            raise Error(
                f"[adapters] prefixes are not available with attn_implementation={own!r}: load the "
                "model with 'sdpa'"
            )
        name = own + _SUFFIX
        if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
            eager = own == "eager"
            attend = _eager if eager else ALL_ATTENTION_FUNCTIONS[own]
            ALL_ATTENTION_FUNCTIONS.register(name, _adapted(attend))
            mask = ALL_MASK_ATTENTION_FUNCTIONS["eager"] if eager else sdpa_mask
            ALL_MASK_ATTENTION_FUNCTIONS.register(name, mask)
        config._budwood_attention = own
        config._attn_implementation_internal = name


def restore_attention(model: nn.Module) -> None:
    """Takes that back."""
    for config in _configs(model):
        own = config.__dict__.pop("_budwood_attention", None)
        if own is not None:
            config._attn_implementation_internal = own


def _configs(model: nn.Module) -> list[Any]:
    found = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    return [c for c in found.values() if hasattr(c, "_attn_implementation")]


def _eager(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    **kwargs: Any,
) -> Any:
    """The implementation that each model file has for itself; its masks are what it adds."""
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(
            ~mask, torch.finfo(query.dtype).min
        )
    attend = sys.modules[type(module).__module__].eager_attention_forward
    return attend(module, query, key, value, mask, **kwargs)


def _adapted(attend: Any) -> Any:
    def forward(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        place = module._modules.get("adapters")
        if not isinstance(place, AttentionPlace) or not place.runs():
            return attend(
                module,
                query,
                key,
                value,
                attention_mask,
                scaling=scaling,
                is_causal=is_causal,
                **kwargs,
            )
        k, v = place.prefix()
        if k is not None:
            causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
            attention_mask = _with_prefix(attention_mask, query, key, k.shape[-3], causal)
            key, value = _before(k, key), _before(v, value)
        out, weights = attend(
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=scaling,
            is_causal=is_causal if k is None else False,
            **kwargs,
        )
        return _beside(place, out, query, scaling), weights

    return forward


def _before(prefix: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """[T, kv_heads, d] or [batch, T, kv_heads, d] before [batch, kv_heads, t, d]."""
    prefix = prefix.to(rows.dtype).transpose(-3, -2).expand(rows.shape[0], -1, -1, -1)
    return torch.cat([prefix, rows], 2)


def _with_prefix(
    mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor, count: int, causal: bool
) -> torch.Tensor | None:
    t, keys = query.shape[2], key.shape[2]
    if mask is None:
        if not causal or t == 1:
            return None
        mask = torch.ones(t, keys, dtype=torch.bool, device=query.device).tril(keys - t)
        mask = mask[None, None]
    mask = mask[..., -t:, :keys]
    # Every query sees the prefix.
    seen = mask.new_full((*mask.shape[:-1], count), mask.dtype == torch.bool)
    return torch.cat([seen, mask], -1)


def _beside(
    place: AttentionPlace, out: torch.Tensor, query: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    batch, heads, t, d = query.shape
    flat = query.transpose(1, 2).reshape(batch * t, heads, d)
    scale = d**-0.5 if scaling is None else scaling
    if place.after_projection:
        nothing = torch.zeros_like(flat)
        place.__dict__["waiting"] = place.slot.beside(nothing, flat, scale, place.project)
        return out
    return place.slot.beside(out.reshape(batch * t, heads, -1), flat, scale, place.project).view(
        batch, t, heads, -1
    )
