"""Adapter and base model in one call."""

from __future__ import annotations

import os
from typing import Any

from .adapter_folder import find_folder
from .config import read_config
from .errors import Error
from .mapping import peft_model_class
from .peft_model import PeftModel


class AutoPeftModelForCausalLM:
    """Loads the base model that an adapter names, then the adapter."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Other arguments go to transformers' AutoModelForCausalLM.from_pretrained."""
        from transformers import AutoModelForCausalLM

        folder = find_folder(pretrained_model_name_or_path, subfolder)
        config = read_config(folder)
        base = config.base_model_name_or_path
        if not base:
            raise Error(
                f"[AutoPeftModelForCausalLM] {folder} does not say its base_model_name_or_path: "
                "load the base model yourself and use PeftModel.from_pretrained"
            )
        if config.task_type not in (None, "CAUSAL_LM"):
            raise Error(
                f"[AutoPeftModelForCausalLM] wants an adapter of task_type CAUSAL_LM, found "
                f"{config.task_type}"
            )
        if config.revision is not None:
            kwargs.setdefault("revision", config.revision)
        model = AutoModelForCausalLM.from_pretrained(base, **kwargs)
        wrapper = peft_model_class("CAUSAL_LM")
        return wrapper.from_pretrained(model, folder, adapter_name, is_trainable, config=config)
