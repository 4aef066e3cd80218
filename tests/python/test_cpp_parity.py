"""LoRA on C++ models beside HF PEFT: values, gradients, files, training curves."""

import json

import peft
import pytest
import torch
import transformers
from conftest import TINY, make_tiny

from budwood import _C

IDS = torch.tensor(
    [[5, 17, 3, 96, 41, 8, 22, 60, 13, 2, 71, 33], [9, 9, 1, 50, 6, 88, 7, 4, 19, 30, 12, 77]]
)
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "all-linear": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    "regex": {"r": 2, "lora_alpha": 3, "target_modules": r".*layers\.[02]\..*(up|down)_proj"},
    "rslora": {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ALL},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ALL,
        "use_rslora": True,
        "rank_pattern": {"layers.0.*q_proj": 2, "down_proj": 6},
        "alpha_pattern": {"down_proj": 3},
    },
    "lora_bias": {"r": 4, "lora_alpha": 8, "target_modules": ALL, "lora_bias": True},
    "bias-all": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "all"},
    "bias-lora_only": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "o_proj"],
        "bias": "lora_only",
    },
    "layers": {"r": 4, "lora_alpha": 8, "target_modules": ALL, "layers_to_transform": [1]},
    "exclude": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ALL,
        "exclude_modules": ["layers.1.mlp.up_proj"],
    },
    "head": {"r": 4, "lora_alpha": 8, "target_modules": ["lm_head", "q_proj"]},
}


def relative(found, wanted):
    return ((found - wanted).norm() / wanted.norm().clamp_min(1e-30)).item()


def peft_model(family, settings, seed=3):
    model = peft.get_peft_model(
        make_tiny(family), peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    )
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(0, 0.3)
            elif p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model


def shifted(ids):
    labels = torch.full_like(ids, -100)
    labels[:, :-1] = ids[:, 1:]
    return labels


def own_key(path):
    """model.layers.0.q_proj.adapter_default.lora_A -> PEFT's parameter name."""
    path = path.replace(".adapter_default.lora_B_bias", ".lora_B.default.bias")
    for factor in ("lora_A", "lora_B"):
        path = path.replace(f".adapter_default.{factor}", f".{factor}.default.weight")
    return "base_model.model." + path


@pytest.mark.parametrize("case", CASES)
def test_a_peft_adapter_loads_with_equal_logits_and_gradients(case, tiny_folder, tmp_path):
    family = "llama-tied-bias" if "bias-" in case else "llama"
    reference = peft_model(family, CASES[case])
    reference.save_pretrained(tmp_path / "adapter")
    model = _C.load_model(str(tiny_folder(family)), dtype="float32")
    _C.load_adapter(model, str(tmp_path / "adapter"))
    labels = shifted(IDS)
    wanted = reference(input_ids=IDS).logits
    assert relative(model(IDS), wanted) < 1e-5

    loss = torch.nn.functional.cross_entropy(
        wanted.reshape(-1, TINY["vocab_size"]), labels.reshape(-1)
    )
    loss.backward()
    found = model.loss(_C.TokenBatch.from_rows(IDS), labels.reshape(-1))
    (found.sum / found.count).backward()
    exact = {n: p.grad for n, p in reference.named_parameters() if p.requires_grad}
    trained = {own_key(n): p.grad for n, p in _C.trainable_parameters(model)}
    assert abs((found.sum / found.count - loss).item()) < 1e-5
    renamed = {n.replace(".base_layer.bias", ".bias"): g for n, g in exact.items()}
    assert set(trained) == set(renamed)
    for name, grad in trained.items():
        assert relative(grad, renamed[name]) < 1e-4, name


@pytest.mark.parametrize("case", CASES)
def test_our_adapter_loads_in_peft_and_merges_equal(case, tiny_folder, tmp_path):
    family = "llama-tied-bias" if "bias-" in case else "qwen3"
    model = _C.load_model(str(tiny_folder(family)), dtype="float32")
    _C.inject(model, _C.LoraConfig(task_type="CAUSAL_LM", **CASES[case]), seed=5)
    torch.manual_seed(4)
    with torch.no_grad():
        for _, p in _C.trainable_parameters(model):
            p.add_(0.3 * torch.randn_like(p))
    ours = model(IDS).detach()
    _C.save_adapter(model, str(tmp_path / "adapter"))
    theirs = peft.PeftModel.from_pretrained(make_tiny(family), tmp_path / "adapter")
    with torch.no_grad():
        assert relative(theirs(input_ids=IDS).logits, ours) < 1e-5
    _C.merge(model)
    assert relative(model(IDS), ours) < 1e-5
    if case != "lora_bias" and not case.startswith("bias"):
        _C.save_model(model, str(tmp_path / "merged"))
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        with torch.no_grad():
            assert (merged(input_ids=IDS).logits - ours).abs().max() < 1e-4


