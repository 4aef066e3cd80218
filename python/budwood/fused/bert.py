"""Encoders of BERT's shape: BERT and RoBERTa. Norms come after the residual sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from . import attention
from .gpt2 import activation_of
from .projections import Source, project
from .registry import fuses, undisturbed

FAMILIES = ("Bert", "Roberta")


def _classes(part: str) -> list[str]:
    return [family + part for family in FAMILIES]


@fuses(*_classes("SelfAttention"), needs=("query", "key", "value", "attention_head_size"))
def self_attention(
    self: nn.Module,
    plain: Callable[..., Any],
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> Any:
    if past_key_values is not None or self.config._attn_implementation != attention.NAME:
        return plain(
            hidden_states, attention_mask=attention_mask, past_key_values=past_key_values, **kwargs
        )
    batch, t = hidden_states.shape[:2]
    q, k, v = (
        x.view(batch, t, -1, self.attention_head_size).transpose(1, 2)
        for x in project(Source("plain", hidden_states), (self.query, self.key, self.value))
    )
    dropout = self.dropout.p if self.training else 0.0
    out, weights = attention.attention_forward(
        self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
    )
    return out.reshape(batch, t, -1), weights


@fuses(*_classes("SelfOutput"), *_classes("Output"), needs=("dense", "dropout", "LayerNorm"))
def output(
    self: nn.Module,
    plain: Callable[..., Any],
    hidden_states: torch.Tensor,
    input_tensor: torch.Tensor,
) -> Any:
    return _output(self, Source("plain", hidden_states), input_tensor)


@fuses(*_classes("Layer"), needs=("attention", "intermediate", "output"))
def layer(
    self: nn.Module,
    plain: Callable[..., Any],
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    encoder_hidden_states: torch.Tensor | None = None,
    encoder_attention_mask: torch.Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> Any:
    reading = activation_of(self.intermediate.intermediate_act_fn)
    fits = (
        reading is not None
        and encoder_hidden_states is None
        and not self.chunk_size_feed_forward
        and undisturbed(self.intermediate, self.output)
    )
    if not fits:
        return plain(
            hidden_states,
            attention_mask,
            encoder_hidden_states,
            encoder_attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
    attended = self.attention(
        hidden_states, attention_mask, past_key_values=past_key_values, **kwargs
    )[0]
    inner = project(Source("plain", attended), (self.intermediate.dense,))[0]
    return _output(self.output, Source(reading, inner), attended)


def _output(self: nn.Module, source: Source, residual: torch.Tensor) -> torch.Tensor:
    hidden = self.dropout(project(source, (self.dense,))[0]) + residual
    norm = self.LayerNorm
    plain_norm = type(norm) is nn.LayerNorm and undisturbed(norm) and norm.bias is not None
    if not plain_norm or norm.weight.dtype != hidden.dtype:
        return norm(hidden)
    return torch.ops.budwood.layer_norm(hidden, norm.weight, norm.bias, norm.eps)
