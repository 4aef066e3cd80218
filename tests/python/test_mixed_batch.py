"""Rows of a batch with different adapters: each is what it is alone, and as HF PEFT has it."""

import copy

import peft
import pytest
import torch
from test_methods import batch, peft_config, randomise, tiny

import budwood
from budwood import _C

NAMES = ["a", "__base__", "b", "a"]


def rows(family):
    torch.manual_seed(2)
    return torch.randint(3, 61, (4, 7))


def two_adapters(family, methods, folder):
    """A base and folders of two adapters for it."""
    base = tiny(family)
    for name, method in zip("ab", methods, strict=True):
        one = budwood.get_peft_model(copy.deepcopy(base), peft_config(method, family))
        randomise(one, seed=ord(name))
        one.eval().save_pretrained(folder / name)
    ours = budwood.PeftModel.from_pretrained(copy.deepcopy(base), folder / "a", adapter_name="a")
    ours.load_adapter(folder / "b", adapter_name="b")
    return base, ours.eval()


METHODS = [("lora", "lora"), ("lora", "dora"), ("ia3", "vera"), ("lora_embedding", "adalora")]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("methods", METHODS)
def test_each_row_is_that_of_its_adapter_alone(methods, family, tmp_path):
    base, ours = two_adapters(family, methods, tmp_path)
    ids = rows(family)
    with torch.no_grad():
        wanted = []
        for row, name in zip(ids, NAMES, strict=True):
            if name == "__base__":
                wanted.append(base(input_ids=row[None]).logits)
                continue
            ours.set_adapter(name)
            wanted.append(ours(input_ids=row[None]).logits)
        found = ours(input_ids=ids, adapter_names=NAMES).logits
    assert torch.allclose(found, torch.cat(wanted), rtol=1e-4, atol=1e-5)
    assert ours.active_adapters == ["a"], "the active adapter is as it was"

    cpp = _load(base, family, tmp_path / "model")
    for name in "ab":
        _C.load_adapter(cpp, str(tmp_path / name), name)
    cpp.eval()
    tokens = _C.TokenBatch.from_rows(ids)
    names = ["" if n == "__base__" else n for n in NAMES]
    with torch.no_grad(), _C.use_adapters(cpp, tokens.cu_seqlens, names):
        hidden = cpp.hidden(tokens)
        assert torch.allclose(
            cpp.logits(hidden) if family != "bert" else hidden,
            torch.cat(wanted).flatten(0, 1) if family != "bert" else _hidden(ours, ids),
            rtol=1e-4,
            atol=3e-5,
        )


def _load(base, family, folder):
    base.save_pretrained(folder)
    return (_C.load_bert if family == "bert" else _C.load_model)(str(folder))


def _hidden(ours, ids):
    out = ours(input_ids=ids, adapter_names=NAMES, output_hidden_states=True)
    return out.hidden_states[-1].flatten(0, 1)


def test_hf_peft_has_the_same_numbers(tmp_path):
    base, ours = two_adapters("llama", ("lora", "lora"), tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a", adapter_name="a")
    theirs.load_adapter(tmp_path / "b", adapter_name="b")
    ids = rows("llama")
    with torch.no_grad():
        wanted = theirs.eval()(input_ids=ids, adapter_names=NAMES).logits
        found = ours(input_ids=ids, adapter_names=NAMES).logits
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        a = theirs.generate(input_ids=ids, adapter_names=NAMES, **options)
        b = ours.generate(input_ids=ids, adapter_names=NAMES, **options)
        assert torch.equal(a, b)
        beams = ours.generate(input_ids=ids, adapter_names=NAMES, num_beams=3, **options)
        ours.set_adapter("b")
        alone = ours.generate(input_ids=ids[2:3], num_beams=3, **options)
    assert torch.equal(beams[2:3], alone)


@pytest.mark.parametrize("side", ["python", "cpp"])
def test_gradients_reach_each_adapter_from_its_rows(side, tmp_path):
    base, ours = two_adapters("llama", ("lora", "dora"), tmp_path)
    ids, names = rows("llama"), ["a", "b", "a", "b"]
    cpp = _load(base, "llama", tmp_path / "model")
    for name in "ab":
        _C.load_adapter(cpp, str(tmp_path / name), name)
    model = ours if side == "python" else cpp

    def run(which, names=None):
        if side == "python":
            extra = {} if names is None else {"adapter_names": names}
            return ours(input_ids=ids[which], **extra).logits.square().sum()
        tokens = _C.TokenBatch.from_rows(ids[which])
        if names is None:
            return cpp.logits(cpp.hidden(tokens)).square().sum()
        with _C.use_adapters(cpp, tokens.cu_seqlens, names):
            return cpp.logits(cpp.hidden(tokens)).square().sum()

    def parameters(name):
        if side == "python":
            return [p for k, p in ours.named_parameters() if f".{name}." in k]
        _C.set_active(cpp, [name])
        return [p for _, p in _C.trainable_parameters(cpp)]

    together, alone = {}, {}
    own = {name: parameters(name) for name in "ab"}
    for name in "ab":
        for p in own[name]:
            p.requires_grad_(True)
    run([0, 1, 2, 3], names).backward()
    for name in "ab":
        together[name] = [p.grad.clone() for p in own[name] if p.grad is not None]
        assert together[name]
    for name, which in (("a", [0, 2]), ("b", [1, 3])):
        if side == "python":
            ours.set_adapter(name)
        else:
            _C.set_active(cpp, [name])
        for p in own[name]:
            p.grad = None
        run(which).backward()
        alone[name] = [p.grad for p in own[name] if p.grad is not None]
        for x, y in zip(together[name], alone[name], strict=True):
            assert torch.allclose(x, y, rtol=1e-3, atol=1e-4)
    assert model is not None


def test_what_cannot_be_is_named(tmp_path):
    _, ours = two_adapters("llama", ("lora", "prefix"), tmp_path)
    ids = rows("llama")
    with pytest.raises(budwood.Error, match="PREFIX_TUNING"):
        ours(input_ids=ids, adapter_names=["a", "b", "a", "a"])
    with pytest.raises(budwood.Error, match="no adapter named 'c'"):
        ours(input_ids=ids, adapter_names=["a", "c", "a", "a"])
    with pytest.raises(budwood.Error, match="3 names"):
        ours(input_ids=ids, adapter_names=["a", "a", "a"])
    ours.set_adapter("a")
    ours.merge_adapter()
    with pytest.raises(budwood.Error, match="merged"):
        ours(input_ids=ids, adapter_names=["a", "a", "a", "__base__"])
    ours.unmerge_adapter()
    assert batch("llama")
