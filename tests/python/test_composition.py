"""Several adapters on one model: stacked, side by side, weighted, switched."""

import copy

import pytest
import torch
from test_methods import randomise, tiny

import budwood
from budwood import _C


def bottleneck():
    return budwood.BottleneckConfig(reduction_factor=4, mh_adapter=True)


def rows():
    torch.manual_seed(2)
    return torch.randint(3, 61, (2, 7))


def both(folder, family="llama", configs=None):
    """The same two adapters on transformers' model and on the C++ one."""
    base = tiny(family)
    for name, config in zip("ab", configs or (bottleneck(), bottleneck()), strict=True):
        one = budwood.get_peft_model(copy.deepcopy(base), config)
        randomise(one, seed=ord(name))
        one.eval().save_pretrained(folder / name)
    python = budwood.PeftModel.from_pretrained(copy.deepcopy(base), folder / "a", adapter_name="a")
    python.load_adapter(folder / "b", adapter_name="b")
    base.save_pretrained(folder / "model")
    cpp = (_C.load_bert if family == "bert" else _C.load_model)(str(folder / "model"))
    for name in "ab":
        _C.load_adapter(cpp, str(folder / name), name)
    cpp.eval()
    return base, python.eval(), cpp


def run(python, cpp, family="llama"):
    """The logits of both sides, which are one."""
    ids = rows()
    tokens = _C.TokenBatch.from_rows(ids)
    with torch.no_grad():
        a = python(input_ids=ids).logits
        b = cpp.classify(tokens) if family == "bert" else cpp.logits(cpp.hidden(tokens))
    assert torch.allclose(a.reshape(b.shape), b, rtol=1e-4, atol=2e-5)
    return a


def activate(python, cpp, names, **options):
    python.set_adapter(names, **options)
    _C.set_active(cpp, names, **options)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_a_stack_goes_by_its_order_and_parallel_does_not(family, tmp_path):
    _, python, cpp = both(tmp_path, family)
    results = {}
    for composition in ("stack", "parallel"):
        for names in (["a", "b"], ["b", "a"]):
            activate(python, cpp, names, composition=composition)
            results[composition, names[0]] = run(python, cpp, family)
    assert not torch.allclose(results["stack", "a"], results["stack", "b"], atol=1e-4)
    assert torch.allclose(results["parallel", "a"], results["parallel", "b"], atol=1e-5)
    assert not torch.allclose(results["stack", "a"], results["parallel", "a"], atol=1e-4)


def test_a_stack_is_one_after_the_other():
    torch.manual_seed(0)
    base = tiny("llama")
    model = budwood.get_peft_model(base, bottleneck(), adapter_name="a")
    model.add_adapter("b", bottleneck())
    for p in model.parameters():
        p.requires_grad_(True)
    randomise(model)
    model.eval()
    slot = next(m.slot for n, m in model.named_modules() if n.endswith("layers.1.output_adapters"))
    h, x = torch.randn(2, 3, 32), torch.randn(2, 3, 32)
    layout = {"cu": [0, 3, 6], "prompt": [], "padding": [], "from_start": True}

    def adapt(names, h, composition="stack"):
        slot.set_active(names)
        slot.set_composition(composition)
        return slot.adapt(h, x, None, layout)

    with torch.no_grad():
        first = adapt(["a"], h)
        assert torch.allclose(adapt(["a", "b"], h), adapt(["b"], first), atol=1e-6)
        wanted = h + (first - h) + (adapt(["b"], h) - h)
        assert torch.allclose(adapt(["a", "b"], h, "parallel"), wanted, atol=1e-6)


KINDS = [
    (lambda: budwood.LoraConfig(r=3, target_modules=["q_proj", "down_proj"]), bottleneck),
    (lambda: budwood.PrefixTuningConfig(num_virtual_tokens=3), bottleneck),
    (
        lambda: budwood.PromptTuningConfig(num_virtual_tokens=2),
        lambda: budwood.LoraConfig(r=3, target_modules=["v_proj"]),
    ),
    (lambda: budwood.IA3Config(), lambda: budwood.ReftConfig(r=2)),
    (
        lambda: budwood.PrefixTuningConfig(num_virtual_tokens=3),
        lambda: budwood.PrefixTuningConfig(num_virtual_tokens=2),
    ),
]


@pytest.mark.parametrize("kinds", KINDS)
def test_adapters_of_different_kinds_on_one_model(kinds, tmp_path):
    base, python, cpp = both(tmp_path, configs=[kind() for kind in kinds])
    results = {}
    for names in (["a"], ["b"], ["a", "b"]):
        activate(python, cpp, names)
        results[len(names), names[0]] = run_any(python, cpp)
    assert not torch.equal(results[1, "a"], results[2, "a"])
    trained = {n for n, p in python.named_parameters() if p.requires_grad}
    activate(python, cpp, ["a"])
    alone = {n for n, p in python.named_parameters() if p.requires_grad}
    assert alone < trained
    assert torch.equal(run_any(python, cpp), results[1, "a"])
    python.delete_adapter("b")
    _C.detach(cpp, "b")
    assert torch.equal(run_any(python, cpp), results[1, "a"])
    with torch.no_grad(), python.disable_adapter():
        assert torch.equal(python(input_ids=rows()).logits, base(input_ids=rows()).logits)
    plain = python.unload()
    for key, tensor in base.state_dict().items():
        assert torch.equal(plain.state_dict()[key], tensor), key


def run_any(python, cpp):
    ids = rows()
    tokens = _C.TokenBatch.from_rows(ids)
    with torch.no_grad():
        a = python(input_ids=ids).logits
        b = cpp.logits(cpp.hidden(tokens))
    assert torch.allclose(a.reshape(b.shape), b, rtol=1e-4, atol=2e-5)
    return a


def test_what_cannot_be_combined_is_named(tmp_path):
    _, python, cpp = both(
        tmp_path,
        configs=[
            budwood.LoraConfig(r=2, use_dora=True, target_modules=["q_proj"]) for _ in range(2)
        ],
    )
    with pytest.raises(budwood.Error, match=r"'a'.*another adapter"):
        python.set_adapter(["a", "b"])
    with pytest.raises(budwood.Error, match="a"):
        _C.set_active(cpp, ["a", "b"])
    with pytest.raises(budwood.Error, match="'stack' or 'parallel', found 'sideways'"):
        python.set_adapter("a", composition="sideways")
    with pytest.raises(budwood.Error, match="'stack' or 'parallel', found 'sideways'"):
        _C.set_active(cpp, ["a"], "sideways")
