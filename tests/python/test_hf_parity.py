"""Whole transformers models: the same numbers as HF PEFT, and folders that go both ways."""

import copy
import json

import peft
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import budwood

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
    "max_position_embeddings": 64,
}


def build(family, seed=0, **extra):
    torch.manual_seed(seed)
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2, **extra)).eval()
    if family == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**SMALL, num_key_value_heads=2, **extra)).eval()
    if family == "gpt2":
        config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96, n_positions=64, **extra)
        return GPT2LMHeadModel(config).eval()
    return BertForSequenceClassification(BertConfig(**SMALL, num_labels=3, **extra)).eval()


TASK = {"llama": "CAUSAL_LM", "qwen2": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS"}


def batch(family, seed=5):
    torch.manual_seed(seed)
    ids = torch.randint(0, 96, (3, 7))
    return {"input_ids": ids, "labels": torch.tensor([0, 2, 1]) if family == "bert" else ids}


def rel(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


def randomise(model, seed=9):
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                if "lora_" in name:
                    parameter.normal_(std=0.2)
                else:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)


def wrapped(family, lib, seed=0, **config):
    config = {"r": 4, "lora_alpha": 8, "task_type": TASK[family], **config}
    torch.manual_seed(seed + 1)
    return lib.get_peft_model(build(family), lib.LoraConfig(**config))


CASES = [
    ("llama", {}),
    ("llama", {"target_modules": "all-linear", "use_rslora": True}),
    ("llama", {"target_modules": r".*\.(q_proj|down_proj)", "r": 3}),
    (
        "llama",
        {
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {r"layers\.0.*q_proj": 2, "down_proj": 6},
            "alpha_pattern": {"down_proj": 3},
            "use_rslora": True,
        },
    ),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    ("llama", {"target_modules": ["up_proj"], "modules_to_save": ["lm_head"]}),
    ("qwen2", {}),
    ("qwen2", {"target_modules": ["q_proj", "o_proj"], "bias": "all"}),
    ("qwen2", {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"}),
    ("qwen2", {"target_modules": ["q_proj"], "lora_bias": True}),
    ("gpt2", {}),
    ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "bias": "all"}),
    ("bert", {}),
    ("bert", {"target_modules": ["query", "value", "dense"], "exclude_modules": ["pooler.dense"]}),
    ("bert", {"bias": "all"}),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "config"), CASES)
def test_logits_gradients_and_folders_equal_peft(family, config, tmp_path):
    ours, theirs = wrapped(family, budwood, **config), wrapped(family, peft, **config)
    mine, other = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(other)
    for name in mine:
        assert torch.equal(mine[name], other[name]), name
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    for model in (ours, theirs):
        randomise(model)
    inputs = batch(family)
    a, b = ours(**inputs), theirs(**inputs)
    assert rel(a.logits, b.logits) < 1e-4
    a.loss.backward()
    b.loss.backward()
    gradients = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    # A key's bias shifts all scores of a row alike: its gradient is zero but for the rounding of
    # larger ones.
    largest = max(g.norm().item() for g in gradients.values())
    for name, parameter in ours.named_parameters():
        assert parameter.requires_grad == (name in gradients), name
        if parameter.requires_grad:
            difference = (parameter.grad - gradients[name]).norm().item()
            size = max(gradients[name].norm().item(), 1e-3 * largest)
            assert difference < 1e-4 * size, name

    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = peft.PeftModel.from_pretrained(build(family), tmp_path / "ours").eval()
    assert rel(loaded(**inputs).logits, a.logits) < 1e-4
    loaded = budwood.PeftModel.from_pretrained(build(family), tmp_path / "theirs")
    assert rel(loaded(**inputs).logits, b.logits) < 1e-4
    loaded = budwood.PeftModel.from_pretrained(build(family), tmp_path / "ours")
    assert torch.equal(loaded(**inputs).logits, a.logits)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generation_equals_peft(family):
    ours, theirs = wrapped(family, budwood), wrapped(family, peft)
    for model in (ours, theirs):
        randomise(model)
    ids = batch(family)["input_ids"]
    arguments = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": 95}
    assert torch.equal(
        ours.generate(input_ids=ids, **arguments), theirs.generate(input_ids=ids, **arguments)
    )


