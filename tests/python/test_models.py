"""C++ models give transformers' numbers."""

import json
import shutil

import pytest
import safetensors.torch
import torch
import transformers
from conftest import TINY, make_tiny, tiny_configs

from budwood import _C

IDS = torch.tensor(
    [[5, 17, 3, 96, 41, 8, 22, 60, 13, 2, 71, 33], [9, 9, 1, 50, 6, 88, 7, 4, 19, 30, 12, 77]]
)


def relative(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("name", tiny_configs())
def test_logits_equal_transformers(name, tiny_folder):
    model = _C.load_model(str(tiny_folder(name)), dtype="float32")
    with torch.no_grad():
        wanted = make_tiny(name)(IDS).logits
        found = model(IDS)
    assert relative(found, wanted) < 1e-5
    assert (found - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen2-window", "qwen3", "llama-yarn"])
def test_cached_generation_equals_the_uncached_forward(name, tiny_folder):
    model = _C.load_model(str(tiny_folder(name)), dtype="float32")
    prompt = IDS[0].tolist()
    new = _C.generate(model, prompt, max_new_tokens=12, eos_ids=[10_000])
    ids = prompt[:]
    for token in new:
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0, -1]
        assert logits.argmax().item() == token
        ids.append(token)
    wanted = make_tiny(name).generate(
        torch.tensor([prompt]),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=10_000,
        pad_token_id=0,
    )
    assert prompt + new == wanted[0].tolist()


def test_sequences_of_a_batch_do_not_see_each_other(tiny_folder):
    model = _C.load_model(str(tiny_folder("mistral-window")), dtype="float32")
    rows = [IDS[0, :7].tolist(), IDS[1, :3].tolist(), IDS[1].tolist()]
    together = model.logits(model.hidden(_C.TokenBatch.from_sequences(rows)))
    alone = torch.cat([model(torch.tensor([row]))[0] for row in rows])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_padding_is_dropped(tiny_folder):
    model = _C.load_model(str(tiny_folder("llama")), dtype="float32")
    ids = IDS.clone()
    mask = torch.ones_like(ids)
    mask[0, :4], mask[1, 9:] = 0, 0
    batch = _C.TokenBatch.from_rows(ids, mask)
    assert batch.cu_seqlens == [0, 8, 17]
    wanted = torch.cat([model(IDS[:1, 4:])[0], model(IDS[1:, :9])[0]])
    torch.testing.assert_close(model.logits(model.hidden(batch)), wanted, rtol=1e-5, atol=1e-5)


def test_loss_equals_transformers(tiny_folder):
    model = _C.load_model(str(tiny_folder("qwen2")), dtype="float32")
    labels = torch.full_like(IDS, -100)
    labels[:, :-1] = IDS[:, 1:]
    labels[0, 3:6] = -100
    found = model.loss(_C.TokenBatch.from_rows(IDS), labels.reshape(-1))
    logits = make_tiny("qwen2")(IDS).logits.reshape(-1, TINY["vocab_size"])
    wanted = torch.nn.functional.cross_entropy(logits, labels.reshape(-1), reduction="sum")
    assert found.count == (labels >= 0).sum()
    torch.testing.assert_close(found.sum, wanted, rtol=1e-6, atol=1e-6)


def test_all_labels_masked_is_a_zero_loss(tiny_folder):
    model = _C.load_model(str(tiny_folder("llama")), dtype="float32")
    found = model.loss(_C.TokenBatch.from_rows(IDS), torch.full((IDS.numel(),), -100))
    assert found.count == 0
    assert found.sum.item() == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_close(dtype, tiny_folder):
    model = _C.load_model(str(tiny_folder("llama")), dtype=dtype)
    assert model.dtype == dtype
    with torch.no_grad():
        assert relative(model(IDS).float(), make_tiny("llama")(IDS).logits) < 0.05


@pytest.mark.parametrize("name", ["llama", "qwen3", "llama-tied-bias"])
def test_16_bit_matrices_are_used_in_a_float32_model_as_they_lie_in_the_file(
    name, tiny_folder, tmp_path
):
    folder = tmp_path / "bf16"
    transformers.AutoModelForCausalLM.from_pretrained(
        tiny_folder(name), dtype=torch.bfloat16
    ).save_pretrained(folder)
    models = [_C.load_model(str(folder), "float32", weights=w) for w in ("dense", "packed")]
    stored = [sum(part["bytes"] for part in _C.base_weights(model)) for model in models]
    assert stored[0] == 2 * stored[1]
    ids = torch.randint(3, 97, (3, 12), generator=torch.Generator().manual_seed(3))
    config = _C.LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        target_modules=["q_proj", "down_proj"],
        init_lora_weights=False,
    )
    results = []
    for model in models:
        _C.inject(model, config, seed=1)
        loss = model.loss(_C.TokenBatch.from_rows(ids), ids.reshape(-1)).sum
        loss.backward()
        grads = [p.grad.clone() for _, p in _C.trainable_parameters(model)]
        results.append([loss.detach(), model(ids).detach(), *grads])
    for dense, packed in zip(*results, strict=True):
        assert packed.dtype == torch.float32
        # Sums of a few rows go in another order over fp32 than over what is decoded.
        assert relative(packed, dense) < 1e-5
    # A merge has the file's dtype, and comes back to the bit.
    before = models[1](ids).detach()
    _C.merge(models[1])
    assert torch.allclose(models[1](ids), before, atol=0.2)
    _C.save_model(models[1], str(tmp_path / "merged"))
    files = safetensors.torch.load_file(tmp_path / "merged" / "model.safetensors")
    assert {t.dtype for t in files.values() if t.dim() == 2} == {torch.bfloat16}
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(saved.float()(ids).logits, models[1](ids), atol=1e-4)
    _C.unmerge(models[1])
    assert torch.equal(models[1](ids), before)


