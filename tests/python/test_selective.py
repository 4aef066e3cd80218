"""Back-propagation through some tokens, against the whole graph with the rest held constant."""

import copy

import pytest
import torch
import transformers
from test_full_training import IDS, batch_of, whole
from test_trainer import adapted, make_rows

import budwood
from budwood import _C

FAMILIES = ["llama", "llama-tied-bias", "mistral-window", "qwen2-window", "qwen3", "gpt2"]
__all__ = ["whole"]


def gradients(model):
    return {n: p.grad.clone() for n, p in _C.trainable_parameters(model)}


def relative(found, wanted):
    top = sum((found[n] - wanted[n]).square().sum() for n in wanted).sqrt()
    return (top / sum(w.square().sum() for w in wanted.values()).sqrt()).item()


@pytest.mark.parametrize("name", FAMILIES)
def test_with_all_tokens_it_is_the_ordinary_gradient(name, whole):
    folder, _ = whole(name)
    batch, labels = batch_of(IDS)
    one, two = (_C.load_model(str(folder), "float32") for _ in range(2))
    for model in (one, two):
        _C.train_all(model)
    ordinary = one.loss(batch, labels)
    ordinary.sum.backward()
    chosen = _C.selected_loss(two, batch, labels, list(range(IDS.numel())))
    chosen.sum.backward()
    assert chosen.count == ordinary.count
    assert chosen.sum.item() == pytest.approx(ordinary.sum.item(), rel=1e-6)
    assert relative(gradients(two), gradients(one)) < 1e-5


def with_constants(model, rows):
    """The loss of a transformers Llama over chosen tokens, where hidden states, keys and values of
    the others are constants: the definition, with the whole graph."""
    ids = IDS
    chosen = torch.zeros(ids.shape, dtype=torch.bool).view(-1)
    chosen[rows] = True
    chosen = chosen.view(ids.shape)[..., None]
    body = model.model

    def cut(x):
        return torch.where(chosen, x, x.detach())

    positions = torch.arange(ids.shape[1])[None]
    x = cut(body.embed_tokens(ids))
    cos, sin = body.rotary_emb(x, positions)
    heads = model.config.num_attention_heads
    groups = heads // model.config.num_key_value_heads
    for layer in body.layers:
        h = layer.input_layernorm(x)
        a = layer.self_attn
        q, k, v = a.q_proj(h), cut(a.k_proj(h)), cut(a.v_proj(h))
        q, k, v = (t.view(*ids.shape, -1, a.head_dim).transpose(1, 2) for t in (q, k, v))
        q, k = transformers.models.llama.modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = cut(x + a.o_proj(out.transpose(1, 2).flatten(2)))
        x = cut(x + layer.mlp(layer.post_attention_layernorm(x)))
    logits = model.lm_head(body.norm(x))
    labels = torch.full_like(ids, -100)
    labels[:, :-1] = ids[:, 1:]
    labels = torch.where(chosen[..., 0], labels, -100)
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="sum"
    )


ROWS = [0, 4, 5, 9, 10, 13, 19]


def test_the_gradient_is_that_of_the_graph_with_constants(whole):
    folder, theirs = whole("llama")
    model = _C.load_model(str(folder), "float32")
    _C.train_all(model)
    batch, labels = batch_of(IDS)
    loss = _C.selected_loss(model, batch, labels, ROWS)
    loss.sum.backward()
    theirs.zero_grad()
    wanted = with_constants(theirs, ROWS)
    wanted.backward()
    assert loss.count == 5
    assert loss.sum.item() == pytest.approx(wanted.item(), rel=1e-6)
    reference = {n: p.grad for n, p in theirs.named_parameters()}
    assert relative(gradients(model), reference) < 1e-5
    ordinary = _C.load_model(str(folder), "float32")
    _C.train_all(ordinary)
    ordinary.loss(batch, labels).sum.backward()
    assert relative(gradients(model), gradients(ordinary)) > 0.1


