"""Every method that HF PEFT has: the same numbers from the same file, both ways."""

import copy
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import budwood

warnings.filterwarnings("ignore", category=UserWarning, module="peft")


def tiny(family):
    torch.manual_seed(0)
    if family == "llama":
        config = LlamaConfig(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=False,
        )
        model = LlamaForCausalLM(config)
    elif family == "gpt2":
        config = GPT2Config(
            vocab_size=61,
            n_embd=32,
            n_layer=3,
            n_head=4,
            n_positions=64,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
        )
        model = GPT2LMHeadModel(config)
    else:
        config = BertConfig(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=64,
            num_labels=3,
            hidden_dropout_prob=0,
            attention_probs_dropout_prob=0,
        )
        model = BertForSequenceClassification(config)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.1) if p.dim() > 1 else p.add_(torch.randn_like(p) * 0.05)
    return model.eval()


TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "bert": ["query", "value", "output.dense"],
}
FEEDFORWARD = {"llama": ["down_proj"], "gpt2": ["mlp.c_proj"], "bert": ["output.dense"]}


def peft_config(method, family):
    task = "SEQ_CLS" if family == "bert" else "CAUSAL_LM"
    common = {"task_type": task}
    targets = {**common, "target_modules": TARGETS[family]}
    if method == "lora":
        return peft.LoraConfig(r=4, lora_alpha=6, **targets)
    if method == "dora":
        return peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, **targets)
    if method == "pissa":
        return peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights="pissa", **targets)
    if method == "olora":
        return peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights="olora", **targets)
    if method in ("lora_embedding", "dora_embedding"):
        name = {"llama": "embed_tokens", "gpt2": "wte", "bert": "word_embeddings"}[family]
        return peft.LoraConfig(
            r=4,
            lora_alpha=6,
            use_dora=method == "dora_embedding",
            **{**targets, "target_modules": [*TARGETS[family], name]},
        )
    if method == "trained_tokens":
        return peft.LoraConfig(r=4, trainable_token_indices=[5, 9, 17], **targets)
    if method == "saved_modules":
        head = ["classifier", "pooler.dense"] if family == "bert" else ["lm_head"]
        return peft.LoraConfig(r=4, modules_to_save=head, **targets)
    if method == "ia3":
        return peft.IA3Config(feedforward_modules=FEEDFORWARD[family], **targets)
    if method == "adalora":
        return peft.AdaLoraConfig(
            init_r=4, target_r=2, lora_alpha=6, total_step=10, orth_reg_weight=0.5, **targets
        )
    if method == "vera":
        return peft.VeraConfig(r=5, **targets)
    if method == "prefix":
        return peft.PrefixTuningConfig(num_virtual_tokens=5, **common)
    if method == "prefix_mlp":
        return peft.PrefixTuningConfig(
            num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=7, **common
        )
    if method == "prompt":
        return peft.PromptTuningConfig(num_virtual_tokens=5, **common)
    if method == "p_tuning":
        return peft.PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=7, **common)
    if method == "p_tuning_lstm":
        return peft.PromptEncoderConfig(
            num_virtual_tokens=5,
            encoder_hidden_size=7,
            encoder_reparameterization_type="LSTM",
            **common,
        )
    if method == "adaption_prompt":
        return peft.AdaptionPromptConfig(adapter_len=5, adapter_layers=2, **common)
    raise AssertionError(method)


METHODS = [
    "lora",
    "dora",
    "pissa",
    "olora",
    "lora_embedding",
    "dora_embedding",
    "trained_tokens",
    "saved_modules",
    "ia3",
    "adalora",
    "vera",
    "prefix",
    "prefix_mlp",
    "prompt",
    "p_tuning",
    "p_tuning_lstm",
    "adaption_prompt",
]
# What HF PEFT itself does not do.
NOT_IN_PEFT = {
    ("adaption_prompt", "bert"): "LLaMA-Adapter is for Llama, Mistral and GPT-2",
    ("olora", "gpt2"): "PEFT decomposes a Conv1D as it is stored, which is the transpose",
}
ENCODED = {"prefix_mlp", "p_tuning", "p_tuning_lstm"}  # PEFT's file has the encoder's output alone
CASES = [
    pytest.param(method, family, id=f"{method}-{family}")
    for method in METHODS
    for family in ("llama", "gpt2", "bert")
    if (method, family) not in NOT_IN_PEFT
]


