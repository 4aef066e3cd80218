"""What methods are asked that cannot be: errors that name both sides, and nothing has changed."""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_methods import tiny

import budwood
from budwood import _C

IDS = torch.tensor([[5, 9, 3, 17, 11]])


def sides(folder, family="llama"):
    """(attach(config), load(folder), logits()) of a Python and of a C++ model."""
    base = tiny(family)
    base.save_pretrained(folder / "base")
    cpp = (_C.load_bert if family == "bert" else _C.load_model)(str(folder / "base"))

    def cpp_logits():
        cpp.eval()
        return cpp.classify(_C.TokenBatch.from_rows(IDS)) if family == "bert" else cpp.forward(IDS)

    python = copy.deepcopy(base)
    return [
        (
            lambda config: budwood.get_peft_model(python, config),
            lambda saved: budwood.PeftModel.from_pretrained(python, saved),
            lambda: python.eval()(input_ids=IDS).logits,
        ),
        (
            lambda config: _C.inject(cpp, config),
            lambda saved: _C.load_adapter(cpp, str(saved)),
            cpp_logits,
        ),
    ]


def refuse(call, logits, message):
    with torch.no_grad():
        before = logits()
        with pytest.raises(budwood.Error, match=message):
            call()
        assert torch.equal(logits(), before), "a refusal leaves the model as it was"


CANNOT_ATTACH = [
    (
        lambda: budwood.IA3Config(target_modules=["embed_tokens"], feedforward_modules=[]),
        r"IA3 attaches to Linear slots.*embed_tokens",
    ),
    (
        lambda: budwood.VeraConfig(r=4, target_modules=["embed_tokens"]),
        r"VERA attaches to Linear slots.*embed_tokens",
    ),
    (lambda: budwood.LoraConfig(target_modules=["q_proj", "qq_proj"]), r"qq_proj"),
    (lambda: budwood.IA3Config(target_modules=["q_prj"], feedforward_modules=[]), r"q_prj"),
    (
        lambda: budwood.LoraConfig(target_modules=["q_proj"], layers_to_transform=[7]),
        r"in the layers of layers_to_transform",
    ),
    (lambda: budwood.BottleneckConfig(leave_out=[0, 9]), r"leave_out.*9"),
    (lambda: budwood.BottleneckConfig(leave_out=[0, 1, 2]), r"BOTTLENECK"),
    (lambda: budwood.AdaptionPromptConfig(adapter_len=2, adapter_layers=9), r"9.*3"),
    (lambda: budwood.ReftConfig(r=64), r"64.*32"),
    (lambda: budwood.ReftConfig(r=2, layers=[5]), r"5"),
    (
        lambda: budwood.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["headd"]),
        r"'headd' matches no module",
    ),
    (
        lambda: budwood.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[61]),
        r"61.*61 rows",
    ),
    (
        lambda: budwood.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 3]),
        r"3 twice",
    ),
    (
        lambda: budwood.LoraConfig(target_modules=["q_proj"], trainable_token_indices={"wte": [3]}),
        r"'wte'",
    ),
    (
        lambda: budwood.LoraConfig(target_modules=["embed_tokens"], trainable_token_indices=[3]),
        r"embed_tokens.*LORA",
    ),
    (
        lambda: budwood.LoraConfig(r=40, target_modules=["k_proj"], init_lora_weights="pissa"),
        r"40.*\[16, 32\]",
    ),
    (lambda: budwood.CompacterConfig(phm_dim=5), r"5"),
]


@pytest.mark.parametrize(("config", "message"), CANNOT_ATTACH)
def test_what_cannot_attach_is_named(config, message, tmp_path):
    for attach, _, logits in sides(tmp_path):
        refuse(lambda a=attach: a(config()), logits, message)


@pytest.mark.parametrize("placement", ["9", "front:2,7:2"])
def test_virtual_tokens_outside_the_input_are_named(placement, tmp_path):
    python, cpp = sides(tmp_path)
    config = budwood.PromptTuningConfig(num_virtual_tokens=4, placement=placement)
    for attach, _, logits in (python, cpp):
        attach(config.copy())
        with pytest.raises(budwood.Error, match=r"5 tokens.*token [97]"):
            logits()


