"""An entry of transformers' attention registry, "budwood": attention without padding or scores.

A mask is read once: where it says nothing but "the sequences lie here, causal (within a window) or
not", padded places are left out and sequences of all rows are attended to end to end. Any other
mask, dropout of scores, and steps of generation go to transformers' own SDPA entry, with that mask.
The result at padded places is zero.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

NAME = "budwood"


@dataclass
class Layout:
    """Where the sequences of padded rows lie. `queries` and `keys` pick the kept places out of
    [batch x length], None = all."""

    cu_q: list[int]
    cu_k: list[int]
    queries: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    causal: bool = True
    window: int = 0


def register() -> None:
    """Makes the entry known to transformers."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, attention_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' interface: query [batch, heads, t, d] -> [batch, t, heads, d]."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    layout = None
    if query.shape[2] > 1 and dropout == 0.0 and not torch.compiler.is_compiling():
        layout = layout_of(attention_mask, q.shape[0], q.shape[1], k.shape[1], causal, kwargs)
    if layout is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )
    return attend(q, k, v, layout, scaling), None


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, scaling: float | None
) -> torch.Tensor:
    """q [batch, t, heads, d], k and v [batch, tk, kv_heads, d] -> [batch, t, heads, d]."""
    batch, t, heads, d = q.shape
    q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    if layout.queries is not None:
        q = q.index_select(0, layout.queries)
    if layout.keys is not None:
        k, v = k.index_select(0, layout.keys), v.index_select(0, layout.keys)
    out = torch.ops.budwood.attention(
        q,
        k,
        v,
        layout.cu_q,
        layout.cu_k,
        d**-0.5 if scaling is None else scaling,
        layout.causal,
        layout.window,
    )
    if layout.queries is not None:
        whole = out.new_zeros(batch * t, heads, v.shape[-1])
        out = whole.index_copy(0, layout.queries, out)
    return out.view(batch, t, heads, v.shape[-1])


def layout_of(
    mask: torch.Tensor | None,
    batch: int,
    t: int,
    keys: int,
    causal: bool,
    options: dict[str, Any],
) -> Layout | None:
    """The layout that a mask stands for; None when it stands for something else."""
    if any(options.get(name) is not None for name in ("position_bias", "s_aux", "softcap")):
        return None
    if mask is None:
        if causal and keys != t:  # SDPA's causal mask starts at the first key then
            return None
        cu_q, cu_k = ([n * i for i in range(batch + 1)] for n in (t, keys))
        return Layout(cu_q, cu_k, causal=causal)
    # All layers of a forward get the same tensor.
    known = getattr(mask, "_budwood_layout", None)
    if known is None or known[0] != mask._version:
        known = (mask._version, _read(mask, batch, t, keys))
        mask._budwood_layout = known
    return known[1]


def _read(mask: torch.Tensor, batch: int, t: int, keys: int) -> Layout | None:
    if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1] != 1:
        return None
    if mask.shape[2] != t or mask.shape[3] != keys or keys < t:
        return None
    seen = mask[:, 0].expand(batch, t, keys)
    places = torch.arange(keys, device=mask.device)
    count = seen.sum(-1)
    first = seen.int().argmax(-1)
    last = keys - 1 - seen.flip(-1).int().argmax(-1)
    if not bool(((last - first + 1 == count) | (count == 0)).all()):
        return None
    own = places[keys - t :].expand(batch, t)  # the key of a query's own place
    alive = seen.gather(-1, own[..., None])[..., 0]
    if not bool(alive.any()):
        return None
    causal = bool((last == own)[alive].all())
    layout = _causal(seen, first, count, alive, own) if causal else None
    return layout or _encoder(first, last, alive, own)


def _causal(
    seen: torch.Tensor,
    first: torch.Tensor,
    count: torch.Tensor,
    alive: torch.Tensor,
    own: torch.Tensor,
) -> Layout | None:
    batch, t, keys = seen.shape
    # A sequence starts at a row's first query and where a query sees itself alone.
    starts = alive & (first == own)
    head = alive & (alive.cumsum(1) == 1)
    starts |= head
    start = torch.where(starts, first, torch.zeros_like(first)).cummax(1).values
    window = 0
    if not torch.equal(first[alive], start[alive]):
        window = int(count[alive].max())
        if not torch.equal(first[alive], torch.maximum(start, own - window + 1)[alive]):
            return None
    cu_q, cu_k, queries, kept_keys = [0], [0], [], []
    for row in range(batch):
        at = alive[row].nonzero()[:, 0]
        if len(at) == 0:
            continue
        if int(at[-1] - at[0]) + 1 != len(at):
            return None
        begins = [*starts[row].nonzero()[:, 0].tolist(), int(at[-1]) + 1]
        for begin, end in itertools.pairwise(begins):
            from_key, to_key = int(first[row, begin]), int(own[row, end - 1]) + 1
            queries.append(torch.arange(begin, end, device=own.device) + row * t)
            kept_keys.append(torch.arange(from_key, to_key, device=own.device) + row * keys)
            cu_q.append(cu_q[-1] + end - begin)
            cu_k.append(cu_k[-1] + to_key - from_key)
    return _layout(cu_q, cu_k, queries, kept_keys, batch * t, batch * keys, True, window)


def _encoder(
    first: torch.Tensor, last: torch.Tensor, alive: torch.Tensor, own: torch.Tensor
) -> Layout | None:
    batch, t = alive.shape
    keys = int(own[0, -1]) + 1
    cu_q, cu_k, queries, kept_keys = [0], [0], [], []
    for row in range(batch):
        at = alive[row].nonzero()[:, 0]
        if len(at) == 0:
            continue
        from_key, to_key = int(first[row, at[0]]), int(last[row, at[0]]) + 1
        same = (first[row, at] == from_key).all() and (last[row, at] == to_key - 1).all()
        if not bool(same):
            return None
        queries.append(at + row * t)
        kept_keys.append(torch.arange(from_key, to_key, device=own.device) + row * keys)
        cu_q.append(cu_q[-1] + len(at))
        cu_k.append(cu_k[-1] + to_key - from_key)
    return _layout(cu_q, cu_k, queries, kept_keys, batch * t, batch * keys, False, 0)


def _layout(
    cu_q: list[int],
    cu_k: list[int],
    queries: list[torch.Tensor],
    keys: list[torch.Tensor],
    all_queries: int,
    all_keys: int,
    causal: bool,
    window: int,
) -> Layout:
    return Layout(
        cu_q,
        cu_k,
        None if cu_q[-1] == all_queries else torch.cat(queries),
        None if cu_k[-1] == all_keys else torch.cat(keys),
        causal,
        window,
    )
