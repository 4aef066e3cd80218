"""GPT-2: layer norms, one matrix for q, k and v, gelu."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from . import attention
from .projections import Source, project
from .registry import fuses, is_fused, undisturbed


@fuses("GPT2MLP", needs=("c_fc", "c_proj", "act", "dropout"))
def mlp(self: nn.Module, plain: Callable[..., Any], hidden_states: torch.Tensor) -> Any:
    reading = activation_of(self.act)
    if reading is None:
        return plain(hidden_states)
    return _mlp(self, Source("plain", hidden_states), reading)


@fuses("GPT2Block", needs=("ln_1", "attn", "ln_2", "mlp"))
def block(
    self: nn.Module,
    plain: Callable[..., Any],
    hidden_states: torch.Tensor,
    past_key_values: Any = None,
    attention_mask: torch.Tensor | None = None,
    encoder_hidden_states: torch.Tensor | None = None,
    encoder_attention_mask: torch.Tensor | None = None,
    use_cache: bool | None = False,
    **kwargs: Any,
) -> Any:
    attn, feed = self.attn, self.mlp
    parts = (attn, feed, self.ln_1, self.ln_2)
    reading = activation_of(feed.act) if is_fused(feed) else None
    fits = (
        encoder_hidden_states is None
        and not attn.is_cross_attention
        and reading is not None
        and undisturbed(*parts)
        and attn.config._attn_implementation == attention.NAME
        and all(n.weight.dtype == hidden_states.dtype for n in (self.ln_1, self.ln_2))
    )
    if not fits:
        return plain(
            hidden_states,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            use_cache=use_cache,
            **kwargs,
        )
    attended = _attention(
        attn, _normed(self.ln_1, hidden_states), attention_mask, past_key_values, kwargs
    )
    hidden_states = hidden_states + attended
    return hidden_states + _mlp(feed, _normed(self.ln_2, hidden_states), reading)


def activation_of(act: Any) -> str | None:
    """The reading that an activation of transformers is, or None."""
    names = {
        "NewGELUActivation": "gelu_tanh",
        "GELUTanh": "gelu_tanh",
        "PytorchGELUTanh": "gelu_tanh",
        "GELUActivation": "gelu",
    }
    return names.get(type(act).__name__)


def _normed(norm: nn.LayerNorm, x: torch.Tensor) -> Source:
    return Source("layer_norm", x, norm.weight, norm.bias, eps=norm.eps)


def _mlp(self: nn.Module, source: Source, reading: str) -> torch.Tensor:
    inner = project(source, (self.c_fc,))[0]
    return self.dropout(project(Source(reading, inner), (self.c_proj,))[0])


def _attention(
    self: nn.Module,
    source: Source,
    mask: torch.Tensor | None,
    cache: Any,
    options: dict[str, Any],
) -> torch.Tensor:
    qkv = project(source, (self.c_attn,))[0]
    batch, t = qkv.shape[:2]
    q, k, v = (
        x.view(batch, t, -1, self.head_dim).transpose(1, 2)
        for x in qkv.split(self.split_size, dim=2)
    )
    if cache is not None:
        cache = getattr(cache, "self_attention_cache", cache)
        k, v = cache.update(k, v, self.layer_idx)
    dropout = self.attn_dropout.p if self.training else 0.0
    out, _ = attention.attention_forward(
        self, q, k, v, mask, dropout=dropout, scaling=self.scaling, **options
    )
    out = project(Source("plain", out.reshape(batch, t, -1)), (self.c_proj,))[0]
    return self.resid_dropout(out)