@pytest.mark.parametrize("checkpointing", [0, 1])
def test_adapters_on_packed_bases_are_trained_with_it(checkpointing, tiny_folder):
    models = []
    for _ in range(2):
        model = _C.load_model(str(tiny_folder("llama")), "float32", quantize="nf4")
        config = _C.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        _C.inject(model, config, seed=3)
        model.checkpointing = checkpointing
        models.append(model)
    batch, labels = batch_of(IDS)
    models[0].loss(batch, labels).sum.backward()
    _C.selected_loss(models[1], batch, labels, list(range(20))).sum.backward()
    assert relative(gradients(models[1]), gradients(models[0])) < 1e-5


def test_memory_grows_with_the_chosen_tokens_alone(whole):
    folder, _ = whole("llama")
    model = _C.load_model(str(folder), "float32")
    _C.train_all(model)
    ids = torch.randint(0, 90, (1, 32))
    batch, labels = batch_of(ids)

    def kept(loss):
        sizes = {}

        def pack(t):
            sizes[t.data_ptr()] = t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss()
        return sum(sizes.values())

    parameters = kept(lambda: _C.selected_loss(model, batch, labels, [0]))
    few = kept(lambda: _C.selected_loss(model, batch, labels, [0, 9, 31])) - parameters
    many = kept(lambda: _C.selected_loss(model, batch, labels, list(range(32)))) - parameters
    assert 0 < few < 0.2 * many


def test_tokens_are_chosen_as_it_says():
    batch = _C.TokenBatch.from_sequences([list(range(10)), list(range(30))])
    labels = torch.full((40,), -100)
    labels[20:30] = 1
    seen = set()
    for step in range(200):
        rows = _C.select_tokens(batch, labels, 6, seed=1, step=step)
        assert rows == sorted(set(rows))
        first, second = [r for r in rows if r < 10], [r for r in rows if r >= 10]
        assert len(first) == len(second) == 6
        assert {0, 9} <= set(first)
        assert {10, 39} <= set(second)
        assert all(20 <= r < 30 for r in second[1:-1])
        seen.update(rows)
        assert rows == _C.select_tokens(batch, labels, 6, seed=1, step=step)
    assert seen == {*range(10), 10, *range(20, 30), 39}
    assert len(_C.select_tokens(batch, labels, 0.25)) == 3 + 8
    with pytest.raises(
        budwood.Error, match="11 tokens are to be chosen of each sequence, one has 10"
    ):
        _C.select_tokens(batch, labels, 11)


def test_what_it_does_not_know_is_refused(tiny_folder, whole):
    batch, labels = batch_of(IDS)
    model = _C.load_model(str(tiny_folder("llama")), "float32")
    for rows, message in (
        ([0, 0], "wanted rising numbers"),
        ([99], "wanted rising numbers"),
        ([0, 1], "no token of sequence 1"),
    ):
        with pytest.raises(budwood.Error, match=message):
            _C.selected_loss(model, batch, labels, rows)
    _C.inject(model, _C.PrefixTuningConfig(num_virtual_tokens=3))
    with pytest.raises(budwood.Error, match="looks at whole sequences"):
        _C.selected_loss(model, batch, labels, ROWS)


