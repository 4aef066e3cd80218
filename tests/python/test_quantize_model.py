"""quantize_model and adapters on packed layers of any torch model."""

import copy
import json
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import make_tiny
from torch import nn
from torch.nn.functional import linear

import budwood
from budwood import _C

FORMATS = ("nf4", "fp4", "int8", "int4", "affine8")
IDS = torch.tensor([[5, 17, 3, 96, 41, 8, 22, 60, 13, 2, 71, 33]])
CONFIG = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


def relative(found, wanted):
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def dequantised(model):
    """A copy of a model in which packed layers are plain again."""
    model = copy.deepcopy(model)
    for path, layer in list(model.named_modules()):
        if isinstance(layer, budwood.QuantizedLinear):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            plain.weight = nn.Parameter(layer.dequantize())
            if layer.bias is not None:
                plain.bias = nn.Parameter(layer.bias.detach())
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, plain)
    return model


def fill(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape))


@pytest.mark.parametrize("format", FORMATS)
def test_a_quantised_model_computes_with_its_dequantised_weights(format):
    for family in ("llama", "qwen2", "mistral-window"):
        model = budwood.quantize_model(make_tiny(family), format)
        assert isinstance(model.lm_head, nn.Linear)
        assert not any(p.requires_grad for p in model.parameters())
        with torch.no_grad():
            assert relative(model(IDS).logits, dequantised(model)(IDS).logits) < 1e-5


@pytest.mark.parametrize("format", FORMATS)
def test_lora_gradients_are_those_of_the_dequantised_weight_in_float64(format):
    torch.manual_seed(0)
    layer = nn.Linear(72, 40)
    model = budwood.quantize_model(nn.Sequential(layer), format, block_size=32)
    wanted = dequantised(model)[0].double()
    model = budwood.get_peft_model(model, budwood.LoraConfig(**CONFIG | {"target_modules": ["0"]}))
    fill(model)
    slot = model.base_model.model[0]
    x = torch.randn(5, 3, 72, requires_grad=True)
    grad = torch.randn(5, 3, 40)
    parameters = [x, slot.lora_A["default"].weight, slot.lora_B["default"].weight]
    found = torch.autograd.grad(model(x), parameters, grad)
    x2, a, b = (t.detach().double().requires_grad_() for t in parameters)
    y = linear(x2, wanted.weight, wanted.bias) + 2.0 * linear(linear(x2, a), b)
    for ours, theirs in zip(found, torch.autograd.grad(y, (x2, a, b), grad.double()), strict=True):
        assert relative(ours, theirs) < 1e-6


