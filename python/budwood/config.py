"""Configurations: the structs, their checks and their JSON are those of C++."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Any

from . import _C
from .errors import Error

LoraConfig = _C.LoraConfig
PeftConfig = _C.PeftConfig


class PeftType(str, Enum):
    """Kinds of adapters."""

    LORA = "LORA"


class TaskType(str, Enum):
    """What a model is for; it chooses the wrapper class and the heads that are trained with it."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


def read_config(folder: Path) -> LoraConfig:
    """The configuration of an adapter folder, which must be one of LoRA."""
    config = PeftConfig.from_pretrained(folder)
    if not isinstance(config, LoraConfig):
        raise Error(
            f"[from_pretrained] {folder} is an adapter of kind {config.peft_type}, not LORA"
        )
    return config


def as_lora_config(config: Any) -> LoraConfig:
    """A budwood config as it is; one of HF PEFT's, converted."""
    if isinstance(config, LoraConfig):
        return config
    kind = type(config)
    if kind.__module__.startswith("peft.") and hasattr(config, "to_dict"):
        text = json.dumps(config.to_dict(), default=_plain)
        converted = PeftConfig.from_json(text, strict=False)
        if isinstance(converted, LoraConfig):
            return converted
    raise Error(f"[get_peft_model] wants a LoraConfig, found {kind.__module__}.{kind.__qualname__}")


def with_task_heads(config: LoraConfig) -> LoraConfig:
    """A copy whose modules_to_save has the heads that are trained with the task."""
    config = config.copy()
    before = list(config.modules_to_save or ())
    added = [name for name in _C.task_heads(config.task_type) if name not in before]
    if added:
        config.modules_to_save = before + added
    return config


def check_adapter_name(name: str) -> None:
    """Refuses names that could not be a part of a parameter's path or a folder."""
    if not name or any(c in name for c in "./\\"):
        raise Error(
            f"[adapter name] a name is not empty and has no '.', '/' or '\\', found {name!r}"
        )


def _plain(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, Enum):
        return value.value
    return value.to_dict()