def test_training_follows_pefts_loss_curve(tiny_folder, tmp_path):
    """Same data, order, initial weights and optimiser: 20 steps."""
    reference = peft.get_peft_model(
        make_tiny("llama"), peft.LoraConfig(task_type="CAUSAL_LM", **CASES["all-linear"])
    )
    reference.save_pretrained(tmp_path / "start")
    model = _C.load_model(str(tiny_folder("llama")), dtype="float32")
    _C.load_adapter(model, str(tmp_path / "start"))
    model.train()
    ours = [p for _, p in _C.trainable_parameters(model)]
    theirs = [p for p in reference.parameters() if p.requires_grad]
    optimizers = [torch.optim.AdamW(p, lr=5e-3) for p in (ours, theirs)]
    generator = torch.Generator().manual_seed(0)
    curve = []
    for _ in range(20):
        ids = torch.randint(0, 30, (2, 16), generator=generator)
        found = model.loss(_C.TokenBatch.from_rows(ids), shifted(ids).reshape(-1))
        pair = (found.sum / found.count, reference(input_ids=ids, labels=ids).loss)
        for loss, optimizer in zip(pair, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        curve.append([loss.item() for loss in pair])
    curve = torch.tensor(curve)
    assert (curve[:, 0] - curve[:, 1]).abs().max() < 1e-3
    assert curve[-1, 0] < curve[0, 0]


def test_faults_of_an_adapter_file_are_listed_all_at_once(tiny_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "adapter"
    peft_model("llama", CASES["plain"]).save_pretrained(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    names = sorted(tensors)
    tensors.pop(names[0])
    tensors[names[1]] = torch.zeros(3, 3)
    tensors["base_model.model.stray.lora_A.weight"] = torch.zeros(2, 2)
    tensors[names[2]] = torch.full_like(tensors[names[2]], float("nan"))
    save_file(tensors, folder / "adapter_model.safetensors")
    model = _C.load_model(str(tiny_folder("llama")))
    before = model(IDS)
    with pytest.raises(_C.Error) as raised:
        _C.load_adapter(model, str(folder))
    message = str(raised.value)
    for part in (
        f"missing: {names[0]}",
        "unknown: base_model.model.stray",
        f"shape: {names[1]} is [3, 3]",
        f"values: {names[2]} holds NaN",
    ):
        assert part in message
    assert torch.equal(model(IDS), before)


def test_an_adapter_of_another_width_is_refused(tiny_folder, tmp_path):
    peft_model("llama-wide-head", CASES["plain"]).save_pretrained(tmp_path / "adapter")
    with pytest.raises(_C.Error, match=r"is \[96, 4\], this model wants \[48, 4\]"):
        _C.load_adapter(_C.load_model(str(tiny_folder("llama"))), str(tmp_path / "adapter"))


def test_a_bin_adapter_of_peft_loads(tiny_folder, tmp_path):
    reference = peft_model("llama", CASES["plain"])
    reference.save_pretrained(tmp_path / "adapter", safe_serialization=False)
    assert (tmp_path / "adapter" / "adapter_model.bin").exists()
    model = _C.load_model(str(tiny_folder("llama")), dtype="float32")
    _C.load_adapter(model, str(tmp_path / "adapter"))
    with torch.no_grad():
        assert relative(model(IDS), reference(input_ids=IDS).logits) < 1e-5


def test_a_pattern_that_matches_nothing_is_an_error(tiny_folder):
    model = _C.load_model(str(tiny_folder("llama")))
    with pytest.raises(_C.Error, match="query_key_value"):
        _C.inject(model, _C.LoraConfig(target_modules=["q_proj", "query_key_value"]))
    with pytest.raises(_C.Error):
        _C.inject(model, _C.LoraConfig(target_modules="nothing.*"))
    assert _C.inject(model, _C.LoraConfig(target_modules=["q_proj"]))["places"][0]["path"].endswith(
        "q_proj"
    )


def test_inspect_says_what_an_adapter_is(tiny_folder, tmp_path):
    model = _C.load_model(str(tiny_folder("llama")))
    _C.inject(model, _C.LoraConfig(task_type="CAUSAL_LM", **CASES["patterns"]))
    with torch.no_grad():
        for _, p in _C.trainable_parameters(model):
            p.normal_()
    _C.save_adapter(model, str(tmp_path / "adapter"))
    info = json.loads(_C.inspect(tmp_path / "adapter"))
    assert info["kind"] == "adapter"
    assert len(info["modules"]) == 21
    down = next(m for m in info["modules"] if m["path"] == "model.layers.1.mlp.down_proj")
    assert (down["rank"], down["alpha"]) == (6, 3)
    a, b = (
        dict(_C.trainable_parameters(model))[
            f"model.layers.1.mlp.down_proj.adapter_default.lora_{x}"
        ]
        for x in "AB"
    )
    assert down["delta_norm"] == pytest.approx((down["scaling"] * b @ a).norm().item(), rel=1e-5)
    assert json.loads(_C.inspect(tiny_folder("llama")))["kind"] == "model"
    with pytest.raises(_C.Error):
        _C.inspect(tmp_path)
