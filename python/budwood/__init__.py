"""Budwood: parameter-efficient fine-tuning of torch models."""

from pathlib import Path as _Path

from .version_check import load_extension

load_extension()

from ._build_info import VERSION as __version__  # noqa: E402, F401
from .auto import AutoPeftModelForCausalLM  # noqa: E402
from .config import LoraConfig, PeftConfig, PeftType, TaskType  # noqa: E402
from .errors import Error  # noqa: E402
from .inject import InjectReport, inject_adapter_in_model  # noqa: E402
from .mapping import (  # noqa: E402
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    get_peft_model,
)
from .peft_model import PeftModel  # noqa: E402
from .save_and_load import (  # noqa: E402
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)

# For C++ users: cmake -DCMAKE_PREFIX_PATH=$(python -c 'import budwood; print(budwood.cmake_prefix_path)')
cmake_prefix_path = str(_Path(__file__).parent)

__all__ = [
    "AutoPeftModelForCausalLM",
    "Error",
    "InjectReport",
    "LoraConfig",
    "PeftConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "TaskType",
    "cmake_prefix_path",
    "get_peft_model",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "set_peft_model_state_dict",
]