def test_training_leaves_the_codes_as_they_were():
    model = budwood.quantize_model(make_tiny("llama"), "nf4", double_quant=True)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    model = budwood.get_peft_model(model, budwood.LoraConfig(**CONFIG, task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(5):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = model.unload().state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("format", ["nf4", "int4", "int8"])
def test_merging_gives_a_plain_layer_and_unmerging_the_codes(format):
    model = budwood.quantize_model(make_tiny("llama"), format)
    model = budwood.get_peft_model(model, budwood.LoraConfig(**CONFIG))
    fill(model)
    with torch.no_grad():
        wanted = model(IDS).logits
        model.merge_adapter()
        assert relative(model(IDS).logits, wanted) < 1e-5
        model.unmerge_adapter()
        assert torch.equal(model(IDS).logits, wanted)
        merged = model.merge_and_unload()
        assert relative(merged(IDS).logits, wanted) < 1e-5
    assert type(merged.model.layers[0].mlp.up_proj) is nn.Linear
    assert getattr(merged.config, "quantization_config", None) is None


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_a_model_leaves_codes_and_scales_intact(format, dtype):
    layer = budwood.quantize_linear(nn.Linear(64, 24), format)
    wanted = layer.dequantize()
    before = [part.clone() for part in layer.parts()]
    for cast in (lambda m: m.to(dtype), lambda m: m.half(), lambda m: m.double()):
        cast(layer)
        assert all(torch.equal(a, b) for a, b in zip(before, layer.parts(), strict=True))
    assert torch.equal(layer.dequantize(), wanted)
    assert layer.bias.dtype == torch.float64
    stored = budwood.quantize_linear(nn.Linear(64, 24), format, storage=torch.bfloat16)
    before = [part.clone() for part in stored.parts()]
    assert stored.weight.dtype == torch.bfloat16
    stored.to(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(before, stored.parts(), strict=True))


@pytest.mark.parametrize("format", FORMATS)
def test_a_state_dict_restores_the_same_codes(format):
    source = budwood.quantize_model(make_tiny("llama"), format)
    target = make_tiny("llama")
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.add_(0.01)
    target = budwood.quantize_model(target, format)
    assert not torch.equal(source(IDS).logits, target(IDS).logits)
    target.load_state_dict(source.state_dict())
    assert torch.equal(source(IDS).logits, target(IDS).logits)
    broken = source.state_dict()
    name = next(n for n in broken if n.endswith(("absmax", "SCB", "scales")))
    broken[name] = broken[name][:-1]
    with pytest.raises(RuntimeError, match="elements of"):
        target.load_state_dict(broken)


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8"])
def test_what_save_pretrained_writes_opens_in_bitsandbytes_and_in_cpp(format, tmp_path):
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(
            vocab_size=97,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    model = budwood.quantize_model(model, format).eval()
    model.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        wanted = model(IDS).logits
        assert relative(_C.load_model(str(tmp_path / "saved"))(IDS), wanted) < 1e-5
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").train()
        assert relative(theirs(IDS).logits, wanted) < (2e-2 if format == "int8" else 1e-5)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "bitsandbytes"


@pytest.mark.parametrize("double", [False, True])
def test_adapters_train_on_a_model_that_transformers_quantised(double, tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "plain")

    def load():
        return transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "plain",
            quantization_config=transformers.BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=double,
                bnb_4bit_compute_dtype=torch.float32,
            ),
        )

    peft = pytest.importorskip("peft")
    results = []
    for library in (budwood, peft):
        model = load()
        assert isinstance(model.model.layers[0].mlp.up_proj, bnb.nn.Linear4bit)
        model = library.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        torch.manual_seed(3)
        model = library.get_peft_model(model, library.LoraConfig(**CONFIG, task_type="CAUSAL_LM"))
        fill(model)
        model.train()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        results.append((loss.item(), grads, model.get_nb_trainable_parameters()))
    (ours, our_grads, our_count), (theirs, their_grads, their_count) = results
    assert abs(ours - theirs) < 1e-5
    assert our_count == their_count
    assert our_grads.keys() == their_grads.keys()
    for name, grad in their_grads.items():
        assert relative(our_grads[name], grad) < 1e-4, name

    model = load().eval()
    with torch.no_grad():
        model(IDS)  # an evaluation forward of bitsandbytes may repack its codes
    model = budwood.get_peft_model(model, budwood.LoraConfig(**CONFIG))
    fill(model)
    with torch.no_grad():
        wanted = model(IDS).logits
        merged = model.merge_and_unload()
        assert relative(merged(IDS).logits, wanted) < 1e-5
    merged.save_pretrained(tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert relative(again(IDS).logits, wanted) < 1e-5


def test_skip_shared_and_unknown_layers():
    model = budwood.quantize_model(
        make_tiny("llama"), "nf4", skip=["lm_head", "o_proj", "layers.1"]
    )
    kinds = {p: type(m) for p, m in model.named_modules() if isinstance(m, nn.Module)}
    assert kinds["lm_head"] is nn.Linear
    assert kinds["model.layers.0.self_attn.o_proj"] is nn.Linear
    assert kinds["model.layers.1.mlp.up_proj"] is nn.Linear
    assert kinds["model.layers.0.mlp.up_proj"] is budwood.QuantizedLinear
    tied = budwood.quantize_model(make_tiny("llama-tied-bias"), "nf4", skip=[])
    assert type(tied.lm_head) is nn.Linear
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    with pytest.warns(UserWarning, match="'nothing' matches no layer"):
        budwood.quantize_model(make_tiny("llama"), "nf4", skip=["nothing"])
    with pytest.raises(budwood.Error, match="no linear layer"):
        budwood.quantize_model(nn.Sequential(nn.ReLU()), "nf4")
    with pytest.raises(budwood.Error, match="unknown format 'nf5'; known: nf4"):
        budwood.quantize_model(make_tiny("llama"), "nf5")
    with pytest.raises(budwood.Error, match="block size 48"):
        budwood.quantize_model(make_tiny("llama"), "nf4", block_size=48)
    broken = make_tiny("llama")
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[2, 3] = float("inf")
    with pytest.raises(budwood.Error, match=r"model.layers.1.mlp.up_proj: .*row 2, column 3"):
        budwood.quantize_model(broken, "nf4")


def test_parameters_are_counted_as_what_they_stand_for():
    plain = make_tiny("llama")
    wanted = sum(p.numel() for p in plain.parameters())
    model = budwood.quantize_model(plain, "nf4", double_quant=True)
    model = budwood.get_peft_model(model, budwood.LoraConfig(**CONFIG))
    trainable, total = model.get_nb_trainable_parameters()
    assert total - trainable == wanted
    assert trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_conv1d_layers_are_packed_too():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=97, n_positions=32, n_embd=64, n_layer=2, n_head=4, attn_pdrop=0, embd_pdrop=0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    wanted = model(IDS).logits
    packed = budwood.quantize_model(model, "int8")
    assert type(packed.transformer.h[0].attn.c_attn) is budwood.QuantizedLinear
    with torch.no_grad():
        assert relative(packed(IDS).logits, wanted) < 2e-2


def test_checkpointing_a_prepared_model_gives_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        model = budwood.quantize_model(make_tiny("llama"), "nf4")
        model = budwood.prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": True},
        )
        model = budwood.get_peft_model(model, budwood.LoraConfig(**CONFIG, task_type="CAUSAL_LM"))
        fill(model)
        model.train()
        model(input_ids=IDS, labels=IDS).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, wanted in grads[0].items():
        assert relative(grads[1][name], wanted) < 1e-5, name


def test_preparing_upcasts_what_is_not_packed():
    model = budwood.quantize_model(make_tiny("llama").to(torch.bfloat16), "nf4")
    codes = model.model.layers[0].mlp.up_proj.weight.clone()
    kept = budwood.prepare_model_for_kbit_training(copy.deepcopy(model), False, upcast=False)
    assert kept.lm_head.weight.dtype == torch.bfloat16
    model = budwood.prepare_model_for_kbit_training(model, False)
    assert model.lm_head.weight.dtype == torch.float32
    assert model.model.norm.weight.dtype == torch.float32
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, codes)


