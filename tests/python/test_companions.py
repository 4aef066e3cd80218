"""Whole layers and single tokens that are trained beside a method."""

import copy

import pytest
import torch
import transformers
from test_methods import randomise, tiny

import budwood
from budwood import _C

IDS = torch.tensor([[5, 9, 3, 17, 11], [9, 4, 8, 5, 30]])


def config(**more):
    return budwood.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **more)


def tied(family):
    model = tiny(family)
    if family == "llama":
        model.config.tie_word_embeddings = True
        model.tie_weights()
    return model


CASES = {
    "tokens": {"trainable_token_indices": [5, 9, 30]},
    "head": {"modules_to_save": ["lm_head"]},
    "table": {"modules_to_save": ["embed_tokens"]},
    "head and tokens": {
        "modules_to_save": ["o_proj"],
        "trainable_token_indices": {"embed_tokens": [3, 4]},
    },
}


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_cpp_trains_merges_and_saves_them(case, is_tied, tmp_path):
    base = tied("llama") if is_tied else tiny("llama")
    base.save_pretrained(tmp_path / "base")
    cpp = _C.load_model(str(tmp_path / "base"))
    _C.inject(cpp, config(**CASES[case]), seed=1)
    cpp.eval()
    with torch.no_grad():
        before = base(input_ids=IDS).logits
        assert torch.allclose(cpp.forward(IDS), before, rtol=1e-4, atol=1e-5)
    parameters = _C.trainable_parameters(cpp)
    with torch.no_grad():
        torch.manual_seed(3)
        for _, p in parameters:
            p.add_(torch.randn_like(p) * 0.1)
    cpp.forward(IDS).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for _, p in parameters)
    with torch.no_grad():
        wanted = cpp.forward(IDS)
    assert not torch.allclose(wanted, before, atol=1e-3)

    # The file means the same in the Python model.
    _C.save_adapter(cpp, str(tmp_path / "adapter"))
    python = budwood.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.allclose(python(input_ids=IDS).logits, wanted, rtol=1e-4, atol=2e-5)
        merged = python.merge_and_unload()
        assert torch.allclose(merged(input_ids=IDS).logits, wanted, rtol=1e-4, atol=2e-5)

    _C.merge(cpp)
    with torch.no_grad():
        assert torch.allclose(cpp.forward(IDS), wanted, rtol=1e-4, atol=2e-5)
    _C.save_model(cpp, str(tmp_path / "merged"))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert torch.allclose(again(input_ids=IDS).logits, wanted, rtol=1e-4, atol=2e-5)
    _C.unmerge(cpp)
    with torch.no_grad():
        assert torch.equal(cpp.forward(IDS), wanted)
        _C.set_adapters_enabled(cpp, False)
        assert torch.allclose(cpp.forward(IDS), before, rtol=1e-4, atol=1e-5)


def test_only_the_chosen_tokens_move():
    base = tied("llama")
    model = budwood.get_peft_model(copy.deepcopy(base), config(trainable_token_indices=[5, 9]))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    merged = model.merge_and_unload()
    moved = (merged.get_input_embeddings().weight != base.get_input_embeddings().weight).any(1)
    assert moved.nonzero().flatten().tolist() == [5, 9]
    head = (merged.lm_head.weight != base.lm_head.weight).any(1)
    assert head.nonzero().flatten().tolist() == [5, 9]


def test_a_model_with_another_method_keeps_them_too(tmp_path):
    base = tiny("llama")
    base.save_pretrained(tmp_path / "base")
    cpp = _C.load_model(str(tmp_path / "base"))
    ours = budwood.PrefixTuningConfig(num_virtual_tokens=3)
    ours.modules_to_save = ["lm_head"]
    _C.inject(cpp, ours, seed=1)
    names = [name for name, _ in _C.trainable_parameters(cpp)]
    assert any("lm_head" in name for name in names)
    model = budwood.get_peft_model(copy.deepcopy(base), ours)
    randomise(model)
    model.eval().save_pretrained(tmp_path / "adapter")
    fresh = _C.load_model(str(tmp_path / "base"))
    _C.load_adapter(fresh, str(tmp_path / "adapter"))
    with torch.no_grad():
        wanted = model(input_ids=IDS).logits
        assert torch.allclose(fresh.forward(IDS), wanted, rtol=1e-4, atol=2e-5)
