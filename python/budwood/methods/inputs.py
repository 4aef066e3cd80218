"""Virtual tokens in the embedded input, and positions behind a prefix: a hook before forward."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from .. import _C
from ..errors import Error
from .attached import PlaceSlot
from .attention import AttentionPlace
from .layout import past_length, see


class InputPlace(PlaceSlot):
    """The embedded input of a model."""

    def __init__(self, slot: _C.InputSlot) -> None:
        super().__init__(slot)
        self.__dict__.update(first_mask=None, first_length=0)


class ForwardHook:
    """Looks at every call of a model, and changes what the active adapters ask for."""

    def __init__(
        self, model: nn.Module, place: InputPlace, attention: list[AttentionPlace]
    ) -> None:
        self.model, self.place, self.attention = model, place, attention
        self.names = list(inspect.signature(model.forward).parameters)
        self.handle = model.register_forward_pre_hook(self, with_kwargs=True)

    def remove(self) -> None:
        self.handle.remove()

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs = {**dict(zip(self.names, args, strict=False)), **kwargs}
        past = past_length(kwargs)
        if self.place.runs():
            self._put_tokens(kwargs, past)
        prefix = self._prefix()
        if prefix > 0:
            self._shift_positions(kwargs, past, prefix)
        see(self.model, kwargs.get("attention_mask"), past)
        return (), kwargs

    def _prefix(self) -> int:
        """How far prefixes move the positions of the tokens."""
        running = (place for place in self.attention if place.runs())
        return max((place.slot.position_shift() for place in running), default=0)

    def _shift_positions(self, kwargs: dict[str, Any], past: int, prefix: int) -> None:
        if "position_ids" not in self.names:
            return
        positions = kwargs.get("position_ids")
        if positions is None:
            ids = kwargs.get("input_ids")
            rows = kwargs["inputs_embeds"] if ids is None else ids
            mask = kwargs.get("attention_mask")
            positions = _positions(mask, rows.shape[0], rows.shape[1], past, rows.device)
        kwargs["position_ids"] = positions + prefix

    def _put_tokens(self, kwargs: dict[str, Any], past: int) -> None:
        place = self.place
        count = place.slot.virtual_tokens()
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        if past > 0:
            # The tokens stand in the cache: only the mask and positions have to know.
            if mask is not None and place.first_mask is not None:
                kwargs["attention_mask"] = torch.cat(
                    [place.first_mask.to(mask), mask[:, place.first_length :]], 1
                )
            if kwargs.get("position_ids") is not None:
                kwargs["position_ids"] = kwargs["position_ids"] + count
            return
        if ids is None:
            raise Error("[forward] virtual tokens go among input_ids; found only inputs_embeds")
        if mask is None:
            mask = torch.ones_like(ids)
        labels = kwargs.get("labels")
        index = self._index(ids, mask, labels, count)
        late = place.slot.among_embeddings()
        embedded = None if late else self.model.get_input_embeddings()(ids)
        width = index.shape[1]
        rows = torch.where(
            index >= 0,
            index + ids.shape[1] * torch.arange(len(ids), device=ids.device)[:, None],
            index,
        )
        if late:
            self._put_later(rows)
        else:
            kwargs["inputs_embeds"] = self._with_tokens(embedded, rows)
            kwargs["input_ids"] = None
        real = index >= 0
        source = index.clamp_min(0)
        full_mask = torch.where(real, mask.gather(1, source), torch.ones_like(source).to(mask))
        kwargs["attention_mask"] = full_mask
        place.__dict__.update(first_mask=full_mask.detach(), first_length=ids.shape[1])
        if labels is not None and labels.shape == ids.shape:
            kwargs["labels"] = torch.where(real, labels.gather(1, source), -100)
        types = kwargs.get("token_type_ids")
        if types is not None and not late:
            kwargs["token_type_ids"] = torch.where(real, types.gather(1, source), 0)
        left_padded = bool((full_mask[:, 0] == 0).any())
        if not late and (
            kwargs.get("position_ids") is not None or (left_padded and "position_ids" in self.names)
        ):
            kwargs["position_ids"] = _positions(full_mask, len(ids), width, 0, ids.device)

    def _with_tokens(self, embedded: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Rows of `embedded`, with virtual tokens where `rows` [batch, t + count] is negative."""
        flat = embedded.reshape(-1, embedded.shape[-1])
        gathered = flat.index_select(0, rows.clamp_min(0).flatten())
        full = self.place.slot.forward(gathered, rows.flatten().tolist())
        return full.view(*rows.shape, -1)

    def _put_later(self, rows: torch.Tensor) -> None:
        """Has the next result of the encoder's embeddings take the tokens in."""
        paths = [path for path, _ in self.model.named_modules() if path.endswith("embeddings")]
        module = self.model.get_submodule(min(paths, key=len)) if paths else None
        table = self.model.get_input_embeddings()
        if module is None or module is table or table not in list(module.modules()):
            raise Error(
                "[forward] virtual tokens among='embeddings' are for encoders, whose module "
                "'embeddings' adds positions to words"
            )

        def put(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            handle.remove()
            return self._with_tokens(output, rows)

        handle = module.register_forward_hook(put)

    def _index(
        self, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor | None, count: int
    ) -> torch.Tensor:
        """[batch, t + count]: the place in its row, or -1 - v for virtual token v."""
        batch, t = ids.shape
        there = mask.ne(0)
        lengths = there.sum(1).tolist()
        cu = [0]
        for n in lengths:
            cu.append(cu[-1] + n)
        own = torch.arange(t, device=ids.device)
        places = [own[there[row]].tolist() for row in range(batch)]
        prompt: list[int] = []
        if labels is not None and labels.shape == ids.shape:
            for row in range(batch):
                kept = [i for i, at in enumerate(places[row]) if int(labels[row, at]) != -100]
                prompt.append(kept[0] if kept else lengths[row])
        layout = {"cu": cu, "prompt": prompt, "padding": [], "from_start": True}
        rows, full_cu = self.place.slot.insert(layout)
        flat = [at for row in places for at in row]
        index = []
        for row in range(batch):
            inner = [r if r < 0 else flat[r] for r in rows[full_cu[row] : full_cu[row + 1]]]
            first = places[row][0] if places[row] else t
            last = places[row][-1] + 1 if places[row] else t
            index.append([*range(first), *inner, *range(last, t)])
        return torch.tensor(index, device=ids.device)


def _positions(
    mask: torch.Tensor | None, batch: int, t: int, past: int, device: torch.device
) -> torch.Tensor:
    if mask is None or mask.dim() != 2:
        return torch.arange(past, past + t, device=device).expand(batch, t)
    return (mask.long().cumsum(1) - 1).clamp_min(0)[:, -t:]
