"""Decoders of the Llama family: Llama, Mistral, Qwen2, Qwen3 (q and k norms)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from . import attention
from .projections import Source, project
from .registry import fuses, is_fused, undisturbed

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
_GATES = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu", "gelu_pytorch_tanh": "geglu_tanh"}


def _classes(part: str) -> list[str]:
    return [family + part for family in FAMILIES]


@fuses(*_classes("RMSNorm"), needs=("weight", "variance_epsilon"))
def rms_norm(self: nn.Module, plain: Callable[..., Any], hidden_states: torch.Tensor) -> Any:
    if hidden_states.dtype != self.weight.dtype:
        return plain(hidden_states)
    return torch.ops.budwood.rms_norm(hidden_states, self.weight, self.variance_epsilon)


@fuses(*_classes("MLP"), needs=("gate_proj", "up_proj", "down_proj", "config"))
def mlp(self: nn.Module, plain: Callable[..., Any], x: torch.Tensor) -> Any:
    gate = _GATES.get(self.config.hidden_act)
    return plain(x) if gate is None else _mlp(self, Source("plain", x), gate)


@fuses(*_classes("Attention"), needs=("q_proj", "k_proj", "v_proj", "o_proj", "head_dim"))
def self_attention(
    self: nn.Module,
    plain: Callable[..., Any],
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    attention_mask: torch.Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> Any:
    if not _runs_here(self) or position_embeddings is None:
        return plain(
            hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
    source = Source("plain", hidden_states)
    return _attention(
        self, source, position_embeddings, attention_mask, past_key_values, kwargs
    ), None


@fuses(
    *_classes("DecoderLayer"),
    needs=("self_attn", "mlp", "input_layernorm", "post_attention_layernorm"),
)
def decoder_layer(
    self: nn.Module,
    plain: Callable[..., Any],
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = False,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    **kwargs: Any,
) -> Any:
    attn, feed = self.self_attn, self.mlp
    norms = self.input_layernorm, self.post_attention_layernorm
    gate = _GATES.get(getattr(feed.config, "hidden_act", None)) if is_fused(feed) else None
    parts = (attn, feed, *norms)
    fits = (
        position_embeddings is not None
        and gate is not None
        and all(is_fused(part) for part in parts)
        and undisturbed(*parts)
        and _runs_here(attn)
        and all(norm.weight.dtype == hidden_states.dtype for norm in norms)
    )
    if not fits:
        return plain(
            hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
    source = _normed(norms[0], hidden_states)
    options = {"position_ids": position_ids, **kwargs}
    attended = _attention(
        attn, source, position_embeddings, attention_mask, past_key_values, options
    )
    hidden_states = hidden_states + attended
    return hidden_states + _mlp(feed, _normed(norms[1], hidden_states), gate)


def _normed(norm: nn.Module, x: torch.Tensor) -> Source:
    return Source("rms_norm", x, norm.weight, eps=norm.variance_epsilon)


def _runs_here(attn: nn.Module) -> bool:
    return attn.config._attn_implementation == attention.NAME


def _mlp(self: nn.Module, source: Source, gate: str) -> torch.Tensor:
    gate_up = project(source, (self.gate_proj, self.up_proj))
    return project(Source(gate, *gate_up), (self.down_proj,))[0]


def _attention(
    self: nn.Module,
    source: Source,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    mask: torch.Tensor | None,
    cache: Any,
    options: dict[str, Any],
) -> torch.Tensor:
    q, k, v = project(source, (self.q_proj, self.k_proj, self.v_proj))
    batch, t = q.shape[:2]
    q, k, v = (x.view(batch, t, -1, self.head_dim) for x in (q, k, v))
    if hasattr(self, "q_norm"):
        q, k = self.q_norm(q), self.k_norm(k)
    q, k = _rotated(q, k, position_embeddings)
    if cache is not None:
        k, v = cache.update(k.transpose(1, 2), v.transpose(1, 2), self.layer_idx)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    out, _ = attention.attention_forward(
        self,
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        mask,
        dropout=self.attention_dropout if self.training else 0.0,
        scaling=self.scaling,
        sliding_window=getattr(self, "sliding_window", None),
        **options,
    )
    return project(Source("plain", out.reshape(batch, t, -1)), (self.o_proj,))[0]


def _rotated(
    q: torch.Tensor, k: torch.Tensor, embeddings: tuple[torch.Tensor, torch.Tensor]
) -> list[torch.Tensor]:
    batch, t, _, d = q.shape
    cos, sin = (_angles(e, batch, t, d) for e in embeddings)
    return [
        torch.ops.budwood.rotary(x.reshape(batch * t, -1, d), cos, sin).view_as(x) for x in (q, k)
    ]


def _angles(embedding: torch.Tensor, batch: int, t: int, d: int) -> torch.Tensor:
    """cos or sin [1 or batch, t, d], halves equal -> [batch x t, d / 2]; once for all layers."""
    known = getattr(embedding, "_budwood_angles", None)
    if known is None or known.shape[0] != batch * t:
        half = embedding[..., : d // 2].detach().float()
        known = half.expand(batch, t, d // 2).reshape(batch * t, d // 2).contiguous()
        embedding._budwood_angles = known
    return known
