"""LoRA+ and LoRA-FA against their formulas and HF PEFT's optimisers."""

import copy

import peft
import pytest
import torch
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from test_methods import batch, peft_config, tiny

import budwood
from budwood import optim


def model_of(family="llama", method="lora"):
    base = tiny(family)
    torch.manual_seed(4)
    return budwood.get_peft_model(base, peft_config(method, family))


def train(model, optimizer, rows, steps=4):
    for _ in range(steps):
        optimizer.zero_grad()
        model(**rows).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("method", ["lora", "dora", "lora_embedding", "vera", "ia3", "p_tuning"])
def test_the_groups_hold_each_trained_tensor_once(method):
    model = model_of(method=method)
    groups = optim.lora_plus_groups(model, lr=1e-3, weight_decay=0.1)
    found = [id(p) for group in groups for p in group["params"]]
    wanted = [id(p) for p in model.parameters() if p.requires_grad]
    assert sorted(found) == sorted(set(wanted))
    for group in groups:
        assert group["weight_decay"] == 0 or all(p.dim() > 1 for p in group["params"])


def test_ratio_one_is_plain_lora_bit_for_bit():
    rows, results = batch("llama"), []
    for grouped in (False, True):
        model = model_of()
        parameters = (
            optim.lora_plus_groups(model, lr=1e-2, ratio=1)
            if grouped
            else [p for p in model.parameters() if p.requires_grad]
        )
        train(model, torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0), rows)
        results.append([p.detach().clone() for p in model.parameters() if p.requires_grad])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_lora_plus_is_hf_pefts():
    base, rows, config = tiny("llama"), batch("llama"), peft_config("lora", "llama")
    torch.manual_seed(4)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    ours = model_of()
    train(
        theirs,
        create_loraplus_optimizer(
            theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8, weight_decay=0
        ),
        rows,
    )
    train(ours, torch.optim.AdamW(optim.lora_plus_groups(ours, lr=1e-3, ratio=8)), rows)
    wanted = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        if p.requires_grad:
            assert torch.allclose(p, wanted[name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_lora_fa_moves_b_alone(method):
    rows, model = batch("llama"), model_of(method=method)
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    optimizer = optim.LoraFA(model, lr=1e-2)
    train(model, optimizer, rows)
    moved = {k for k, p in model.named_parameters() if not torch.equal(p, before[k])}
    assert any("lora_B" in k for k in moved)
    assert not any("lora_A" in k for k in moved)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}


def test_lora_fa_is_hf_pefts(monkeypatch):
    # It would round the corrected gradient to bfloat16.
    monkeypatch.setattr(peft.optimizers.lorafa, "is_bf16_available", lambda: False)
    base, rows, config = tiny("llama"), batch("llama"), peft_config("lora", "llama")
    torch.manual_seed(4)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    ours = model_of()
    optimizer = create_lorafa_optimizer(theirs, r=4, lora_alpha=6, lr=1e-3, weight_decay=0.0)
    for group in optimizer.param_groups:
        group["eps"] = 1e-15  # which it adds before it corrects the bias, and torch after
    train(theirs, optimizer, rows, steps=2)
    train(ours, optim.LoraFA(ours, lr=1e-3, weight_decay=0.0, eps=1e-15), rows, steps=2)
    wanted = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        if "lora_" in name:
            assert torch.allclose(p, wanted[name], rtol=1e-3, atol=1e-5), name


def test_bad_values_are_named():
    with pytest.raises(budwood.Error, match="ratio"):
        optim.lora_plus_groups(model_of(), lr=1e-3, ratio=0)
    with pytest.raises(budwood.Error, match="no active LoRA"):
        optim.LoraFA(model_of(method="prompt"))
