"""`get_peft_model` and the wrapper classes by task."""

from __future__ import annotations

from torch import nn

from .config import PeftConfig, TaskType, as_config
from .peft_model import PeftModel


class PeftModelForCausalLM(PeftModel):
    """A causal language model with adapters."""


class PeftModelForSeq2SeqLM(PeftModel):
    """An encoder-decoder language model with adapters."""


class PeftModelForFeatureExtraction(PeftModel):
    """A model whose hidden states are used, with adapters."""


class PeftModelForSequenceClassification(PeftModel):
    """A sequence classifier with adapters; its head is trained as a full copy."""


class PeftModelForTokenClassification(PeftModel):
    """A token classifier with adapters; its head is trained as a full copy."""


class PeftModelForQuestionAnswering(PeftModel):
    """An extractive question answering model with adapters; its head is trained as a full copy."""


_BY_TASK = {
    TaskType.CAUSAL_LM: PeftModelForCausalLM,
    TaskType.SEQ_2_SEQ_LM: PeftModelForSeq2SeqLM,
    TaskType.FEATURE_EXTRACTION: PeftModelForFeatureExtraction,
    TaskType.SEQ_CLS: PeftModelForSequenceClassification,
    TaskType.TOKEN_CLS: PeftModelForTokenClassification,
    TaskType.QUESTION_ANS: PeftModelForQuestionAnswering,
}


def peft_model_class(task_type: TaskType | str | None) -> type[PeftModel]:
    """The wrapper class of a task; PeftModel without one."""
    return PeftModel if task_type is None else _BY_TASK[TaskType(task_type)]


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    autocast_adapter_dtype: bool = True,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Attaches a new adapter to any torch model, freezes the rest, and returns the wrapped model.

    The model is changed in place. On a 16 bit base the adapter is fp32, unless
    `autocast_adapter_dtype` is False. `low_cpu_mem_usage` has no effect.

        model = budwood.get_peft_model(model, budwood.LoraConfig(r=16, target_modules=["q_proj"]))
        model.print_trainable_parameters()
    """
    config = as_config(peft_config)
    wrapper = peft_model_class(config.task_type)
    return wrapper(model, config, adapter_name, autocast_adapter_dtype)
