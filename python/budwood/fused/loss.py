"""A causal language model's head and loss in one operator: no logits of all tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .llama import FAMILIES
from .projections import projection_of
from .registry import fuses


@fuses(
    *[f"{family}ForCausalLM" for family in FAMILIES],
    "GPT2LMHeadModel",
    needs=("lm_head", "config"),
)
def causal_lm(
    self: nn.Module,
    plain: Callable[..., Any],
    input_ids: torch.Tensor | None = None,
    *args: Any,
    labels: torch.Tensor | None = None,
    logits_to_keep: int | torch.Tensor = 0,
    **kwargs: Any,
) -> Any:
    """While training with labels the output has no logits: they are never made."""
    head = self.lm_head
    whole = isinstance(logits_to_keep, int) and logits_to_keep == 0
    asked = [kwargs.get(k) for k in ("output_hidden_states", "output_attentions")]
    return_dict = kwargs.get("return_dict")
    takes_part = (
        self.training
        and labels is not None
        and whole
        and not args
        and not any(asked)
        and return_dict is not False
        and kwargs.get("encoder_hidden_states") is None
        and _is_standard(self)
    )
    if takes_part:
        dtype = head.weight.dtype
        projection = projection_of(head, dtype)
        takes_part = projection is not None and projection[3] is None and projection[4] is None
    if not takes_part:
        return plain(input_ids, *args, labels=labels, logits_to_keep=logits_to_keep, **kwargs)
    from transformers.modeling_outputs import CausalLMOutputWithPast

    options = {n: kwargs.pop(n, None) for n in ("num_items_in_batch", "shift_labels")}
    ignore = kwargs.pop("ignore_index", -100)
    kwargs.pop("return_dict", None)
    if kwargs.get("use_cache") is None:
        kwargs["use_cache"] = False
    body = getattr(self, self.base_model_prefix)
    out = body(input_ids=input_ids, **kwargs)
    hidden = out.last_hidden_state
    targets = options["shift_labels"]
    if targets is None:
        targets = F.pad(labels, (0, 1), value=ignore)[..., 1:]
    targets = targets.reshape(-1).to(hidden.device)
    targets = torch.where(targets == ignore, -100, targets)
    loss = mean_loss(hidden.reshape(-1, hidden.shape[-1]), targets, projection, options)
    return CausalLMOutputWithPast(loss=loss, past_key_values=out.past_key_values)


def mean_loss(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    projection: tuple[Any, ...],
    options: dict[str, Any],
) -> torch.Tensor:
    """The sum of token losses over how many count, or over num_items_in_batch where it is given."""
    parts, form, shape = projection[:3]
    total = torch.ops.budwood.linear_cross_entropy(hidden, parts, form, shape, targets)
    count = options["num_items_in_batch"]
    if count is None:
        count = (targets >= 0).sum().clamp(min=1)  # nothing counted: a loss of zero
    if torch.is_tensor(count):
        count = count.to(total.device)
    return total / count


def _is_standard(model: nn.Module) -> bool:
    """Whether the model computes the library's own causal loss: users can give it another."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    return getattr(model, "loss_function", None) is ForCausalLMLoss
