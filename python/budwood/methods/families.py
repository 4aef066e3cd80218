"""Where in the models of a family adapters of blocks, attention and input attach.

A model of one's own is described in a few lines:

    budwood.register_family("my_type", Family(
        blocks="encoder.layers",
        attention="attn",
        sites=(Site("attention", output="attn", stream="norm1"),
               Site("feed_forward", output="mlp", stream="norm2")),
    ))

after which every method works on models whose `config.model_type` is "my_type", or on any model
with `model.budwood_family = "my_type"`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..errors import Error


@dataclass(frozen=True)
class Site:
    """The output of a sub-layer of a block. Paths are relative to the block."""

    part: str  #: "attention" or "feed_forward"
    output: str  #: the module whose output (the first, of several) goes into the residual stream
    #: the module that reads the residual stream as it was before the sub-layer: its first argument,
    #: or with norms that come after the sub-layer, its second
    stream: str
    #: where norms come after: the norm of the sum. Then `stream` is the module that adds.
    norm: str | None = None


@dataclass(frozen=True)
class Family:
    """A family of models that are built alike."""

    blocks: str  #: path of the list of blocks, or its end
    sites: tuple[Site, ...]
    #: the module in a block that calls transformers' attention interface; None = there is none
    attention: str | None = None
    #: its key and value projections (one name: keys and values are its last two thirds)
    keys_and_values: tuple[str, ...] = ()
    #: what a LLaMA-Adapter attends to is added behind the output projection, as HF PEFT does here
    adds_after_projection: bool = False

    def find_blocks(self, model: nn.Module) -> tuple[str, nn.ModuleList]:
        """The list of blocks with its path."""
        found = [
            (path, module)
            for path, module in model.named_modules()
            if isinstance(module, nn.ModuleList)
            and (path == self.blocks or path.endswith("." + self.blocks))
        ]
        if not found:
            raise Error(f"[adapters] {type(model).__name__} has no list of blocks {self.blocks!r}")
        return found[0]


def _before(attention: str, norm1: str, mlp: str, norm2: str) -> tuple[Site, ...]:
    return (Site("attention", attention, norm1), Site("feed_forward", mlp, norm2))


_LLAMA = Family(
    "layers",
    _before("self_attn", "input_layernorm", "mlp", "post_attention_layernorm"),
    "self_attn",
    ("k_proj", "v_proj"),
)
_GEMMA2 = Family(
    "layers",
    _before(
        "post_attention_layernorm",
        "input_layernorm",
        "post_feedforward_layernorm",
        "pre_feedforward_layernorm",
    ),
    "self_attn",
    ("k_proj", "v_proj"),
)
_BERT = Family(
    "encoder.layer",
    (
        Site(
            "attention",
            "attention.output.dropout",
            "attention.output",
            "attention.output.LayerNorm",
        ),
        Site("feed_forward", "output.dropout", "output", "output.LayerNorm"),
    ),
    "attention.self",
    ("key", "value"),
)

_FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3"), _LLAMA),
    **dict.fromkeys(("gemma2", "gemma3", "gemma3_text"), _GEMMA2),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "camembert"), _BERT),
    "phi": Family(
        "layers",
        _before("self_attn", "input_layernorm", "mlp", "input_layernorm"),
        "self_attn",
        ("k_proj", "v_proj"),
    ),
    "gpt2": Family(
        "h",
        _before("attn", "ln_1", "mlp", "ln_2"),
        "attn",
        ("c_attn",),
        adds_after_projection=True,
    ),
    "opt": Family(
        "layers",
        _before("self_attn", "self_attn_layer_norm", "fc2", "final_layer_norm"),
        "self_attn",
        ("k_proj", "v_proj"),
    ),
    "vit": Family(
        "layers",
        _before("attention", "layernorm_before", "mlp", "layernorm_after"),
        "attention",
        ("k_proj", "v_proj"),
    ),
    "t5": Family(
        "encoder.block",
        _before(
            "layer.0.SelfAttention",
            "layer.0.layer_norm",
            "layer.1.DenseReluDense",
            "layer.1.layer_norm",
        ),
    ),
}


def register_family(model_type: str, family: Family) -> None:
    """Adds a family, or replaces one."""
    _FAMILIES[model_type] = family


def family_of(model: nn.Module) -> Family | None:
    """The family of a model, None for one that nobody described."""
    config = getattr(model, "config", None)
    name = getattr(model, "budwood_family", None) or getattr(config, "model_type", None)
    family = _FAMILIES.get(name) if isinstance(name, str) else None
    if name == "opt" and not getattr(config, "do_layer_norm_before", True):
        return None  # its norms come after the sub-layers, and the sums are not modules
    return family


def known_families() -> list[str]:
    """The model types that are described."""
    return sorted(_FAMILIES)