def other(family="llama", **changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    return LlamaForCausalLM(LlamaConfig(**{**config, **changes}))


METHODS = {
    "lora": lambda: budwood.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    "ia3": lambda: budwood.IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
    "vera": lambda: budwood.VeraConfig(r=2, target_modules=["q_proj"]),
    "adalora": lambda: budwood.AdaLoraConfig(total_step=9, target_modules=["q_proj"]),
    "houlsby": lambda: budwood.BottleneckConfig.houlsby(),
    "compacter": lambda: budwood.CompacterConfig(reduction_factor=4),
    "prefix": lambda: budwood.PrefixTuningConfig(num_virtual_tokens=3),
    "prompt": lambda: budwood.PromptTuningConfig(num_virtual_tokens=3),
    "llama_adapter": lambda: budwood.AdaptionPromptConfig(adapter_len=3, adapter_layers=3),
    "reft": lambda: budwood.ReftConfig(r=2),
}
CHANGES = {
    "width": {"hidden_size": 64},
    "layers": {"num_hidden_layers": 4},
    "heads": {"num_key_value_heads": 4},
}
#: What does not know of heads, or of layers.
INDEPENDENT = {
    *((m, "heads") for m in ("houlsby", "compacter", "prompt", "llama_adapter", "reft")),
    *((m, "heads") for m in ("vera", "adalora")),
    ("prompt", "layers"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("method", METHODS)
def test_a_file_for_another_model_is_refused(method, change, tmp_path):
    if (method, change) in INDEPENDENT:
        return
    model = budwood.get_peft_model(other(**CHANGES[change]), METHODS[method]())
    model.save_pretrained(tmp_path / "adapter")
    for _, load, logits in sides(tmp_path):
        refuse(lambda f=load: f(tmp_path / "adapter"), logits, r"\d")


@pytest.mark.parametrize("method", METHODS)
def test_a_damaged_file_is_refused(method, tmp_path):
    model = budwood.get_peft_model(tiny("llama"), METHODS[method]())
    model.save_pretrained(tmp_path / "good")
    tensors = load_file(tmp_path / "good" / "adapter_model.safetensors")
    first = next(k for k in tensors if not k.startswith("budwood."))
    damages = {
        "missing": {k: t for k, t in tensors.items() if k != first},
        "unknown": {**tensors, "base_model.model.nonsense.weight": torch.zeros(2)},
        "nan": {**tensors, first: torch.full_like(tensors[first], float("nan"))},
        "shape": {**tensors, first: torch.zeros(3, 5, 2)},
    }
    for kind, damaged in damages.items():
        shutil.copytree(tmp_path / "good", tmp_path / kind)
        save_file(damaged, tmp_path / kind / "adapter_model.safetensors")
        said = "nonsense" if kind == "unknown" else first.split(".")[-1]
        for _, load, logits in sides(tmp_path):
            refuse(lambda f=load, k=kind: f(tmp_path / k), logits, said)
    (tmp_path / "cut").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        data = (tmp_path / "good" / name).read_bytes()
        (tmp_path / "cut" / name).write_bytes(data if name.endswith("json") else data[:-3])
    for _, load, logits in sides(tmp_path):
        refuse(lambda f=load: f(tmp_path / "cut"), logits, "adapter_model.safetensors")


@pytest.mark.parametrize("method", METHODS)
def test_an_unknown_key_of_a_config_is_a_warning_and_a_wrong_value_an_error(method, tmp_path):
    model = budwood.get_peft_model(tiny("llama"), METHODS[method]())
    model.save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "from_the_future": 1}))
    with pytest.warns(UserWarning, match="from_the_future"):
        budwood.PeftModel.from_pretrained(tiny("llama"), tmp_path / "a")
    path.write_text(json.dumps({**config, "task_type": "NONSENSE"}))
    for _, load, logits in sides(tmp_path):
        refuse(lambda f=load: f(tmp_path / "a"), logits, "NONSENSE")
