"""budwood.optimize beside the plain model of transformers: values, gradients, masks, caches."""

import copy
import pickle

import peft
import pytest
import torch
import transformers
from conftest import make_tiny, tiny_configs

import budwood

DECODERS = list(tiny_configs())
ENCODER = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
GPT2 = {
    "vocab_size": 97,
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def model_of(name):
    torch.manual_seed(1)
    if name == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)).eval()
    if name == "bert":
        return transformers.BertModel(transformers.BertConfig(**ENCODER)).eval()
    if name == "roberta":
        return transformers.RobertaModel(transformers.RobertaConfig(**ENCODER)).eval()
    return make_tiny(name)


def ids_of(rows=3, t=12):
    return torch.randint(3, 97, (rows, t), generator=torch.Generator().manual_seed(5))


def first_output(model, **inputs):
    out = model(**inputs)
    return out.logits if "logits" in out else out.last_hidden_state


MODELS = [*DECODERS, "gpt2", "bert", "roberta"]


@pytest.mark.parametrize("name", MODELS)
def test_outputs_equal_the_plain_models(name):
    model = model_of(name)
    ids = ids_of()
    right = torch.ones_like(ids)
    right[0, 7:], right[2, 11:] = 0, 0
    left = right.flip(1)
    cases = [{}, {"attention_mask": right}, {"attention_mask": left}]
    plain = [first_output(model, input_ids=ids, **c) for c in cases]
    assert budwood.optimize(model) is model
    for case, wanted in zip(cases, plain, strict=True):
        found = first_output(model, input_ids=ids, **case)
        kept = case.get("attention_mask", torch.ones_like(ids)).bool()
        torch.testing.assert_close(found[kept], wanted[kept], **CLOSE)
    budwood.unoptimize(model)
    for case, wanted in zip(cases, plain, strict=True):
        assert torch.equal(first_output(model, input_ids=ids, **case), wanted)


@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen2-window", "gpt2"])
def test_packed_rows_equal_the_plain_models(name):
    model = model_of(name)
    ids = ids_of(2, 15)
    positions = torch.cat([torch.arange(4), torch.arange(11)]).expand(2, 15)
    plain = first_output(model, input_ids=ids, position_ids=positions, use_cache=False)
    budwood.optimize(model)
    found = first_output(model, input_ids=ids, position_ids=positions, use_cache=False)
    torch.testing.assert_close(found, plain, **CLOSE)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_masks_that_are_no_sequences_are_obeyed(name):
    model = model_of(name)
    ids = ids_of(2, 9)
    mask = torch.rand(2, 1, 9, 9, generator=torch.Generator().manual_seed(1)) > 0.4
    mask |= torch.eye(9, dtype=torch.bool)
    plain = first_output(model, input_ids=ids, attention_mask=mask)
    budwood.optimize(model)
    found = first_output(model, input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(found, plain, **CLOSE)


def adapted(name, library, **options):
    torch.manual_seed(2)
    encoder = name in ("bert", "roberta")
    targets = {"gpt2": ["c_attn", "c_fc", "c_proj"], "bert": ["query", "value", "dense"]}
    targets["roberta"] = targets["bert"]
    default = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = library.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=targets.get(name, default),
        init_lora_weights=False,
        task_type=None if encoder else "CAUSAL_LM",
        fan_in_fan_out=name == "gpt2",
        **options,
    )
    model = library.get_peft_model(model_of(name), config)
    return model.train()