def test_a_run_learns_and_goes_on_to_the_bit(tmp_path, tiny_folder):
    data = make_rows(tmp_path / "x", count=16)
    options = {"steps": 30, "batch_size": 4, "sequence_length": 24, "learning_rate": 2e-2}
    options |= {"selected_tokens": 0.4, "grad_accumulation": 2, "seed": 2, "log_every": 1}
    model = adapted(tiny_folder("llama"))
    start = _C.evaluate(model, _C.Sampler(data, 24, 4))["loss"]
    _C.Trainer(model, data, None, options).run()
    assert _C.evaluate(model, _C.Sampler(data, 24, 4))["loss"] < start - 0.05

    out = {**options, "output": str(tmp_path / "out")}
    trainer = _C.Trainer(adapted(tiny_folder("llama")), data, None, out)
    trainer.run(lambda m: trainer.request_stop() if m["step"] == 11 else None)
    other = adapted(tiny_folder("llama"))
    _C.Trainer(other, data, None, {**out, "resume": "auto"}).run()
    wanted = dict(_C.trainable_parameters(model))
    for name, p in _C.trainable_parameters(other):
        assert torch.equal(p, wanted[name]), name
    for changes, message in (
        ({"selected_tokens": 1.5}, "wanted a whole number"),
        ({"selected_tokens": 25}, "no more than sequence_length"),
        ({"selected_tokens": -1}, "at least 0"),
        ({"selected_tokens": 4, "optimizer": "mezo", "grad_accumulation": 1}, "0 with mezo"),
    ):
        with pytest.raises(budwood.Error, match=message):
            _C.Trainer(adapted(tiny_folder("llama")), data, None, {**options, **changes})
    with pytest.raises(budwood.Error, match="are to be chosen of each sequence"):
        _C.Trainer(other, data, None, {**options, "selected_tokens": 22, "packing": "none"}).run()


@pytest.mark.parametrize("name", ["llama", "llama-tied-bias", "qwen2", "qwen3", "mistral-full"])
def test_torch_models_of_transformers_do_the_same(name, whole):
    folder, theirs = whole(name)
    model = copy.deepcopy(theirs)
    every = torch.arange(10).expand(2, 10)
    model.zero_grad()
    loss = budwood.selective_loss(model, IDS, rows=every)
    loss.backward()
    theirs.zero_grad()
    ordinary = theirs(IDS, labels=IDS).loss
    ordinary.backward()
    assert loss.item() == pytest.approx(ordinary.item(), rel=1e-5)
    found = {n: p.grad for n, p in model.named_parameters()}
    assert relative(found, {n: p.grad for n, p in theirs.named_parameters()}) < 1e-5

    rows = torch.tensor([[0, 4, 5, 9], [0, 3, 7, 9]])
    model.zero_grad()
    loss = budwood.selective_loss(model, IDS, rows=rows)
    loss.backward()
    ours = _C.load_model(str(folder), "float32")
    _C.train_all(ours)
    batch, labels = batch_of(IDS)
    flat = [*rows[0].tolist(), *(10 + rows[1]).tolist()]
    same = _C.selected_loss(ours, batch, labels, flat)
    (same.sum / same.count).backward()
    assert loss.item() == pytest.approx((same.sum / same.count).item(), rel=1e-5)
    assert relative({n: p.grad for n, p in model.named_parameters()}, gradients(ours)) < 1e-5


def test_torch_models_choose_and_refuse(whole):
    _, theirs = whole("llama")
    model = budwood.get_peft_model(
        copy.deepcopy(theirs),
        budwood.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    generator = torch.Generator().manual_seed(1)
    budwood.selective_loss(model, IDS, amount=0.3, generator=generator).backward()
    assert any(p.grad is not None and p.grad.norm() > 0 for p in model.parameters())
    for amount, message in ((11, "rows of 10: choose a part"), (0, "wanted more than 0")):
        with pytest.raises(budwood.Error, match=message):
            budwood.selective_loss(model, IDS, amount=amount)
    with pytest.raises(budwood.Error, match="rising numbers below 10"):
        budwood.selective_loss(model, IDS, rows=torch.tensor([[3, 2], [0, 1]]))
    _, windowed = whole("mistral-window")
    with pytest.raises(budwood.Error, match="layers of 'sliding_attention' and rows of 10"):
        budwood.selective_loss(windowed, IDS, amount=4)
    labels = torch.full_like(IDS, -100)
    with pytest.raises(budwood.Error, match="no chosen token counts"):
        budwood.selective_loss(model, IDS, labels, amount=4)
