"""Back-propagation through some tokens alone (TokenTune, arXiv 2501.18824)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .errors import Error

WHERE = "[selective_loss]"


class KeyValues:
    """Stands for a cache of transformers: keeps keys and values of all tokens in one forward, and
    in another puts those of the chosen tokens among them."""

    is_compileable = False

    def __init__(self) -> None:
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.rows: torch.Tensor | None = None
        self.length = 0

    def update(
        self, k: torch.Tensor, v: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.rows is None:
            self.layers[layer_idx] = k.detach(), v.detach()
            return k, v
        index = self.rows[:, None, :, None]
        kept_k, kept_v = self.layers[layer_idx]
        return (
            kept_k.scatter(2, index.expand(-1, k.shape[1], -1, k.shape[3]), k),
            kept_v.scatter(2, index.expand(-1, v.shape[1], -1, v.shape[3]), v),
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, *_: Any) -> tuple[int, int]:
        return self.length, 0

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return -1

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * max(1, len(self.layers))


def selective_loss(
    model: nn.Module,
    input_ids: torch.Tensor,
    labels: torch.Tensor | None = None,
    *,
    amount: float = 16,
    generator: torch.Generator | None = None,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """The mean next-token loss of some tokens of each row of `input_ids` [n, t], without padding.

    Values are those of the whole rows. Hidden states, keys and values of the tokens that are not
    chosen are constants: nothing of them is kept but keys and values, so memory grows with the
    chosen tokens. With all of them chosen it is the model's loss with its gradient.

    The first and the last token of each row are chosen, and others uniformly, among those whose
    next token counts in `labels` (as transformers has them, -100 = does not count) first: `amount`
    of 1 or more is so many, below 1 that part of a row. `rows` int64 [n, k], rising, is a choice.
    For decoder models of transformers that attend through its cache with full attention.
    """
    if input_ids.dim() != 2:
        raise Error(f"{WHERE} input_ids are [rows, tokens], found {list(input_ids.shape)}")
    labels = input_ids if labels is None else labels
    shifted = torch.full_like(labels, -100)
    shifted[:, :-1] = labels[:, 1:]
    if rows is None:
        rows = choose(shifted, amount, generator)
    if rows.dim() != 2 or rows.shape[0] != input_ids.shape[0]:
        raise Error(f"{WHERE} rows are [rows, chosen tokens], found {list(rows.shape)}")
    length = input_ids.shape[1]
    if (rows[:, 1:] <= rows[:, :-1]).any() or rows.min() < 0 or rows.max() >= length:
        raise Error(f"{WHERE} chosen tokens are rising numbers below {length}")

    _require_full_attention(model, length)
    cache = KeyValues()
    cache.length = length
    positions = torch.arange(length, device=input_ids.device)
    with torch.no_grad():
        model(
            input_ids=input_ids,
            position_ids=positions.expand_as(input_ids),
            attention_mask=_causal(positions.expand_as(input_ids), positions, model),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
    if not cache.layers:
        raise Error(f"{WHERE} the model does not attend through transformers' cache")
    cache.rows = rows
    logits = model(
        input_ids=input_ids.gather(1, rows),
        position_ids=rows,
        attention_mask=_causal(rows, positions, model),
        past_key_values=cache,
        use_cache=True,
    ).logits
    targets = shifted.gather(1, rows)
    if not (targets >= 0).any():
        raise Error(f"{WHERE} no chosen token counts in the loss: choose more of them")
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def choose(
    shifted: torch.Tensor, amount: float, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Rows of `selective_loss`: [n, k], rising."""
    n, length = shifted.shape
    if not amount > 0:
        raise Error(f"{WHERE} amount is {amount}, wanted more than 0")
    wanted = int(amount) if amount >= 1 else -int(-amount * length // 1)
    if wanted > length:
        raise Error(
            f"{WHERE} {wanted} tokens are to be chosen of rows of {length}: choose a part of each, "
            "0.25 for one"
        )
    score = torch.rand(n, length, generator=generator) + (shifted >= 0).cpu()
    score[:, 0] = 3.0
    if wanted > 1:
        score[:, -1] = 3.0
    return score.topk(wanted, dim=1).indices.sort(dim=1).values.to(shifted.device)


def _require_full_attention(model: nn.Module, length: int) -> None:
    """Refuses layers that do not see all tokens before their own: the mask here is one for all."""
    config = getattr(model, "config", None)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["full_attention" if window is None else "sliding_attention"]
    for kind in kinds:
        near = kind == "sliding_attention" and window is not None and length <= window
        if kind != "full_attention" and not near:
            raise Error(
                f"{WHERE} the model has layers of {kind!r} and rows of {length} tokens: layers "
                "that see all tokens are wanted (Budwood's C++ models know windows)"
            )


def _causal(mine: torch.Tensor, theirs: torch.Tensor, model: nn.Module) -> torch.Tensor:
    """What is added to scores: queries at `mine` [n, k] see keys at `theirs` [t] up to them."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    hidden = theirs[None, None, None, :] > mine[:, None, :, None]
    return torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)
