"""Hugging Face's gradient checkpointing leaves the gradients of every kind of adapter alone."""

import pytest
import torch
from test_methods import batch, randomise, tiny

import budwood

METHODS = {
    "dora": lambda: budwood.LoraConfig(r=2, use_dora=True, target_modules="all-linear"),
    "houlsby": lambda: budwood.BottleneckConfig.houlsby(),
    "compacter": lambda: budwood.CompacterConfig(reduction_factor=4),
    "prefix": lambda: budwood.PrefixTuningConfig(num_virtual_tokens=3),
    "prefix_mlp": lambda: budwood.PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True),
    "prefix_gated": lambda: budwood.PrefixTuningConfig(num_virtual_tokens=3, gating="shared"),
    "llama_adapter": lambda: budwood.AdaptionPromptConfig(adapter_len=3, adapter_layers=2),
    "prompt": lambda: budwood.PromptTuningConfig(num_virtual_tokens=3, placement="after_bos"),
    "reft": lambda: budwood.ReftConfig(r=2),
}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_the_same_with_checkpointing(method, family, reentrant):
    model = budwood.get_peft_model(tiny(family), METHODS[method]())
    randomise(model)
    model.train()
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        model(**batch(family), use_cache=False).loss.backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    assert found[0]
    for name, grad in found[0].items():
        assert torch.allclose(found[1][name], grad, rtol=1e-4, atol=1e-6), name
