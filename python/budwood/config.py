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
AdaLoraConfig = _C.AdaLoraConfig
AdaptionPromptConfig = _C.AdaptionPromptConfig
BottleneckConfig = _C.BottleneckConfig
CompacterConfig = _C.CompacterConfig
DyLoraConfig = _C.DyLoraConfig
IA3Config = _C.IA3Config
ParallelAdapterConfig = _C.ParallelAdapterConfig
PrefixTuningConfig = _C.PrefixTuningConfig
PromptEncoderConfig = _C.PromptEncoderConfig
PromptTuningConfig = _C.PromptTuningConfig
ReftConfig = _C.ReftConfig
VeraConfig = _C.VeraConfig
PeqaConfig = _C.PeqaConfig


class PeftType(str, Enum):
    """Kinds of adapters."""

    LORA = "LORA"
    ADALORA = "ADALORA"
    ADAPTION_PROMPT = "ADAPTION_PROMPT"
    BOTTLENECK = "BOTTLENECK"
    COMPACTER = "COMPACTER"
    DYLORA = "DYLORA"
    IA3 = "IA3"
    PARALLEL_ADAPTER = "PARALLEL_ADAPTER"
    PREFIX_TUNING = "PREFIX_TUNING"
    PROMPT_TUNING = "PROMPT_TUNING"
    P_TUNING = "P_TUNING"
    REFT = "REFT"
    VERA = "VERA"


class TaskType(str, Enum):
    """What a model is for; it chooses the wrapper class and the heads that are trained with it."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


def read_config(folder: Path) -> PeftConfig:
    """The configuration of an adapter folder, of budwood, HF PEFT or AdapterHub."""
    if _C.is_adapterhub_folder(str(folder)):
        return _C.adapterhub_config((Path(folder) / "adapter_config.json").read_text("utf-8"))
    return PeftConfig.from_pretrained(folder)


def as_config(config: Any) -> PeftConfig:
    """A budwood config as it is; one of HF PEFT's, converted."""
    if isinstance(config, PeftConfig):
        return config
    kind = type(config)
    if kind.__module__.startswith("peft.") and hasattr(config, "to_dict"):
        text = json.dumps(config.to_dict(), default=_plain)
        return PeftConfig.from_json(text, strict=False)
    raise Error(
        f"[get_peft_model] wants a configuration of budwood or peft, found "
        f"{kind.__module__}.{kind.__qualname__}"
    )


def is_plain_lora(config: PeftConfig) -> bool:
    """Whether a config is LoRA whose factors are the whole adapter: what Python slots hold."""
    if not isinstance(config, LoraConfig):
        return False
    init = config.init_lora_weights
    principal = isinstance(init, str) and (init == "olora" or init.startswith("pissa"))
    more = config.use_dora or config.use_qalora or principal
    return not more and config.trainable_token_indices is None


def with_task_heads(config: PeftConfig) -> PeftConfig:
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
