"""Budwood: parameter-efficient fine-tuning of torch models.

With torch imported, importing budwood registers torch.ops.budwood.*. Without, names load on first
use, so that what needs no torch (the command line's help) does not wait for it.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import optim
    from .auto import AutoPeftModelForCausalLM
    from .config import (
        AdaLoraConfig,
        AdaptionPromptConfig,
        BottleneckConfig,
        CompacterConfig,
        DyLoraConfig,
        IA3Config,
        LoraConfig,
        ParallelAdapterConfig,
        PeftConfig,
        PeftType,
        PeqaConfig,
        PrefixTuningConfig,
        PromptEncoderConfig,
        PromptTuningConfig,
        ReftConfig,
        TaskType,
        VeraConfig,
    )
    from .errors import Error
    from .fused import OptimizeReport, optimize, unoptimize
    from .inject import InjectReport, inject_adapter_in_model
    from .mapping import (
        PeftModelForCausalLM,
        PeftModelForFeatureExtraction,
        PeftModelForQuestionAnswering,
        PeftModelForSeq2SeqLM,
        PeftModelForSequenceClassification,
        PeftModelForTokenClassification,
        get_peft_model,
    )
    from .memory import activation_dtype, memory_pool
    from .merging import combine_files, convert, extract, merge_files, unmerge_files, verify_files
    from .methods import Family, Site, register_family
    from .peft_model import PeftModel
    from .quantized import (
        QuantizedLinear,
        prepare_model_for_kbit_training,
        quantize_linear,
        quantize_model,
    )
    from .quantized_start import start_from_original
    from .save_and_load import get_peft_model_state_dict, set_peft_model_state_dict
    from .selective import selective_loss

_HOME = {
    "AutoPeftModelForCausalLM": "auto",
    "Error": "errors",
    "InjectReport": "inject",
    "OptimizeReport": "fused",
    "activation_dtype": "memory",
    "memory_pool": "memory",
    "combine_files": "merging",
    "convert": "merging",
    "extract": "merging",
    "merge_files": "merging",
    "unmerge_files": "merging",
    "verify_files": "merging",
    "optimize": "fused",
    "unoptimize": "fused",
    "LoraConfig": "config",
    "AdaLoraConfig": "config",
    "AdaptionPromptConfig": "config",
    "BottleneckConfig": "config",
    "CompacterConfig": "config",
    "DyLoraConfig": "config",
    "IA3Config": "config",
    "ParallelAdapterConfig": "config",
    "PrefixTuningConfig": "config",
    "PromptEncoderConfig": "config",
    "PromptTuningConfig": "config",
    "ReftConfig": "config",
    "VeraConfig": "config",
    "PeqaConfig": "config",
    "Family": "methods",
    "Site": "methods",
    "register_family": "methods",
    "PeftConfig": "config",
    "PeftModel": "peft_model",
    "PeftModelForCausalLM": "mapping",
    "PeftModelForFeatureExtraction": "mapping",
    "PeftModelForQuestionAnswering": "mapping",
    "PeftModelForSeq2SeqLM": "mapping",
    "PeftModelForSequenceClassification": "mapping",
    "PeftModelForTokenClassification": "mapping",
    "PeftType": "config",
    "QuantizedLinear": "quantized",
    "TaskType": "config",
    "get_peft_model": "mapping",
    "get_peft_model_state_dict": "save_and_load",
    "inject_adapter_in_model": "inject",
    "prepare_model_for_kbit_training": "quantized",
    "quantize_linear": "quantized",
    "quantize_model": "quantized",
    "selective_loss": "selective",
    "set_peft_model_state_dict": "save_and_load",
    "start_from_original": "quantized_start",
}

# For C++: cmake -DCMAKE_PREFIX_PATH=$(python -c 'import budwood; print(budwood.cmake_prefix_path)')
cmake_prefix_path = str(Path(__file__).parent)

__all__ = [
    "AdaLoraConfig",
    "AdaptionPromptConfig",
    "AutoPeftModelForCausalLM",
    "BottleneckConfig",
    "CompacterConfig",
    "DyLoraConfig",
    "Error",
    "Family",
    "IA3Config",
    "InjectReport",
    "LoraConfig",
    "OptimizeReport",
    "ParallelAdapterConfig",
    "PeftConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "PeqaConfig",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptTuningConfig",
    "QuantizedLinear",
    "ReftConfig",
    "Site",
    "TaskType",
    "VeraConfig",
    "activation_dtype",
    "cmake_prefix_path",
    "combine_files",
    "convert",
    "extract",
    "get_peft_model",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "memory_pool",
    "merge_files",
    "optim",
    "optimize",
    "prepare_model_for_kbit_training",
    "quantize_linear",
    "quantize_model",
    "register_family",
    "selective_loss",
    "set_peft_model_state_dict",
    "start_from_original",
    "unmerge_files",
    "unoptimize",
    "verify_files",
]


def _load() -> object:
    from .version_check import load_extension

    return load_extension()


def __getattr__(name: str) -> object:
    if name == "__version__":
        return importlib.import_module("._build_info", __name__).VERSION
    if name == "_C":
        return _load()
    if name == "optim":
        _load()
        return importlib.import_module(".optim", __name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _load()
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])


if "torch" in sys.modules:
    _load()
