"""The C++ slots of a torch model, and the modules that stand for them in it."""

from __future__ import annotations

from typing import Any

from torch import nn

from .. import _C
from ..errors import Error
from ..slots import EmbeddingSlot, LinearSlot, Slot
from ..targets import adaptable_modules, output_embedding
from ..weights import is_linear, weight_parts
from .attached import PlaceSlot
from .attention import AttentionPlace, restore_attention, use_adapted_attention
from .blocks import BlockPlace
from .families import Family, family_of, known_families
from .inputs import ForwardHook, InputPlace

_KEY = "_budwood_mirror"


class Mirror:
    """Slots in C++ for every place of a model. `impl` is what _C.inject and its like take."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.config = getattr(model, "config", None)
        head = output_embedding(model)
        paths = {id(m): path for path, m in model.named_modules()}
        self.impl = _C.Mirror(getattr(self.config, "model_type", "") or "", paths.get(id(head), ""))
        #: Python modules by path, and how to make those that are not there yet.
        self.places: dict[str, Slot] = {}
        self._makers: dict[str, Any] = {}
        self.hook: ForwardHook | None = None
        self.family = family_of(model)
        self._add_layers()
        self._add_input()
        if self.family is not None:
            self._add_blocks(self.family)

    def place(self, path: str) -> Slot:
        """The Python side of a slot, put into the model when it is first asked for."""
        if path not in self.places:
            self.places[path] = self._makers[path]()
            self._watch()
        return self.places[path]

    def explain_no_place(self, peft_type: str) -> str:
        """Why a method found nowhere to attach."""
        kind = getattr(self.config, "model_type", None) or type(self.model).__name__
        return (
            f"[inject] {peft_type} attaches to blocks, attention or the input, and nobody has said "
            f"where these are in a model of type {kind!r}. Known are "
            f"{', '.join(known_families())}; describe another with budwood.register_family"
        )

    def remove(self) -> None:
        """Takes everything out of the model again, but linear and embedding slots."""
        for path, slot in self.places.items():
            if isinstance(slot, PlaceSlot):
                slot.remove()
                parent, _, name = path.rpartition(".")
                self.model.get_submodule(parent)._modules.pop(name, None)
        if self.hook is not None:
            self.hook.remove()
        restore_attention(self.model)
        self.model.__dict__.pop(_KEY, None)

    def _add_layers(self) -> None:
        for path, module in adaptable_modules(self.model):
            base = module.base_layer if isinstance(module, (LinearSlot, EmbeddingSlot)) else module
            if isinstance(base, nn.Embedding):
                slot = self.impl.add_embedding(path, base.weight)
                self._makers[path] = lambda p=path, s=slot: self._embedding(p, s)
            elif is_linear(base):
                parts, form, (out, in_) = weight_parts(base)
                slot = self.impl.add_linear(path, parts, form, out, in_, base.bias)
                self._makers[path] = lambda p=path, s=slot: self._linear(p, s)

    def _linear(self, path: str, slot: _C.LinearSlot) -> LinearSlot:
        from ..switches import replace

        module = self.model.get_submodule(path)
        if not isinstance(module, LinearSlot):
            wrapper = LinearSlot(module).train(module.training)
            replace(self.model, module, wrapper)
            module = wrapper
        module.use_methods(slot)
        return module

    def _embedding(self, path: str, slot: _C.EmbeddingSlot) -> EmbeddingSlot:
        from ..switches import replace

        module = self.model.get_submodule(path)
        if not isinstance(module, EmbeddingSlot):
            wrapper = EmbeddingSlot(module, slot).train(module.training)
            replace(self.model, module, wrapper)
            module = wrapper
        return module

    def _add_input(self) -> None:
        try:
            table = self.model.get_input_embeddings()
        except (AttributeError, NotImplementedError):
            return
        weight = getattr(table, "weight", None)
        if weight is None or weight.dim() != 2:
            return
        slot = self.impl.add_input("input", *weight.shape)
        self._makers["input"] = lambda: self._put("input", InputPlace(slot))

    def _add_blocks(self, family: Family) -> None:
        path, blocks = family.find_blocks(self.model)
        text = getattr(self.config, "text_config", None) or self.config
        hidden = _first(text, "hidden_size", "n_embd", "d_model") or _width(blocks, family)
        heads = _first(text, "num_attention_heads", "n_head", "num_heads")
        kv_heads = getattr(text, "num_key_value_heads", None) or heads
        for layer, block in enumerate(blocks):
            for site in family.sites:
                self._add_site(f"{path}.{layer}", block, site, layer, hidden)
            if family.attention and heads:
                module = block.get_submodule(family.attention)
                dim = getattr(module, "head_dim", None) or getattr(
                    module, "attention_head_size", hidden // heads
                )
                where = f"{path}.{layer}.{family.attention}.adapters"
                slot = self.impl.add_attention(where, layer, heads, kv_heads, dim, hidden)
                self._makers[where] = lambda w=where, s=slot, m=module: self._put(
                    w,
                    AttentionPlace(
                        s, m, family.keys_and_values, family.adds_after_projection, self.model
                    ),
                )

    def _add_site(self, path: str, block: nn.Module, site: Any, layer: int, hidden: int) -> None:
        # The paths are AdapterHub's.
        if site.norm:
            where = f"{path}.{site.stream}.adapters"
        else:
            where = f"{path}." + (
                "attention_adapters" if site.part == "attention" else "output_adapters"
            )
        slot = self.impl.add_block(where, site.part, layer, hidden)
        self._makers[where] = lambda: self._put(where, BlockPlace(slot, self.model, block, site))

    def _put(self, path: str, place: PlaceSlot) -> PlaceSlot:
        parent, _, name = path.rpartition(".")
        module = self.model.get_submodule(parent)
        if name in module._modules:
            raise Error(f"[inject] the model has a module {path!r} of its own")
        module.add_module(name, place.train(module.training))
        return place

    def _watch(self) -> None:
        """The hook before forward and the attention entries, once a place needs them."""
        own = [p for p in self.places.values() if isinstance(p, PlaceSlot)]
        if not own:
            return
        attention = [p for p in own if isinstance(p, AttentionPlace)]
        if attention:
            use_adapted_attention(self.model)
        if self.hook is None:
            place = self.places.get("input") or InputPlace(_C.Mirror("", "").add_input("i", 1, 1))
            self.hook = ForwardHook(self.model, place, attention)
        self.hook.attention = attention
        if "input" in self.places:
            self.hook.place = self.places["input"]


def mirror_of(model: nn.Module, make: bool = True) -> Mirror | None:
    """The mirror of a model; made when there is none yet and `make` says so."""
    mirror = model.__dict__.get(_KEY)
    if mirror is None and make:
        mirror = model.__dict__[_KEY] = Mirror(model)
    return mirror


def _width(blocks: nn.ModuleList, family: Family) -> int:
    """The width of the residual stream, from the norms that read it."""
    for block in blocks:
        for site in family.sites:
            weight = getattr(block.get_submodule(site.norm or site.stream), "weight", None)
            if weight is not None and weight.dim() == 1:
                return len(weight)
    raise Error(
        "[inject] the model's config has no hidden_size, and its blocks no norm that would tell: "
        "set model.config.hidden_size"
    )


def _first(config: Any, *names: str) -> int:
    for name in names:
        if getattr(config, name, None) is not None:
            return int(getattr(config, name))
    return 0