def test_a_pickled_adapter_of_peft_loads(tmp_path):
    theirs = wrapped("llama", peft)
    randomise(theirs)
    theirs.save_pretrained(tmp_path, safe_serialization=False)
    loaded = budwood.PeftModel.from_pretrained(build("llama"), tmp_path)
    inputs = batch("llama")
    assert rel(loaded(**inputs).logits, theirs(**inputs).logits) < 1e-4


def test_several_adapters_are_saved_as_peft_saves_them(tmp_path):
    config = {"r": 2, "target_modules": ["o_proj"], "task_type": "CAUSAL_LM"}
    ours, theirs = wrapped("llama", budwood), wrapped("llama", peft)
    for model, lib in ((ours, budwood), (theirs, peft)):
        model.add_adapter("second", lib.LoraConfig(**config))
        model.set_adapter("second")
        randomise(model)
    ours.save_pretrained(tmp_path)
    assert (tmp_path / "second" / "adapter_model.safetensors").is_file()
    loaded = peft.PeftModel.from_pretrained(build("llama"), tmp_path)
    loaded.load_adapter(tmp_path / "second", "second")
    loaded.set_adapter("second")
    inputs = batch("llama")
    assert rel(loaded(**inputs).logits, ours(**inputs).logits) < 1e-4
    assert rel(theirs(**inputs).logits, ours(**inputs).logits) < 1e-4


@pytest.mark.parametrize(
    ("kind", "weights"), [("cat", [0.7, -0.4]), ("svd", [0.7, -0.4]), ("linear", [0.7, -0.4])]
)
def test_weighted_adapters_equal_peft(kind, weights):
    ours, theirs = wrapped("llama", budwood), wrapped("llama", peft)
    for model, lib in ((ours, budwood), (theirs, peft)):
        second = lib.LoraConfig(
            r=4 if kind == "linear" else 2, lora_alpha=3, target_modules=["q_proj", "v_proj"]
        )
        model.add_adapter("second", second)
        model.set_requires_grad(["default", "second"])
        randomise(model)
        model.add_weighted_adapter(["default", "second"], weights, "mixed", combination_type=kind)
        model.set_adapter("mixed")
    inputs = batch("llama")
    assert rel(ours(**inputs).logits, theirs(**inputs).logits) < 1e-4


def test_cat_is_the_weighted_sum_of_the_adapters():
    ours = wrapped("llama", budwood)
    ours.add_adapter("second", budwood.LoraConfig(r=7, target_modules=["q_proj", "up_proj"]))
    ours.set_requires_grad(["default", "second"])
    randomise(ours)
    ours.add_weighted_adapter(["default", "second"], [0.5, -2.0], "mixed", "cat")
    model = ours.get_base_model().model.layers[0]
    slot = model.self_attn.q_proj
    wanted = 0.5 * slot.delta("default") - 2.0 * slot.delta("second")
    assert rel(slot.delta("mixed"), wanted) < 1e-6
    assert rel(model.mlp.up_proj.delta("mixed"), -2.0 * model.mlp.up_proj.delta("second")) < 1e-6
    assert (
        rel(model.self_attn.v_proj.delta("mixed"), 0.5 * model.self_attn.v_proj.delta("default"))
        < 1e-6
    )


def test_merge_and_unload_gives_a_plain_model_that_transformers_saves(tmp_path):
    ours = wrapped("llama", budwood, target_modules="all-linear")
    randomise(ours)
    inputs = batch("llama")
    adapted = ours(**inputs).logits
    plain = ours.merge_and_unload()
    assert type(plain) is LlamaForCausalLM
    assert set(plain.state_dict()) == set(build("llama").state_dict())
    assert rel(plain(**inputs).logits, adapted) < 1e-4
    plain.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert rel(again(**inputs).logits, adapted) < 1e-4


