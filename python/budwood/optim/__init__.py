"""Optimisers for adapters and for whole models, over any torch module.

- `lora_plus_groups`, `LoraFA`: LoRA's factors at rates of their own.
- `AdamW8bit`, `GaLoreAdamW`: AdamW with moments in a byte, or of gradients of low rank.
- `Lomo`, `AdaLomo`: each tensor is updated during the backward; one gradient is alive at a time.
- `LISA`, `BAdam`: a few blocks of a model are trained at a time.
- `MeZO`: no backward at all.
"""

from .blocks import LISA, BAdam
from .fused import AdaLomo, Lomo
from .lora import LoraFA, lora_plus_groups
from .mezo import MeZO
from .rules import AdamW8bit, GaLoreAdamW, galore_groups

__all__ = [
    "LISA",
    "AdaLomo",
    "AdamW8bit",
    "BAdam",
    "GaLoreAdamW",
    "Lomo",
    "LoraFA",
    "MeZO",
    "galore_groups",
    "lora_plus_groups",
]
