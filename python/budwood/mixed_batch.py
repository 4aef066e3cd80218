"""A batch whose rows use different adapters: each slot computes group by group."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .errors import Error
from .methods.attached import PlaceSlot
from .switches import check_names, slots, weight_slots

BASE = "__base__"  #: HF PEFT's name for a row without an adapter


@contextmanager
def use_adapters(model: nn.Module, names: list[str]) -> Iterator[None]:
    """Within, row i of a batch uses the adapter names[i], whatever is active; "__base__" is none.

    A backward of checkpointed blocks has to be within, too. Adapters that read whole sequences
    (prefixes, prompts, bottlenecks, ReFT) cannot differ by row.
    """
    if isinstance(names, str) or not names:
        raise Error(f"[adapter_names] wanted is one name for each row, found {names!r}")
    used = list(dict.fromkeys(name for name in names if name != BASE))
    check_names(model, used, "adapter_names")
    found = list(slots(model))
    for path, slot in found:
        for name in used:
            if isinstance(slot, PlaceSlot) and name in slot.adapter_names():
                kind = slot.adapters[name].impl.config.peft_type
                raise Error(
                    f"[adapter_names] {name!r} is {kind}, which acts on whole sequences at {path}: "
                    "only adapters of layers can differ by row"
                )
    merged = [name for _, slot in weight_slots(model) for name in slot.merged_adapters]
    if merged:
        raise Error(f"[adapter_names] {merged[0]!r} is merged into the base: unmerge it first")
    rows = RowGroups(names)
    for _, slot in found:
        slot.row_groups = rows
    try:
        yield
    finally:
        for _, slot in found:
            slot.row_groups = None


class RowGroups:
    """Which rows use which adapter."""

    def __init__(self, names: list[str]) -> None:
        self.count = len(names)
        self.rows = {
            name: [i for i, other in enumerate(names) if other == name]
            for name in dict.fromkeys(names)
        }

    def apply(
        self, x: torch.Tensor, compute: Callable[[str, torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """compute(name, rows of x) for each group, put together in the order of x.

        x [k n, ...] for n names: each name stands for k rows in succession, as beams or the tokens
        of a flattened batch do.
        """
        times, rest = divmod(len(x), self.count)
        if rest or not times:
            raise Error(
                f"[adapter_names] there are {self.count} names, and a layer reads {len(x)} rows"
            )
        order, results = [], []
        for name, rows in self.rows.items():
            index = torch.tensor(rows, device=x.device)
            if times > 1:
                index = (index[:, None] * times + torch.arange(times, device=x.device)).flatten()
            order.append(index)
            results.append(compute(name, x.index_select(0, index)))
        return torch.cat(results).index_select(0, torch.cat(order).argsort())