@pytest.mark.filterwarnings("ignore")
def test_merging_a_tied_head_leaves_the_embedding_and_survives_a_reload(tmp_path):
    model = build("llama", tie_word_embeddings=True)
    ours = budwood.get_peft_model(model, budwood.LoraConfig(target_modules=["lm_head"], r=4))
    randomise(ours)
    inputs = batch("llama")
    adapted = ours(**inputs).logits
    table = model.model.embed_tokens.weight.clone()
    plain = ours.merge_and_unload()
    assert torch.equal(plain.model.embed_tokens.weight, table)
    assert rel(plain(**inputs).logits, adapted) < 1e-4
    plain.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert rel(again(**inputs).logits, adapted) < 1e-4


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_the_head_goes_both_ways(tmp_path):
    config = {"target_modules": ["lm_head", "q_proj"]}
    ours, theirs = wrapped("llama", budwood, **config), wrapped("llama", peft, **config)
    inputs = batch("llama")
    for model in (ours, theirs):
        randomise(model)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "ours")
    assert rel(loaded(**inputs).logits, ours(**inputs).logits) < 1e-4
    loaded = budwood.PeftModel.from_pretrained(build("llama"), tmp_path / "theirs")
    assert rel(loaded(**inputs).logits, ours(**inputs).logits) < 1e-4


def test_a_resized_vocabulary_travels_with_the_adapter(tmp_path):
    base = build("llama")
    base.save_pretrained(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    model.resize_token_embeddings(100)
    config = budwood.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    ours = budwood.get_peft_model(model, config)
    randomise(ours)
    ours.save_pretrained(tmp_path / "adapter")
    inputs = batch("llama")
    other = LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    with pytest.raises(budwood.Error, match="resize the model's token embeddings first"):
        budwood.PeftModel.from_pretrained(other, tmp_path / "adapter")
    other.resize_token_embeddings(100)
    loaded = budwood.PeftModel.from_pretrained(other, tmp_path / "adapter")
    assert torch.equal(loaded(**inputs).logits, ours(**inputs).logits)


def test_auto_model_loads_base_and_adapter(tmp_path):
    build("llama").save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    config = budwood.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    ours = budwood.get_peft_model(base, config)
    randomise(ours)
    ours.save_pretrained(tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(tmp_path / "base")
    inputs = batch("llama")
    loaded = budwood.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert isinstance(loaded, budwood.PeftModelForCausalLM)
    assert torch.equal(loaded(**inputs).logits, ours(**inputs).logits)
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert rel(theirs(**inputs).logits, ours(**inputs).logits) < 1e-4


def test_injection_without_a_wrapper_equals_peft():
    config = {"r": 4, "target_modules": ["q_proj", "down_proj"]}
    torch.manual_seed(1)
    ours = budwood.inject_adapter_in_model(budwood.LoraConfig(**config), build("llama"))
    torch.manual_seed(1)
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(**config), build("llama"))
    mine, other = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(other)
    assert all(torch.equal(mine[name], other[name]) for name in mine)
    tensors = budwood.get_peft_model_state_dict(ours)
    wanted = peft.get_peft_model_state_dict(theirs)
    assert tensors.keys() == wanted.keys()
    fresh = budwood.inject_adapter_in_model(budwood.LoraConfig(**config), build("llama"))
    budwood.set_peft_model_state_dict(fresh, wanted)
    again = budwood.get_peft_model_state_dict(fresh)
    assert all(torch.equal(again[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_checkpointing_under_frozen_embeddings_keeps_the_gradients(reentrant, before):
    plain = wrapped("llama", budwood)
    randomise(plain)
    plain.train()
    inputs = batch("llama")
    plain(**inputs).loss.backward()
    wanted = {n: p.grad for n, p in plain.named_parameters() if p.requires_grad}

    how = {"use_reentrant": reentrant}
    base = build("llama")
    if before:
        base.gradient_checkpointing_enable(how)
    config = budwood.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM")
    model = budwood.get_peft_model(base, config)
    if not before:
        model.gradient_checkpointing_enable(how)
    model.load_state_dict(copy.deepcopy(plain.state_dict()))
    model.train()
    model(**inputs, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert rel(parameter.grad, wanted[name]) < 1e-5, name
