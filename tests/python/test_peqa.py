"""PEQA: gradients of scales beside float64 autograd, files, merges and task switches."""

import copy
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_checkpoint_folders import gptq_folder
from test_merge_quantised import quantised, weights_of
from test_qalora import base, logits_of  # noqa: F401

import budwood
from budwood import _C

TARGETS = ["q_proj", "down_proj"]


def config(**options):
    settings = {"target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    return budwood.PeqaConfig(**settings | options)


def integer_layer(bits, group, inputs=48, outputs=20, bias=True):
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(inputs, outputs, bias=bias))
    format = "int4" if bits == 4 else "affine8"
    return budwood.quantize_model(layer, format, block_size=group)


def in_double(layer):
    """(codes, scales, zeros, group of each column) of a layer, in float64."""
    codes, scales, zeros, size = layer.parts()[:4]
    shape = [layer.out_features, layer.in_features]
    ones = [codes, torch.ones_like(scales), torch.zeros_like(scales), size]
    plain = _C.dequantize(ones, layer.format, shape, "float64", 0, shape[0])
    group = torch.arange(shape[1]) // size.item()
    return plain, scales.double(), zeros.double(), group


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("group", "inputs"), [(16, 48), (32, 40)])
@pytest.mark.parametrize("train_zeros", [False, True])
def test_gradients_are_those_of_float64(bits, group, inputs, train_zeros):
    model = integer_layer(bits, group, inputs)
    codes, scales, zeros, groups = in_double(model[0])
    adapted = budwood.get_peft_model(
        model, config(target_modules=["0"], task_type=None, train_zeros=train_zeros)
    )
    x = torch.randn(3, 7, inputs, requires_grad=True)
    y = adapted(x)
    towards = torch.randn_like(y)
    y.backward(towards)
    named = {n.rpartition(".")[2]: p for n, p in adapted.named_parameters() if p.requires_grad}
    assert set(named) == ({"peqa_scales", "peqa_zeros"} if train_zeros else {"peqa_scales"})

    wide = x.detach().double().requires_grad_()
    scales.requires_grad_()
    zeros.requires_grad_()
    weight = scales[:, groups] * (codes - zeros[:, groups])
    bias = adapted.get_base_model()[0].base_layer.bias
    wanted = wide @ weight.t() + bias.detach().double()
    assert torch.allclose(y.double(), wanted, rtol=1e-5, atol=1e-5)
    wanted.backward(towards.double())
    assert torch.allclose(x.grad.double(), wide.grad, rtol=1e-4, atol=1e-5)
    for name, exact in (("peqa_scales", scales.grad), ("peqa_zeros", zeros.grad)):
        if name in named:
            error = (named[name].grad.double() - exact).norm() / exact.norm()
            assert error < 1e-5, name


