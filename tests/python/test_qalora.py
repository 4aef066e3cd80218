"""QA-LoRA: forward and gradients beside a float64 formula, and the exact merge into zero points."""

import copy
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_checkpoint_folders import awq_parts, gptq_folder, write_folder
from test_merge_quantised import ALL, quantised, weights_of
from test_save_gguf import config_of

import budwood
from budwood import _C

POOLINGS = ["scaled_mean", "mean", "sum"]


def config(**options):
    settings = {
        "r": 4,
        "lora_alpha": 6,
        "use_qalora": True,
        "qalora_group_size": 16,
        "target_modules": ALL,
        "task_type": "CAUSAL_LM",
    }
    return budwood.LoraConfig(**settings | options)


def randomise(model):
    torch.manual_seed(4)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.1)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(1)
    settings = config_of("llama")
    settings.tie_word_embeddings = False
    model = transformers.AutoModelForCausalLM.from_config(settings)
    folder = tmp_path_factory.mktemp("qalora") / "model"
    model.save_pretrained(folder)
    return folder, model


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_gradients_are_those_of_the_formula(pooling, bias):
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(32, 12, bias=bias))
    options = {"target_modules": ["0"], "task_type": None, "qalora_group_size": 8}
    model = budwood.get_peft_model(
        copy.deepcopy(layer), config(**options, qalora_pooling=pooling, lora_alpha=6)
    )
    randomise(model)
    x = torch.randn(3, 5, 32, requires_grad=True)
    named = dict(model.named_parameters())
    (a,) = (p for n, p in named.items() if "lora_A" in n)
    (b,) = (p for n, p in named.items() if "lora_B" in n)
    assert list(a.shape) == [4, 4]

    wide = [t.detach().double().requires_grad_() for t in (x, a, b)]
    groups = wide[0].view(3, 5, 4, 8)
    pooled = groups.sum(-1) if pooling == "sum" else groups.mean(-1)
    if pooling == "scaled_mean":  # as HF PEFT does
        pooled = pooled * 4
    y = layer.double()(wide[0]) + 1.5 * (pooled @ wide[1].t() @ wide[2].t())
    out = model(x)
    assert torch.allclose(out.double(), y, rtol=1e-5, atol=1e-6)
    towards = torch.randn_like(out)
    out.backward(towards)
    y.backward(towards.double())
    for found, wanted in zip((x, a, b), wide, strict=True):
        assert torch.allclose(found.grad.double(), wanted.grad, rtol=1e-4, atol=1e-6)


def test_it_starts_as_the_base_and_goes_to_files_and_cpp(base, tmp_path):
    folder, model = base
    adapted = budwood.get_peft_model(copy.deepcopy(model), config())
    ids = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        assert torch.allclose(adapted(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    randomise(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert list(stored["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"].shape) == [
        4,
        6,
    ]
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["use_qalora"] is True
    assert written["qalora_group_size"] == 16
    assert "qalora_pooling" not in written
    with torch.no_grad():
        wanted = adapted(ids).logits
    again = budwood.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter")
    loaded = _C.load_model(str(folder))
    _C.load_adapter(loaded, str(tmp_path / "adapter"))
    loaded.eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, wanted)
        found = loaded.logits(loaded.hidden(_C.TokenBatch.from_rows(ids)))
    assert torch.allclose(found.view_as(wanted), wanted, rtol=1e-4, atol=1e-5)
    merged = again.merge_and_unload()
    budwood.merge_files(folder, tmp_path / "adapter", tmp_path / "out")
    for name, tensor in weights_of(tmp_path / "out").items():
        assert torch.equal(tensor, merged.state_dict()[name]), name
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, wanted, rtol=1e-4, atol=1e-5)
    report = budwood.convert(tmp_path / "adapter", tmp_path / "plain")
    assert report.modules == 21
    plain = budwood.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "plain")
    with torch.no_grad():
        assert torch.allclose(plain(ids).logits, wanted, rtol=1e-4, atol=1e-5)


def logits_of(folder, adapter=None):
    model = _C.load_model(str(folder), dtype="float32")
    if adapter is not None:
        _C.load_adapter(model, str(adapter))
    model.eval()
    ids = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        return model.logits(model.hidden(_C.TokenBatch.from_rows(ids)))