def loss_and_gradients(model, **inputs):
    model.zero_grad()
    if "labels" in inputs:
        loss = model(**inputs).loss
    else:
        hidden = model(**inputs).last_hidden_state
        # Squares, since a sum of normalised values all but cancels.
        loss = (hidden * torch.linspace(0, 1, hidden.numel()).view_as(hidden)).square().mean()
    loss.backward()
    # HF PEFT's names and ours are the same
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("library", [budwood, peft], ids=["budwood", "peft"])
@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_equal_the_plain_models(name, library):
    model = adapted(name, library)
    ids = ids_of()
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if name not in ("bert", "roberta"):
        inputs["labels"] = ids.masked_fill(mask == 0, -100)
    else:
        inputs.pop("attention_mask")
    loss, wanted = loss_and_gradients(model, **inputs)
    budwood.optimize(model)
    found_loss, found = loss_and_gradients(model, **inputs)
    assert found_loss == pytest.approx(loss, rel=1e-6)
    assert found.keys() == wanted.keys()
    for key, grad in wanted.items():
        torch.testing.assert_close(found[key], grad, rtol=1e-4, atol=1e-4 * grad.abs().max().item())


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_activations_kept_in_bf16_change_no_loss_and_little_of_gradients(name):
    model = budwood.optimize(adapted(name, budwood))

    def loss_and_gradients():
        model.zero_grad()
        if name == "bert":
            hidden = model(input_ids=ids_of()).last_hidden_state
            # A random direction: along the values themselves a norm's gradient all but cancels.
            generator = torch.Generator().manual_seed(6)
            loss = (hidden * torch.randn(hidden.shape, generator=generator)).mean()
        else:
            loss = model(input_ids=ids_of(), labels=ids_of()).loss
        loss.backward()
        return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    loss, grads = loss_and_gradients()
    with budwood.activation_dtype(torch.bfloat16):
        narrow_loss, narrow = loss_and_gradients()
    assert narrow_loss == loss
    for key, grad in grads.items():
        off = (narrow[key] - grad).norm() / grad.norm().clamp_min(1e-12)
        assert off < 0.02, key
    assert any(not torch.equal(narrow[key], grad) for key, grad in grads.items())
    again_loss, again = loss_and_gradients()
    assert again_loss == loss
    assert all(torch.equal(again[key], grad) for key, grad in grads.items())
    with (
        pytest.raises(budwood.Error, match=r"float32 or bfloat16, found torch\.float16"),
        budwood.activation_dtype(torch.float16),
    ):
        pass


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(name, reentrant):
    model = budwood.optimize(adapted(name, budwood))
    inputs = {"input_ids": ids_of(), "labels": ids_of()}
    loss, wanted = loss_and_gradients(model, **inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again, found = loss_and_gradients(model, **inputs)
    assert again == loss
    for key, grad in wanted.items():
        torch.testing.assert_close(found[key], grad)


@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen2-window", "gpt2"])
def test_generation_equals_the_plain_models(name):
    model = model_of(name)
    ids = ids_of(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(ids, **options)
    wanted_alone = model.generate(ids[1:], max_new_tokens=12, do_sample=False, pad_token_id=0)
    budwood.optimize(model)
    assert torch.equal(model.generate(ids, **options), wanted)
    alone = model.generate(ids[1:], max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(alone, wanted_alone)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_second_part_of_a_prompt_continues_the_cache(name):
    model = model_of(name)
    ids = ids_of(1, 12)
    whole = first_output(model, input_ids=ids)
    budwood.optimize(model)
    begun = model(input_ids=ids[:, :5], use_cache=True)
    rest = model(input_ids=ids[:, 5:], past_key_values=begun.past_key_values, use_cache=True)
    torch.testing.assert_close(rest.logits, whole[:, 5:], **CLOSE)


@pytest.mark.parametrize("options", [{"lora_dropout": 0.3}, {"lora_bias": True}, {"bias": "all"}])
@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_options_of_lora_keep_their_meaning(name, options):
    model = adapted(name, budwood, **options)
    inputs = {"input_ids": ids_of(), "labels": ids_of()}
    if "lora_dropout" in options:
        model.eval()
    loss, wanted = loss_and_gradients(model, **inputs)
    budwood.optimize(model)
    again, found = loss_and_gradients(model, **inputs)
    assert again == pytest.approx(loss, rel=1e-6)
    for key, grad in wanted.items():
        torch.testing.assert_close(found[key], grad, rtol=1e-4, atol=1e-4 * grad.abs().max().item())


def test_dropout_of_adapters_and_of_scores_still_drops():
    model = budwood.optimize(adapted("llama", budwood, lora_dropout=0.5))
    inputs = {"input_ids": ids_of(), "labels": ids_of()}
    losses = {loss_and_gradients(model, **inputs)[0] for _ in range(3)}
    assert len(losses) == 3
    config = transformers.GPT2Config(**GPT2 | {"attn_pdrop": 0.5})
    model = budwood.optimize(transformers.GPT2LMHeadModel(config)).train()
    assert len({model(**inputs).loss.item() for _ in range(3)}) == 3


def test_a_loss_over_the_whole_step_divides_by_the_given_count():
    model = adapted("llama", budwood)
    inputs = {"input_ids": ids_of(), "labels": ids_of(), "num_items_in_batch": torch.tensor(77)}
    wanted = model(**inputs).loss
    torch.testing.assert_close(budwood.optimize(model)(**inputs).loss, wanted)


def test_while_training_with_labels_no_logits_are_made():
    model = budwood.optimize(adapted("llama", budwood))
    assert model(input_ids=ids_of(), labels=ids_of()).logits is None
    assert model(input_ids=ids_of()).logits.shape == (3, 12, 97)
    model.eval()
    assert model(input_ids=ids_of(), labels=ids_of()).logits.shape == (3, 12, 97)


def test_a_loss_that_counts_nothing_is_zero():
    model = budwood.optimize(adapted("llama", budwood))
    loss, grads = loss_and_gradients(
        model, input_ids=ids_of(), labels=torch.full_like(ids_of(), -100)
    )
    assert loss == 0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads.values())


def test_an_adapted_head_keeps_its_adapter():
    torch.manual_seed(0)
    config = budwood.LoraConfig(
        r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = budwood.get_peft_model(model_of("llama"), config).train()
    inputs = {"input_ids": ids_of(), "labels": ids_of()}
    loss, wanted = loss_and_gradients(model, **inputs)
    again, found = loss_and_gradients(budwood.optimize(model), **inputs)
    assert again == pytest.approx(loss, rel=1e-6)
    for key, grad in wanted.items():
        torch.testing.assert_close(found[key], grad, rtol=1e-4, atol=1e-6)


def test_hooks_are_called_and_hidden_states_returned():
    model = budwood.optimize(model_of("llama"))
    plain = model_of("llama")
    seen = []
    model.model.layers[1].mlp.register_forward_hook(lambda *_: seen.append("mlp"))
    model.model.layers[0].self_attn.v_proj.register_forward_hook(lambda *_: seen.append("v"))
    found = model(input_ids=ids_of(), output_hidden_states=True)
    assert seen == ["v", "mlp"]
    wanted = plain(input_ids=ids_of(), output_hidden_states=True)
    for ours, theirs in zip(found.hidden_states, wanted.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


def test_copies_and_pickles_run_on_their_own_parameters():
    model = budwood.optimize(model_of("llama"))
    wanted = first_output(model, input_ids=ids_of())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(first_output(other, input_ids=ids_of()), wanted)
        with torch.no_grad():
            other.model.layers[0].mlp.up_proj.weight.zero_()
        assert not torch.allclose(first_output(other, input_ids=ids_of()), wanted)
    assert torch.equal(first_output(model, input_ids=ids_of()), wanted)


def test_a_quantised_base_runs_fused():
    model = model_of("llama")
    budwood.quantize_model(model, "nf4")
    config = budwood.LoraConfig(
        r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = budwood.get_peft_model(model, config).train()
    inputs = {"input_ids": ids_of(), "labels": ids_of()}
    loss, wanted = loss_and_gradients(model, **inputs)
    again, found = loss_and_gradients(budwood.optimize(model), **inputs)
    assert again == pytest.approx(loss, rel=1e-6)
    for key, grad in wanted.items():
        torch.testing.assert_close(found[key], grad, rtol=1e-4, atol=1e-4 * grad.abs().max().item())


def test_full_fine_tuning_trains_the_base():
    model = model_of("llama").train()
    inputs = {"input_ids": ids_of(), "labels": ids_of()}
    loss, wanted = loss_and_gradients(model, **inputs)
    again, found = loss_and_gradients(budwood.optimize(model), **inputs)
    assert again == pytest.approx(loss, rel=1e-6)
    assert found.keys() == wanted.keys()
    for key, grad in wanted.items():
        torch.testing.assert_close(found[key], grad, rtol=1e-4, atol=1e-5)


def test_what_was_done_is_reported_and_nothing_to_do_is_refused():
    model = budwood.optimize(model_of("llama"))
    assert model.budwood_report.fused["LlamaDecoderLayer"] == 3
    assert "attention: budwood" in str(model.budwood_report)
    assert budwood.optimize(model) is model  # a second time changes nothing
    with pytest.raises(budwood.Error, match="has no module with a fused forward"):
        budwood.optimize(torch.nn.Linear(2, 2))