@pytest.mark.parametrize("has_zeros", [False, True])
def test_the_operator_is_clean(has_zeros):
    layer = integer_layer(4, 16)[0]
    parts, shape = layer.parts(), [layer.out_features, layer.in_features]
    scales = parts[1].clone().requires_grad_()
    zeros = parts[2].float().requires_grad_() if has_zeros else None
    x = torch.randn(5, 48, requires_grad=True)
    bias = layer.bias
    torch.library.opcheck(
        torch.ops.budwood.affine_linear,
        (x, parts, layer.format, shape, bias, scales, zeros),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
    compiled = torch.compile(
        lambda t, s: torch.ops.budwood.affine_linear(t, parts, layer.format, shape, bias, s, zeros),
        fullgraph=True,
        backend="aot_eager",
    )
    y = compiled(x, scales)
    plain = torch.ops.budwood.affine_linear(x, parts, layer.format, shape, bias, scales, zeros)
    assert torch.equal(y, plain)
    (a,) = torch.autograd.grad(y.sum(), scales, retain_graph=True)
    (b,) = torch.autograd.grad(plain.sum(), scales)
    assert torch.equal(a, b)
    for wrong in (scales[:, :1], scales.double()):
        with pytest.raises(RuntimeError, match="scales are fp32"):
            torch.ops.budwood.affine_linear(x, parts, layer.format, shape, bias, wrong, zeros)


def moved(adapter, factor=0.1):
    """Writes other scales into an adapter's file."""
    torch.manual_seed(6)
    file = adapter / "adapter_model.safetensors"
    tensors = {
        key: t * (1 + factor * torch.randn_like(t)) if "scales" in key else t + torch.rand_like(t)
        for key, t in load_file(file).items()
    }
    save_file(tensors, file, {"format": "pt"})
    return tensors


def adapter_on(folder, out, **options):
    model = _C.load_model(str(folder), dtype="float32")
    _C.inject(model, config(**options))
    _C.save_adapter(model, str(out))
    return out, moved(out)


@pytest.mark.parametrize("train_zeros", [False, True])
@pytest.mark.parametrize("method", ["rtn", "hqq"])
def test_files_merges_and_the_switch_of_a_task(method, train_zeros, base, tmp_path):  # noqa: F811
    packed = quantised(base[0], tmp_path / "packed", "int4", block_size=16, method=method)
    fresh = _C.load_model(str(packed), dtype="float32")
    _C.inject(fresh, config(train_zeros=train_zeros))
    _C.save_adapter(fresh, str(tmp_path / "fresh"))
    assert torch.equal(logits_of(packed, tmp_path / "fresh"), logits_of(packed))
    adapter, tensors = adapter_on(packed, tmp_path / "adapter", train_zeros=train_zeros)
    assert len(tensors) == 6 * (2 if train_zeros else 1)
    wanted = logits_of(packed, adapter)
    assert (wanted - logits_of(packed)).abs().max() > 1e-3

    ids = torch.arange(12).reshape(1, 12)
    if method == "rtn":
        python = transformers.AutoModelForCausalLM.from_pretrained(base[0])
        budwood.quantize_model(python, "int4", block_size=16)
        python = budwood.PeftModel.from_pretrained(python, adapter)
        with torch.no_grad():
            found = python(ids).logits.view_as(wanted)
        assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-4)

    report = budwood.merge_files(packed, adapter, tmp_path / "out", into="requantised")
    assert len(report.merged) == 6
    assert min(t.survival for t in report.merged) == pytest.approx(1.0)
    before, after = weights_of(packed), weights_of(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        key = "base_model.model." + name.replace("weight.", "peqa_")
        if key in tensors:
            assert torch.equal(after[name], tensors[key]), name
        else:
            assert torch.equal(after[name], tensor), name
    assert torch.equal(logits_of(tmp_path / "out"), wanted)
    budwood.merge_files(packed, adapter, tmp_path / "wide")
    assert torch.allclose(logits_of(tmp_path / "wide"), wanted, rtol=1e-4, atol=2e-5)
    half = budwood.merge_files(
        packed, adapter, tmp_path / "half", into="requantised", weights=[0.5]
    )
    assert half.merged
    loaded = _C.load_model(str(packed), dtype="float32")
    _C.load_adapter(loaded, str(adapter))
    _C.set_weight(loaded, "default", 0.5)
    loaded.eval()
    with torch.no_grad():
        found = loaded.logits(loaded.hidden(_C.TokenBatch.from_rows(ids)))
    assert torch.allclose(found, logits_of(tmp_path / "half"), rtol=1e-4, atol=1e-5)


def test_a_gptq_model_with_its_own_order_of_columns(tiny_folder, tmp_path):
    gptq_folder(tiny_folder, tmp_path / "gptq", act_order=True)
    adapter, _ = adapter_on(tmp_path / "gptq", tmp_path / "adapter", target_modules=["q_proj"])
    wanted = logits_of(tmp_path / "gptq", adapter)
    budwood.merge_files(tmp_path / "gptq", adapter, tmp_path / "out", into="requantised")
    assert torch.allclose(logits_of(tmp_path / "out"), wanted, rtol=1e-5, atol=1e-6)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "budwood"
    # Gradients, with columns in another order, beside finite differences along a direction.
    model = _C.load_model(str(tmp_path / "gptq"), dtype="float32")
    _C.inject(model, config(target_modules=["q_proj"]))
    ids = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(0))
    parameters = [p for _, p in _C.trainable_parameters(model)]

    def loss():
        logits = model.logits(model.hidden(_C.TokenBatch.from_rows(ids))).double()
        return torch.nn.functional.cross_entropy(logits[:-1], ids.flatten()[1:])

    loss().backward()
    torch.manual_seed(1)
    directions = [p.detach() * torch.randn_like(p) for p in parameters]
    slope = sum((p.grad * d).sum().item() for p, d in zip(parameters, directions, strict=True))
    values = []
    with torch.no_grad():
        for sign in (1, -2):
            for p, d in zip(parameters, directions, strict=True):
                p.add_(sign * 1e-3 * d)
            values.append(loss().item())
    assert slope == pytest.approx((values[0] - values[1]) / 2e-3, rel=2e-2)


def test_it_learns_and_leaves_the_codes(base, tmp_path):  # noqa: F811
    model = budwood.quantize_model(copy.deepcopy(base[1]), "int4", block_size=16)
    before = {n: b.clone() for n, b in model.named_buffers()}
    adapted = budwood.get_peft_model(model, config(target_modules="all-linear"))
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(trained, lr=2e-3)
    ids = torch.randint(0, 60, (2, 16), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(25):
        loss = adapted(input_ids=ids, labels=ids).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    after = {n.replace("base_layer.", ""): b for n, b in adapted.get_base_model().named_buffers()}
    for name, buffer in before.items():
        assert torch.equal(after[name], buffer), name


def test_what_has_no_scales_is_refused_by_name(base, tmp_path):  # noqa: F811
    folder, model = base
    with pytest.raises(budwood.Error, match="q_proj is plain: quantise the model to int4 or int8"):
        budwood.get_peft_model(copy.deepcopy(model), config())
    nf4 = budwood.quantize_model(copy.deepcopy(model), "nf4")
    with pytest.raises(budwood.Error, match="q_proj is nf4"):
        budwood.get_peft_model(nf4, config())
    packed = quantised(folder, tmp_path / "packed", "int4", block_size=16)
    adapter, tensors = adapter_on(packed, tmp_path / "adapter")
    with pytest.raises(budwood.Error, match="is another kind of weight"):
        budwood.merge_files(folder, adapter, tmp_path / "out", force=True)
    other = quantised(folder, tmp_path / "other", "int4", block_size=32)
    with pytest.raises(budwood.Error, match=r"the adapter's scales are \[64, 6\], the model's are"):
        budwood.merge_files(other, adapter, tmp_path / "out", into="requantised")
    with pytest.raises(budwood.Error, match="merged alone"):
        budwood.merge_files(packed, [adapter, adapter], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(budwood.Error, match="peqa_scales"):
        key = next(iter(tensors))
        save_file(tensors | {key: tensors[key][:, :1].contiguous()},
                  adapter / "adapter_model.safetensors")  # fmt: skip
        logits_of(packed, adapter)