def adapter_on(folder, out, **options):
    """An adapter with random factors for the model in a folder."""
    model = _C.load_model(str(folder), dtype="float32")
    _C.inject(model, config(**options))
    _C.save_adapter(model, str(out))
    torch.manual_seed(4)
    file = out / "adapter_model.safetensors"
    tensors = {k: 0.1 * torch.randn(t.shape) for k, t in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    return out


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("group", [16, 32])
@pytest.mark.parametrize("format", ["int4", "int8"])
def test_the_merge_into_zero_points_is_exact(format, group, pooling, base, tmp_path):
    method = {"method": "hqq"} if format == "int8" else {}
    packed = quantised(base[0], tmp_path / "packed", format, block_size=16, **method)
    adapter = adapter_on(
        packed, tmp_path / "adapter", qalora_group_size=group, qalora_pooling=pooling
    )
    report = budwood.merge_files(packed, adapter, tmp_path / "out", into="requantised")
    assert len(report.merged) == 21
    assert min(t.survival for t in report.merged) > 0.99999
    assert max(t.error for t in report.merged) < 1e-4
    before, after = weights_of(packed), weights_of(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if name.endswith("weight.zeros"):
            assert after[name].dtype == torch.float32
            assert not torch.equal(after[name], tensor.float())
        else:
            assert torch.equal(after[name], tensor), name
    wanted, found = logits_of(packed, adapter), logits_of(tmp_path / "out")
    assert (wanted - logits_of(packed)).abs().max() > 1e-2
    assert torch.allclose(found, wanted, rtol=1e-4, atol=2e-5)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "budwood"
    again = budwood.merge_files(tmp_path / "out", adapter, tmp_path / "back", weights=[-1.0],
                                into="requantised")  # fmt: skip
    assert again.merged
    assert torch.allclose(logits_of(tmp_path / "back"), logits_of(packed), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_gptq_and_awq_models_become_folders_of_integers(kind, tiny_folder, tmp_path):
    folder = tmp_path / "packed"
    if kind == "gptq":
        gptq_folder(tiny_folder, folder)
    else:
        settings = {"quant_method": "awq", "bits": 4, "group_size": 24, "version": "gemm"}
        settings["zero_point"] = True
        write_folder(tiny_folder("llama"), folder, "llama", settings, awq_parts)
    adapter = adapter_on(folder, tmp_path / "adapter", qalora_group_size=24,
                         target_modules=["q_proj", "up_proj"])  # fmt: skip
    report = budwood.merge_files(folder, adapter, tmp_path / "out", into="requantised")
    assert min(t.survival for t in report.merged) > 0.9999
    wanted, found = logits_of(folder, adapter), logits_of(tmp_path / "out")
    assert (wanted - logits_of(folder)).abs().max() > 1e-3
    assert torch.allclose(found, wanted, rtol=1e-4, atol=2e-5)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "budwood"
    assert "lm_head" in settings["modules_to_not_convert"]


def test_what_cannot_be_exact_is_refused(base, tiny_folder, tmp_path):
    packed = quantised(base[0], tmp_path / "packed", "int4", block_size=32)
    adapter = adapter_on(packed, tmp_path / "adapter", qalora_group_size=16)
    with pytest.raises(budwood.Error, match="groups of 16 are not made of whole groups of 32"):
        budwood.merge_files(packed, adapter, tmp_path / "out", into="requantised")
    gptq_folder(tiny_folder, tmp_path / "gptq", act_order=True)
    adapter = adapter_on(tmp_path / "gptq", tmp_path / "b", qalora_group_size=24,
                         target_modules=["q_proj"])  # fmt: skip
    with pytest.raises(budwood.Error, match="act-order"):
        budwood.merge_files(tmp_path / "gptq", adapter, tmp_path / "out", into="requantised")
    assert not (tmp_path / "out").exists()
    with pytest.raises(budwood.Error, match="qalora_group_size 7 does not divide its 64 inputs"):
        adapter_on(packed, tmp_path / "no", qalora_group_size=7)
    for options, message in (
        ({"use_dora": True}, "cannot be used with use_dora"),
        ({"init_lora_weights": "pissa"}, "cannot be used with"),
        ({"qalora_pooling": "max"}, "qalora_pooling is 'max'"),
        ({"qalora_group_size": 0}, "qalora_group_size is 0"),
    ):
        with pytest.raises(budwood.Error, match=message):
            config(**options)
    with pytest.raises(budwood.Error, match="not for token tables"):
        adapter_on(packed, tmp_path / "no", target_modules=["embed_tokens"])
    with pytest.raises(budwood.Error, match="use_qalora"):
        budwood.AdaLoraConfig(use_qalora=True, total_step=10)
    convolution = torch.nn.Sequential(torch.nn.Conv1d(16, 16, 3))
    with pytest.raises(budwood.Error, match="use_qalora"):
        budwood.get_peft_model(convolution, config(target_modules=["0"], task_type=None))
