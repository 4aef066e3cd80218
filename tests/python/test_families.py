"""Every kind of adapter on the families of transformers, and on a model of one's own."""

import copy

import pytest
import torch
import transformers as tf
from test_methods import randomise
from torch import nn

import budwood

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 61,
}
DECODER = {**SMALL, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
FAMILIES = {
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**DECODER, sliding_window=4)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**DECODER)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**DECODER, head_dim=8)),
    "gemma": lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**DECODER, head_dim=8)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**DECODER, head_dim=8)),
    "phi": lambda: tf.PhiForCausalLM(
        tf.PhiConfig(**DECODER, resid_pdrop=0.0, embd_pdrop=0.0, attention_dropout=0.0)
    ),
    "phi3": lambda: tf.Phi3ForCausalLM(
        tf.Phi3Config(**DECODER, eos_token_id=1, resid_pdrop=0.0, embd_pdrop=0.0)
    ),
    "opt": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(
            vocab_size=61,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
            dropout=0.0,
            pad_token_id=0,
        )
    ),
    "roberta": lambda: tf.RobertaForSequenceClassification(
        tf.RobertaConfig(**SMALL, max_position_embeddings=64, pad_token_id=0, **NO_DROPOUT)
    ),
    "vit": lambda: tf.ViTForImageClassification(
        tf.ViTConfig(
            **{k: v for k, v in SMALL.items() if k != "vocab_size"},
            image_size=8,
            patch_size=4,
            num_labels=3,
            **NO_DROPOUT,
        )
    ),
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(
            vocab_size=61,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        )
    ),
}
METHODS = {
    "lora": lambda: budwood.LoraConfig(r=2, target_modules="all-linear"),
    "ia3": lambda: budwood.IA3Config(),
    "houlsby": lambda: budwood.BottleneckConfig.houlsby(reduction_factor=4),
    "parallel": lambda: budwood.ParallelAdapterConfig(reduction_factor=4),
    "prefix": lambda: budwood.PrefixTuningConfig(num_virtual_tokens=3),
    "prompt": lambda: budwood.PromptTuningConfig(num_virtual_tokens=3),
    "reft": lambda: budwood.ReftConfig(r=2),
}
#: What cannot be, with a part of the message that says so.
REFUSED = {
    ("prefix", "t5"): "PREFIX_TUNING",
    ("prompt", "vit"): "PROMPT_TUNING",
    ("ia3", "vit"): "target_modules",
    ("ia3", "phi3"): "target_modules",
}
CASES = [(m, f) for m in METHODS for f in FAMILIES]


def model_of(family):
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.1) if p.dim() > 1 else p.add_(torch.randn_like(p) * 0.05)
    return model


def inputs(family):
    torch.manual_seed(5)
    if family == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8)}
    rows = {"input_ids": torch.randint(3, 61, (2, 9))}
    if family == "t5":
        rows["decoder_input_ids"] = torch.randint(3, 61, (2, 4))
    return rows


@pytest.mark.parametrize(("method", "family"), CASES)
def test_a_method_on_a_family(method, family, tmp_path):
    base, rows = model_of(family), inputs(family)
    with torch.no_grad():
        bare = base(**rows).logits
    if (method, family) in REFUSED:
        with pytest.raises(budwood.Error, match=REFUSED[method, family]):
            budwood.get_peft_model(base, METHODS[method]())
        with torch.no_grad():
            assert torch.equal(base(**rows).logits, bare), "a refusal leaves the model as it was"
        return
    model = budwood.get_peft_model(copy.deepcopy(base), METHODS[method]()).eval()
    with torch.no_grad():
        fresh = model(**rows).logits
        if method not in ("prefix", "prompt"):
            assert torch.allclose(fresh, bare, rtol=1e-4, atol=1e-5)
        with model.disable_adapter():
            assert torch.equal(model(**rows).logits, bare)
    randomise(model)
    model.train()
    loss = model(**rows).logits.square().mean()
    loss.backward()
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None and p.grad.isfinite().all() for _, p in trained)
    assert sum(float(p.grad.abs().sum()) for _, p in trained) > 0
    check_slope(model, rows, [p for _, p in trained], loss.item())
    model.eval().save_pretrained(tmp_path)
    again = budwood.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**rows).logits, model(**rows).logits)
    plain = model.unload()
    with torch.no_grad():
        assert torch.equal(plain(**rows).logits, bare)


def check_slope(model, rows, parameters, loss):
    """The gradient against a central difference along it."""
    norm = sum(float(p.grad.double().square().sum()) for p in parameters) ** 0.5
    h, values = 1e-3, []
    with torch.no_grad():
        for step in (h, -2 * h):
            for p in parameters:
                p.add_(p.grad, alpha=step / norm)
            values.append(model(**rows).logits.square().mean().item())
        for p in parameters:
            p.add_(p.grad, alpha=h / norm)
    found = (values[0] - values[1]) / (2 * h)
    rounding = 4 * torch.finfo(torch.float32).eps * abs(loss) / h
    assert found == pytest.approx(norm, rel=1e-2, abs=rounding)


@pytest.mark.parametrize("family", ["mistral", "qwen3", "gemma2", "phi3", "opt"])
@pytest.mark.parametrize("method", ["prefix", "prompt", "houlsby"])
def test_generation_with_a_cache_is_token_by_token(method, family):
    model = budwood.get_peft_model(model_of(family), METHODS[method]())
    randomise(model)
    model.eval()
    ids = inputs(family)["input_ids"][:1, :5]
    wanted = ids
    with torch.no_grad():
        for _ in range(5):
            best = model(input_ids=wanted, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            wanted = torch.cat([wanted, best], 1)
        found = model.generate(
            input_ids=ids, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    assert torch.equal(found, wanted)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.mix = nn.Linear(16, 16)
        self.mlp = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))

    def forward(self, x):
        x = x + self.mix(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("method", ["lora", "houlsby", "parallel", "reft"])
def test_a_model_of_ones_own_is_described_in_a_few_lines(method):
    budwood.register_family(
        "own",
        budwood.Family(
            blocks="blocks",
            sites=(
                budwood.Site("attention", output="mix", stream="norm1"),
                budwood.Site("feed_forward", output="mlp", stream="norm2"),
            ),
        ),
    )
    torch.manual_seed(0)
    base, x = Own(), torch.randn(2, 5, 16)
    base.budwood_family = "own"
    wanted = base(x)
    model = budwood.get_peft_model(copy.deepcopy(base), METHODS[method]())
    assert torch.allclose(model(x), wanted, atol=1e-5)
    randomise(model)
    assert not torch.allclose(model(x), wanted, atol=1e-3)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_an_unknown_family_is_named():
    with pytest.raises(budwood.Error, match=r"Own.*register_family"):
        budwood.get_peft_model(Own(), METHODS["houlsby"]())