def test_saved_folder_opens_in_transformers(tiny_folder, tmp_path):
    for name in ("llama-tied-bias", "qwen3", "mistral-window"):
        model = _C.load_model(str(tiny_folder(name)), dtype="float32")
        _C.save_model(model, str(tmp_path / name), max_shard_size=20_000)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        with torch.no_grad():
            torch.testing.assert_close(again(IDS).logits, make_tiny(name)(IDS).logits)
        assert len(list((tmp_path / name).glob("*.safetensors"))) > 1


def test_sampling_repeats_with_its_seed_and_follows_the_distribution(tiny_folder):
    model = _C.load_model(str(tiny_folder("llama")), dtype="float32")
    kwargs = {"max_new_tokens": 20, "temperature": 1.0, "eos_ids": [10_000]}
    first = _C.generate(model, [5, 6], seed=1, **kwargs)
    assert first == _C.generate(model, [5, 6], seed=1, **kwargs)
    assert first != _C.generate(model, [5, 6], seed=2, **kwargs)
    with torch.no_grad():
        logits = model(torch.tensor([[5, 6]]))[0, -1]
    wanted = logits.softmax(-1)
    one = {"max_new_tokens": 1, "temperature": 1.0, "eos_ids": [10_000]}
    draws = torch.tensor([_C.generate(model, [5, 6], seed=s, **one)[0] for s in range(400)])
    share = torch.bincount(draws, minlength=TINY["vocab_size"]) / 400
    assert (share - wanted).abs().max() < 0.12
    top3 = {_C.generate(model, [5, 6], seed=s, top_k=3, **one)[0] for s in range(60)}
    assert top3 <= set(wanted.topk(3).indices.tolist())
    order = wanted.sort(descending=True)
    nucleus = set(order.indices[: int((order.values.cumsum(0) < 0.5).sum()) + 1].tolist())
    assert {_C.generate(model, [5, 6], seed=s, top_p=0.5, **one)[0] for s in range(60)} <= nucleus


def test_generation_stops_at_eos(tiny_folder):
    model = _C.load_model(str(tiny_folder("llama")), dtype="float32")
    free = _C.generate(model, [5, 6, 7], max_new_tokens=10, eos_ids=[10_000])
    stopped = _C.generate(model, [5, 6, 7], max_new_tokens=10, eos_ids=[free[3]])
    assert stopped == free[: free.index(free[3]) + 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt_neox"}, "model type 'gpt_neox' is not supported"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architecture"),
        ({"hidden_size": None}, "'hidden_size' is missing"),
        ({"rms_norm_eps": None}, "'rms_norm_eps' is missing"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope type 'longrope'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"hidden_act": "gelu"}, "activation"),
        ({"num_key_value_heads": 4}, "not a multiple"),
        ({"intermediate_size": 80}, r"\[72, 48\].*\[80, 48\]"),
        ({"num_hidden_layers": 4}, "model.layers.3"),
        ({"num_hidden_layers": 2}, "do not belong"),
        ({"vocab_size": "many"}, "vocab_size"),
    ],
)
def test_a_wrong_config_is_a_clear_error(change, message, tiny_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder("llama"), folder)
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if v is not None})
    )
    with pytest.raises(_C.Error, match=message):
        _C.load_model(str(folder))


def test_ids_outside_the_vocabulary_are_refused(tiny_folder):
    model = _C.load_model(str(tiny_folder("llama")))
    with pytest.raises(_C.Error, match="token id 97 is outside the vocabulary of 97"):
        model(torch.tensor([[1, 97]]))
    with pytest.raises(_C.Error, match="token id -1"):
        model(torch.tensor([[1, -1]]))


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(_C.Error, match="nowhere"):
        _C.load_model(str(tmp_path / "nowhere"))


def test_smollm2_from_its_gguf_equals_transformers(smollm2_gguf, tmp_path):
    model = _C.load_model(str(smollm2_gguf), weights="dense")
    _C.save_model(model, str(tmp_path / "folder"), tokenizer_from=str(smollm2_gguf))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "folder")
    ids = tokenizer("KING. What news from the north, my lord?", return_tensors="pt").input_ids
    direct = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    )
    through_folder = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    with torch.no_grad():
        found = model(ids)
        for other in (direct, through_folder):
            assert (found - other(ids).logits).abs().max() < 1e-4
