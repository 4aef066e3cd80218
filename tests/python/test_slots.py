"""A slot computes what HF PEFT's layer computes, and a merge can be taken back bit for bit."""

import copy

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import budwood
from budwood.slots import LinearSlot


def rel(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


class Net(nn.Module):
    def __init__(self, kind="linear", bias=True, inside=24, out=40):
        super().__init__()
        self.proj = nn.Linear(inside, out, bias=bias) if kind == "linear" else Conv1D(out, inside)
        if kind == "conv1d":
            nn.init.normal_(self.proj.bias)

    def forward(self, x):
        return self.proj(x)


def pair(kind="linear", bias=True, dtype=torch.float32, seed=0, **config):
    """The same network under budwood and under peft, with the same random adapter."""
    torch.manual_seed(seed)
    ours = Net(kind, bias).to(dtype)
    theirs = copy.deepcopy(ours)
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["proj"], **config}
    torch.manual_seed(seed + 1)
    ours = budwood.get_peft_model(ours, budwood.LoraConfig(**config))
    torch.manual_seed(seed + 1)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(**config))
    randomise(ours, theirs)
    return ours, theirs


def randomise(ours, theirs):
    theirs_by_name = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if "lora_" in name:
            with torch.no_grad():
                parameter.normal_(std=0.3)
                theirs_by_name[name].copy_(parameter)


KINDS = [("linear", True), ("linear", False), ("conv1d", True)]


@pytest.mark.parametrize(
    ("init", "lora_bias"), [(True, False), (True, True), ("gaussian", False), (False, False)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_seed_gives_the_adapter_of_peft_bit_for_bit(init, dtype, lora_bias):
    config = {"target_modules": ["proj"], "init_lora_weights": init, "lora_bias": lora_bias, "r": 6}
    ours, theirs = Net().to(dtype), Net().to(dtype)
    theirs.load_state_dict(ours.state_dict())
    torch.manual_seed(3)
    ours = budwood.get_peft_model(ours, budwood.LoraConfig(**config))
    torch.manual_seed(3)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(**config))
    a, b = ours.state_dict(), theirs.state_dict()
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize(("kind", "bias"), KINDS)
@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3), (1,), (0,)])
@pytest.mark.parametrize("extra", [{}, {"use_rslora": True}, {"lora_bias": True}])
def test_forward_and_gradients_equal_peft(kind, bias, shape, extra):
    ours, theirs = pair(kind, bias, **extra)
    x = torch.randn(*shape, 24)
    weight = torch.randn(*shape, 40)
    results = []
    for model in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        (y * weight).sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        results.append((y, leaf.grad, gradients))
    (y, dx, grads), (y2, dx2, grads2) = results
    assert y.shape == y2.shape
    assert y.dtype == y2.dtype
    assert rel(y, y2) < 1e-5
    assert rel(dx, dx2) < 1e-5
    assert grads.keys() == grads2.keys()
    for name in grads:
        assert rel(grads[name], grads2[name]) < 1e-5, name


def test_trained_bias_of_the_base_gets_its_gradient():
    ours, theirs = pair_with_trained_bias()
    x = torch.randn(5, 24)
    for model in (ours, theirs):
        model(x).square().sum().backward()
    mine = {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}
    other = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    assert mine.keys() == other.keys()
    assert any(n.endswith("base_layer.bias") for n in mine)
    for name in mine:
        assert rel(mine[name], other[name]) < 1e-5, name


def pair_with_trained_bias():
    torch.manual_seed(0)
    net = Net()
    config = {"r": 4, "target_modules": ["proj"], "bias": "lora_only"}
    ours = budwood.get_peft_model(copy.deepcopy(net), budwood.LoraConfig(**config))
    theirs = peft.get_peft_model(net, peft.LoraConfig(**config))
    randomise(ours, theirs)
    return ours, theirs


def test_dropout_acts_on_the_adapter_input_in_training_only():
    ours, _ = pair(lora_dropout=0.25)
    x = torch.ones(1, 24)
    ours.eval()
    assert torch.equal(ours(x), ours(x))
    base = ours.get_base_model().proj.base_layer(x)
    delta = ours(x) - base
    ours.train()
    torch.manual_seed(0)
    with torch.no_grad():
        many = ours(x.expand(40000, 24)) - base
    # inverted dropout: the mean is the value without, the variance that of the masks
    assert rel(many.mean(0, keepdim=True), delta) < 0.02
    slot = ours.get_base_model().proj
    product = slot.delta("default").float()
    variance = product.square().sum(1) * (0.25 / 0.75)
    assert rel(many.var(0), variance) < 0.03


def test_several_active_adapters_add_up():
    ours, theirs = pair()
    for model, lib in ((ours, budwood), (theirs, peft)):
        model.add_adapter("other", lib.LoraConfig(r=2, lora_alpha=3, target_modules=["proj"]))
    randomise(ours, theirs)
    ours.set_adapter(["default", "other"])
    theirs.base_model.set_adapter(["default", "other"])
    x = torch.randn(3, 24)
    assert rel(ours(x), theirs(x)) < 1e-5
    for name in ("default", "other"):
        ours.set_adapter(name)
        theirs.set_adapter(name)
        assert rel(ours(x), theirs(x)) < 1e-5


