"""`optimize`: fused operators for a model of transformers, in place."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch import nn

from ..errors import Error
from . import attention, bert, gpt2, llama, loss  # noqa: F401  (families register themselves)
from .registry import Forward, fused_forward, is_fused, known_classes


@dataclass
class OptimizeReport:
    """What `optimize` did: how many modules of each class run fused, and what was left and why."""

    fused: Counter[str] = field(default_factory=Counter)
    left: list[str] = field(default_factory=list)
    attention: str = ""

    def __str__(self) -> str:
        lines = [f"{count} x {name}" for name, count in sorted(self.fused.items())]
        return "\n".join([f"attention: {self.attention}", *lines, *self.left])


def optimize(model: nn.Module) -> nn.Module:
    """Puts Budwood's fused operators into a model of transformers; returns the same model.

    For Llama, Mistral, Qwen2, Qwen3, GPT-2 and BERT, bare or wrapped by budwood or HF PEFT, before
    or after adapters are attached. Norms, rotary embeddings, attention and gated activations run as
    one operator each; projections of one input run together, with their LoRA terms, and keep no
    normed or activated input for the backward; while training with labels, the head and the
    cross-entropy are one operator, so the output then has a loss and no logits.

    Results are those of the plain model to rounding. What the fused code does not cover runs as
    before: dropout of attention scores, unusual masks, modules with hooks, autocast,
    torch.compile. Parameters, names and files do not change. `unoptimize` takes it all back;
    `model.budwood_report` says what was done.
    """
    report = OptimizeReport()
    for name, module in model.named_modules():
        if is_fused(module) or fused_forward(module) is None:
            continue
        if "forward" in module.__dict__:
            report.left.append(f"{name}: its forward was replaced by something else")
            continue
        cls = type(module).__name__
        module.forward = Forward(module, cls)
        report.fused[cls] += 1
    if not report.fused:
        if any(is_fused(m) for m in model.modules()):
            return model
        raise Error(
            f"[optimize] {type(model).__name__} has no module with a fused forward; there are for "
            f"{', '.join(known_classes())}"
        )
    report.attention = _switch_attention(model)
    model.budwood_report = report
    return model


def unoptimize(model: nn.Module) -> nn.Module:
    """Takes back what `optimize` did; returns the same model."""
    for module in model.modules():
        if is_fused(module):
            del module.forward
        config = getattr(module, "config", None)
        before = module.__dict__.pop("_attention_before_budwood", None)
        if before is not None:
            config._attn_implementation = before
        module.__dict__.pop("budwood_report", None)
    return model


def _switch_attention(model: nn.Module) -> str:
    """Chooses our attention for every transformers model inside; masks stay right either way."""
    attention.register()
    names = []
    for module in model.modules():
        config = getattr(module, "config", None)
        if not hasattr(module, "set_attn_implementation") or config is None:
            continue
        before = config._attn_implementation
        if before not in ("sdpa", "eager"):
            names.append(before)
            continue
        module.__dict__["_attention_before_budwood"] = before
        config._attn_implementation = attention.NAME
        names.append(attention.NAME)
    return ", ".join(dict.fromkeys(names)) or "unchanged"