def batch(family):
    torch.manual_seed(5)
    ids = torch.randint(3, 61, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = torch.tensor([0, 2]) if family == "bert" else ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def randomise(model, seed=7):
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if p.requires_grad:
                start = 1.0 if "ia3_l" in name or "magnitude" in name else 0.0
                noise = torch.randn_like(p) * 0.2
                p.copy_(p + noise if "magnitude" in name else start + noise)


def real(logits, rows):
    """Logits at places of real tokens; at padded ones models may differ."""
    if logits.dim() == 2:
        return logits
    extra = logits.shape[1] - rows["input_ids"].shape[1]
    keep = torch.cat([torch.ones(2, extra), rows["attention_mask"]], 1).bool()
    return logits[keep]


def files(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    return {k: t for k, t in tensors.items() if not k.startswith("budwood.")}


@pytest.mark.parametrize(("method", "family"), CASES)
def test_a_folder_of_hf_peft_gives_the_same_results_and_gradients(method, family, tmp_path):
    base, config, rows = tiny(family), peft_config(method, family), batch(family)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    randomise(theirs)
    theirs.eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = budwood.PeftModel.from_pretrained(
        copy.deepcopy(base), tmp_path / "theirs", is_trainable=True
    ).eval()
    a, b = theirs(**rows), ours(**rows)
    assert torch.allclose(real(a.logits, rows), real(b.logits, rows), rtol=1e-4, atol=2e-5)
    if method != "adalora":  # PEFT adds its penalty outside training, too
        assert b.loss.item() == pytest.approx(a.loss.item(), rel=1e-5)

    theirs.train()
    ours.train()
    losses = []
    for model in (theirs, ours):
        loss = model(**rows).loss
        losses.append(loss.item())
        loss.backward()
        parameters = [p for p in model.parameters() if p.requires_grad]
        torch.optim.SGD(parameters, lr=1.0).step()
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    if method in ENCODED:
        return  # theirs has trained its encoder, ours the table that the file holds
    theirs.save_pretrained(tmp_path / "theirs2")
    ours.save_pretrained(tmp_path / "ours2")
    wanted, found = files(tmp_path / "theirs2"), files(tmp_path / "ours2")
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert found[key].shape == tensor.shape, key
        assert torch.allclose(found[key], tensor, rtol=2e-4, atol=2e-5), key


@pytest.mark.parametrize(("method", "family"), CASES)
def test_hf_peft_loads_our_folder_with_equal_logits(method, family, tmp_path):
    base, config, rows = tiny(family), peft_config(method, family), batch(family)
    torch.manual_seed(3)
    ours = budwood.get_peft_model(copy.deepcopy(base), config)
    randomise(ours)
    ours.eval().save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    del rows["labels"]  # PEFT's AdaLoRA has no loss without a trainable adapter
    with torch.no_grad():
        a, b = theirs(**rows), ours(**rows)
    assert torch.allclose(real(a.logits, rows), real(b.logits, rows), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("method", "family"), CASES)
def test_a_saved_adapter_comes_back_as_it_was(method, family, tmp_path):
    base, config, rows = tiny(family), peft_config(method, family), batch(family)
    ours = budwood.get_peft_model(copy.deepcopy(base), config)
    randomise(ours)
    ours.eval().save_pretrained(tmp_path / "a")
    again = budwood.PeftModel.from_pretrained(
        copy.deepcopy(base), tmp_path / "a", is_trainable=True
    ).eval()
    with torch.no_grad():
        assert torch.equal(ours(**rows).logits, again(**rows).logits)
    again.save_pretrained(tmp_path / "b")
    first, second = (load_file(tmp_path / n / "adapter_model.safetensors") for n in "ab")
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key
    trained = sum(p.numel() for p in ours.parameters() if p.requires_grad)
    assert trained == sum(p.numel() for p in again.parameters() if p.requires_grad)


IDENTITY = [
    "lora",
    "dora",
    "dora_embedding",
    "pissa",
    "olora",
    "ia3",
    "vera",
    "adalora",
    "adaption_prompt",
]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("method", IDENTITY)
def test_a_fresh_adapter_leaves_the_model_as_it_is(method, family):
    if (method, family) in NOT_IN_PEFT:
        method = "ia3"
    base, rows = tiny(family), batch(family)
    with torch.no_grad():
        before = base(**rows).logits
        ours = budwood.get_peft_model(copy.deepcopy(base), peft_config(method, family)).eval()
        after = ours(**rows).logits
        assert torch.allclose(before, after, rtol=1e-5, atol=1e-5)
        with ours.disable_adapter():
            assert torch.equal(ours(**rows).logits, before)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize(
    "method",
    [
        "dora",
        "pissa",
        "ia3",
        "adalora",
        "vera",
        "lora_embedding",
        "dora_embedding",
        "trained_tokens",
    ],
)
def test_merged_equals_unmerged_and_unmerging_restores_every_bit(method, family):
    base, rows = tiny(family), batch(family)
    ours = budwood.get_peft_model(copy.deepcopy(base), peft_config(method, family))
    randomise(ours)
    ours.eval()
    before = {k: t.clone() for k, t in base.state_dict().items()}
    with torch.no_grad():
        wanted = ours(**rows).logits
        ours.merge_adapter()
        assert torch.allclose(ours(**rows).logits, wanted, rtol=1e-4, atol=1e-5)
        ours.unmerge_adapter()
        assert torch.allclose(ours(**rows).logits, wanted, rtol=1e-6, atol=1e-6)
    plain = ours.unload()
    after = plain.state_dict()
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor), key


@pytest.mark.parametrize("method", ["prefix", "prompt", "adaption_prompt"])
def test_what_is_no_weight_cannot_be_merged(method):
    ours = budwood.get_peft_model(tiny("llama"), peft_config(method, "llama"))
    with pytest.raises(budwood.Error, match="cannot be merged"):
        ours.merge_adapter()