@pytest.mark.parametrize(("kind", "bias"), KINDS)
def test_merged_equals_unmerged_and_disabled_is_the_base_bit_for_bit(kind, bias):
    ours, _ = pair(kind, bias)
    slot = ours.get_base_model().proj
    x = torch.randn(6, 24)
    before = slot.weight.clone()
    base, adapted = slot.base_layer(x), ours(x)
    ours.merge_adapter()
    assert rel(ours(x), adapted) < 2e-6
    with ours.disable_adapter():
        assert torch.equal(ours(x), base)
    assert rel(ours(x), adapted) < 2e-6
    ours.unmerge_adapter()
    assert torch.equal(slot.weight, before)
    with ours.disable_adapter():
        assert torch.equal(ours(x), base)
    assert torch.equal(ours(x), adapted)


def test_merge_rounds_once_from_fp64():
    ours, _ = pair(dtype=torch.bfloat16)
    slot = ours.get_base_model().proj
    a, b = slot.lora_A["default"].weight, slot.lora_B["default"].weight
    exact = slot.weight.double() + 6 / 4 * (b.double() @ a.double())
    slot.merge()
    assert torch.equal(slot.weight, exact.to(torch.bfloat16))


def test_lora_bias_is_merged_with_its_scale():
    ours, _ = pair(lora_bias=True)
    x = torch.randn(6, 24)
    adapted = ours(x)
    ours.merge_adapter()
    assert rel(ours(x), adapted) < 2e-6


def test_a_thousand_merges_in_bf16_leave_no_trace():
    ours, _ = pair(dtype=torch.bfloat16)
    ours.add_adapter("other", budwood.LoraConfig(r=3, target_modules=["proj"]))
    slot = ours.get_base_model().proj
    nn.init.normal_(slot.lora_B["other"].weight)
    before = slot.weight.clone()
    names = ["default", "other"]
    for i in range(1000):
        with torch.no_grad():
            slot.lora_B["default"].weight.normal_()
        slot.merge([names[i % 2]])
        slot.merge([names[(i + 1) % 2]])
        slot.train(i % 3 == 0)
        slot.unmerge()
    assert torch.equal(slot.weight, before)


def test_a_merge_that_is_not_finite_is_refused_and_changes_nothing():
    net = nn.Sequential(Net(), Net(inside=40)).half()
    ours = budwood.get_peft_model(net, budwood.LoraConfig(target_modules=["proj"]))
    first, second = (net[i].proj for i in range(2))
    for slot in (first, second):
        nn.init.normal_(slot.lora_B["default"].weight)
    with torch.no_grad():
        second.lora_B["default"].weight.fill_(1e6)
    before = [first.weight.clone(), second.weight.clone()]
    with pytest.raises(budwood.Error, match=r"not finite in torch.float16.*1\.proj"):
        ours.merge_adapter(safe_merge=True)
    assert torch.equal(first.weight, before[0])
    assert torch.equal(second.weight, before[1])
    assert not first.merged
    assert not second.merged


def test_merging_twice_adds_once():
    ours, _ = pair()
    slot = ours.get_base_model().proj
    slot.merge()
    once = slot.weight.clone()
    slot.merge()
    assert torch.equal(slot.weight, once)


def test_base_stays_put_when_the_model_moves_while_merged():
    ours, _ = pair()
    slot = ours.get_base_model().proj
    before = slot.weight.clone()
    slot.merge()
    ours.to(torch.float64)
    slot.unmerge()
    assert slot.weight.dtype == torch.float64
    assert torch.equal(slot.weight, before.double())


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_compiles_without_a_graph_break(kind, dropout):
    ours, _ = pair(kind, lora_dropout=dropout)
    slot = ours.get_base_model().proj.eval() if dropout else ours.get_base_model().proj
    compiled = torch.compile(slot, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 24, requires_grad=True)
    y = compiled(x)
    assert rel(y, slot(x)) < 1e-6
    y.sum().backward()
    compiled_grad, slot.lora_B["default"].weight.grad = slot.lora_B["default"].weight.grad, None
    slot(x).sum().backward()
    assert rel(compiled_grad, slot.lora_B["default"].weight.grad) < 1e-6


def test_autocast_computes_in_bf16_and_keeps_fp32_gradients():
    ours, theirs = pair()
    x = torch.randn(64, 24)
    outs = []
    for model in (ours, theirs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(x)
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
        outs.append(y)
    assert rel(outs[0], ours(x)) < 1e-2
    assert rel(outs[0], outs[1]) < 1e-2
    assert all(p.grad.dtype == torch.float32 for p in ours.parameters() if p.requires_grad)


def test_a_bf16_base_gives_bf16_results_and_fp32_adapters():
    ours, theirs = pair(dtype=torch.bfloat16)
    x = torch.randn(6, 24, dtype=torch.bfloat16)
    assert ours(x).dtype == torch.bfloat16
    assert rel(ours(x), theirs(x)) < 1e-2
    assert all(p.dtype == torch.float32 for n, p in ours.named_parameters() if "lora_" in n)


def test_hooks_on_the_base_layer_still_run():
    ours, theirs = pair()
    x = torch.randn(3, 24)
    for model in (ours, theirs):
        base = model.get_base_model().proj.base_layer
        base.register_forward_hook(lambda module, inputs, output: output * 2)
    assert rel(ours(x), theirs(x)) < 1e-5


def test_a_slot_holds_linear_layers_only():
    with pytest.raises(
        budwood.Error, match=r"transformers Conv1D or a packed layer, found .*Conv2d"
    ):
        LinearSlot(nn.Conv2d(1, 1, 1))
    slot = LinearSlot(nn.Linear(2, 2))
    with pytest.raises(budwood.Error, match="positive integer, found 0"):
        slot.attach("a", r=0, lora_alpha=1, scaling=1)
    slot.attach("a", r=1, lora_alpha=1, scaling=1)
    with pytest.raises(budwood.Error, match="'a' is already attached"):
        slot.attach("a", r=1, lora_alpha=1, scaling=1)