@pytest.mark.parametrize("format", ["nf4", "int4"])
def test_a_quantised_model_compiles_without_a_graph_break(format):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 32))
    model = budwood.quantize_model(model, format, block_size=16 if format == "int4" else 64)
    model = budwood.get_peft_model(
        model, budwood.LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"])
    )
    fill(model)
    inner = model.base_model.model
    torch._dynamo.reset()
    compiled = torch.compile(inner, backend="aot_eager", fullgraph=True)
    for rows in (3, 11):
        x = torch.randn(rows, 64, requires_grad=True)
        wanted = torch.autograd.grad(inner(x).sum(), x)
        torch.testing.assert_close(torch.autograd.grad(compiled(x).sum(), x), wanted)


SHARDED = """
import os, sys, copy, torch, torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard, MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel
import budwood

rank, kind = int(sys.argv[1]), sys.argv[3]
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
torch.set_num_threads(1)
for format, double in (("nf4", False), ("nf4", True), ("int4", False), ("int8", False)):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 32))
    half = kind == "fsdp-bf16"
    model = budwood.quantize_model(
        model, format, double_quant=double, skip=[], storage=torch.bfloat16 if half else torch.uint8
    )
    model = budwood.get_peft_model(
        model, budwood.LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"])
    ).base_model.model
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(0.1 * torch.randn(p.shape))
    alone = copy.deepcopy(model)
    x = torch.randn(2, 6, 64)
    if kind == "ddp":
        model = DistributedDataParallel(model)
    else:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if half else None)
        for layer in (model[0], model[2], model):
            fully_shard(layer, mp_policy=policy)
    model(x[rank]).float().square().sum().backward()
    alone(x).square().sum().backward()
    for (name, p), (_, wanted) in zip(model.named_parameters(), alone.named_parameters()):
        if not wanted.requires_grad:
            continue
        grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        # The mean over two ranks of one row each, against the sum over both rows.
        error = (2 * grad.float() - wanted.grad).norm() / wanted.grad.norm()
        assert error < (3e-2 if half else 1e-5), (format, name, error)
    if kind != "ddp":
        codes = model[0].base_layer.weight
        assert codes.to_local().shape[0] == 64, codes.to_local().shape
dist.barrier()
dist.destroy_process_group()
# FSDP keeps the group's threads, which may drop their last tensors while the interpreter ends: then
# they are stopped within a destructor and the process aborts.
os._exit(0)
"""


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "fsdp-bf16"])
def test_packed_layers_under_data_parallel_training(kind, tmp_path):
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path / "store"), kind],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    output = [rank.communicate(timeout=240)[0] for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), output
