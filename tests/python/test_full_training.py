"""Whole models trained in C++: gradients of every tensor, and runs with every optimiser."""

import json
import math

import pytest
import torch
import transformers
from conftest import TINY, tiny_configs
from test_trainer import adapted, make_rows

import budwood
from budwood import _C

IDS = torch.tensor([[5, 17, 3, 41, 8, 22, 60, 13, 2, 71], [9, 1, 33, 54, 12, 7, 18, 40, 77, 5]])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """whole(name): (folder, transformers model) in float32 without dropout."""
    made = {}

    def model(name):
        if name not in made:
            torch.manual_seed(3)
            if name == "gpt2":
                config = transformers.GPT2Config(
                    vocab_size=TINY["vocab_size"], n_positions=32, n_embd=32, n_layer=2, n_head=4
                )
                config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
            else:
                config = tiny_configs()[name]
            theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
            folder = tmp_path_factory.mktemp("whole") / name
            theirs.save_pretrained(folder)
            made[name] = folder, theirs
        return made[name]

    return model


def batch_of(ids):
    labels = torch.full_like(ids, -100)
    labels[:, :-1] = ids[:, 1:]
    return _C.TokenBatch.from_rows(ids), labels.flatten()


@pytest.mark.parametrize("checkpointing", [0, 1])
@pytest.mark.parametrize("name", [*tiny_configs(), "gpt2"])
def test_every_gradient_is_that_of_transformers(name, checkpointing, whole):
    folder, theirs = whole(name)
    model = _C.load_model(str(folder), "float32")
    _C.train_all(model)
    model.checkpointing = checkpointing
    model.train()
    batch, labels = batch_of(IDS)
    loss = model.loss(batch, labels)
    (loss.sum / loss.count).backward()
    theirs.zero_grad()
    theirs(IDS, labels=IDS).loss.backward()
    wanted = {name: p.grad for name, p in theirs.named_parameters()}
    found = dict(_C.trainable_parameters(model))
    assert len(found) == len(wanted)
    for path, p in found.items():
        reference = wanted[path]
        if p.shape != reference.shape:
            reference = reference.T
        assert (p.grad - reference).norm() <= 2e-6 * max(reference.norm(), 1e-4), path


OPTIONS = {
    "tune": "full",
    "steps": 30,
    "batch_size": 4,
    "sequence_length": 24,
    "learning_rate": 5e-3,
    "schedule": "constant",
    "log_every": 1,
    "seed": 3,
}
METHODS = {
    "adamw": {},
    "fused": {"fused_backward": True},
    "adamw8bit": {"optimizer": "adamw8bit"},
    "galore": {"optimizer": "galore", "galore_rank": 8, "galore_refresh": 5, "galore_scale": 1.0},
    "lomo": {"optimizer": "lomo", "learning_rate": 0.3},
    "lomo-free": {"optimizer": "lomo", "learning_rate": 0.1, "max_grad_norm": 0.0},
    "adalomo": {"optimizer": "adalomo", "learning_rate": 0.05},
    "mezo": {"optimizer": "mezo", "learning_rate": 1e-4, "steps": 300},
    "lisa": {"blocks": "lisa", "active_blocks": 1, "block_steps": 5},
    "badam": {"blocks": "badam", "block_steps": 5},
    "lisa-adalomo": {"blocks": "lisa", "active_blocks": 1, "optimizer": "adalomo"},
}


def run(folder, data, evaluation, **changes):
    model = _C.load_model(str(folder), "float32")
    trainer = _C.Trainer(model, data, evaluation, {**OPTIONS, **changes})
    return model, trainer, trainer.run()


@pytest.mark.parametrize("method", METHODS)
def test_each_optimiser_learns_and_writes_a_model_that_transformers_opens(method, whole, tmp_path):
    folder, _ = whole("llama-tied-bias")
    data = make_rows(tmp_path / "x", count=16)
    start = _C.evaluate(_C.load_model(str(folder), "float32"), _C.Sampler(data, 24, 4))["loss"]
    out = tmp_path / "out"
    model, trainer, result = run(
        folder, data, data, output=str(out), tokenizer_from="", **METHODS[method]
    )
    assert result["evaluation"]["loss"] < start - 1e-3
    assert trainer.memory_plan["optimizer"] >= 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out / "model").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), theirs(IDS).logits, atol=1e-4, rtol=1e-4)
    assert (out / "best" / "model.safetensors").exists()
    assert (out / "mezo.safetensors").exists() == (method == "mezo")
    if method == "mezo":
        fresh = _C.load_model(str(folder), "float32")
        _C.train_all(fresh)
        _C.mezo_replay(_C.trainable_parameters(fresh), _C.MezoLog.load(out / "mezo.safetensors"))
        for (name, p), (_, q) in zip(
            _C.trainable_parameters(fresh), _C.trainable_parameters(model), strict=True
        ):
            assert torch.equal(p, q), name


@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_run_goes_on_to_the_same_bytes(method, whole, tmp_path):
    folder, _ = whole("llama")
    data = make_rows(tmp_path / "x", count=16)
    changes = {**METHODS[method], "steps": 12}
    model, _, _ = run(folder, data, None, **changes)
    out = str(tmp_path / "out")
    stopped = _C.load_model(str(folder), "float32")
    trainer = _C.Trainer(stopped, data, None, {**OPTIONS, **changes, "output": out})

    def stop(metrics):
        if metrics["step"] == 7:
            trainer.request_stop()

    assert trainer.run(stop)["interrupted"]
    other, _, result = run(folder, data, None, **changes, output=out, resume="auto")
    assert result["steps"] == 12
    wanted = dict(model.named_parameters())
    for name, p in other.named_parameters():
        assert torch.equal(p, wanted[name]), name


@pytest.mark.parametrize("checkpointing", [0, 1])
@pytest.mark.parametrize("name", ["qwen3", "llama-tied-bias", "gpt2"])
def test_updates_during_the_backward_are_those_after_it(name, checkpointing, whole, tmp_path):
    folder, _ = whole(name)
    data = make_rows(tmp_path / "x", count=16)
    options = {"steps": 6, "max_grad_norm": 0.5, "gradient_checkpointing": checkpointing}
    # AdamW divides a gradient by itself: with its usual eps one that is nothing but rounding moves
    # a weight as far as any other.
    options["eps"] = 1e-4
    one, _, first = run(folder, data, None, **options)
    two, _, second = run(folder, data, None, **options, fused_backward=True)
    assert first["final_loss"] == pytest.approx(second["final_loss"], rel=1e-6)
    wanted = dict(one.named_parameters())
    for name, p in two.named_parameters():
        assert (p - wanted[name]).abs().max() < 1e-6, name


@pytest.mark.parametrize("optimizer", ["adamw8bit", "lomo", "adalomo", "mezo"])
def test_adapters_on_4_bit_bases_are_trained_with_them_too(optimizer, whole, tmp_path):
    folder, _ = whole("llama")
    data = make_rows(tmp_path / "x", count=16)
    model = _C.load_model(str(folder), "float32", quantize="nf4")
    codes = {n: p.clone() for n, p in model.named_parameters() if not p.is_floating_point()}
    assert codes
    _C.inject(model, _C.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    with torch.no_grad():
        for name, p in _C.trainable_parameters(model):
            if "lora_B" in name:
                p.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    rate = {"adamw8bit": 1e-2, "lomo": 1.0, "adalomo": 0.1, "mezo": 1e-3}[optimizer]
    options = {**OPTIONS, "tune": "adapter", "optimizer": optimizer, "learning_rate": rate}
    options["steps"] = 200 if optimizer == "mezo" else 30
    losses = []
    start = _C.evaluate(model, _C.Sampler(data, 24, 4))["loss"]
    _C.Trainer(model, data, None, options).run(lambda m: losses.append(m["loss"]))
    assert _C.evaluate(model, _C.Sampler(data, 24, 4))["loss"] < start - 1e-3
    for name, p in model.named_parameters():
        if name in codes:
            assert torch.equal(p, codes[name])


def test_what_does_not_go_together_is_refused_by_name(whole, tiny_folder, tmp_path):
    folder, _ = whole("llama")
    data = make_rows(tmp_path / "x")
    packed = _C.load_model(str(folder), "float32", quantize="nf4")
    with pytest.raises(budwood.Error, match="is packed, and codes have no gradient"):
        _C.Trainer(packed, data, None, OPTIONS)
    with pytest.raises(budwood.Error, match="the model has an adapter at"):
        _C.Trainer(adapted(tiny_folder("llama")), data, None, OPTIONS)
    for changes, message in (
        ({"optimizer": "lomo", "grad_accumulation": 2}, "grad_accumulation is 2, wanted 1"),
        ({"fused_backward": True, "grad_accumulation": 2}, "grad_accumulation is 2, wanted 1"),
        ({"fused_backward": True, "optimizer": "mezo"}, "fused_backward is true, wanted false"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd', wanted"),
        ({"tune": "half"}, "tune is 'half'"),
        ({"optimizer": "lora_fa"}, "lora_fa and lora_plus_ratio are about LoRA"),
        ({"blocks": "some"}, "kind is 'some'"),
        ({"blocks": "lisa", "active_blocks": 9}, "9 blocks are to be active, the model has"),
        ({"blocks": "badam", "optimizer": "mezo"}, "'all' with lora_fa and mezo"),
        ({"galore_rank": 0}, "galore_rank is 0"),
        ({"mezo_eps": 0.0}, "mezo_eps is 0"),
        ({"clip_value": -1.0}, "clip_value is -1"),
    ):
        with pytest.raises(budwood.Error, match=message):
            run(folder, data, None, **changes)
    half = _C.load_model(str(folder), "bfloat16")
    with pytest.raises(budwood.Error, match="is bfloat16, wanted float32"):
        _C.Trainer(half, data, None, {**OPTIONS, "optimizer": "mezo"})
    dropout = adapted(tiny_folder("llama"), lora_dropout=0.5)
    options = {**OPTIONS, "tune": "adapter", "optimizer": "mezo"}
    with pytest.raises(budwood.Error, match="set dropout"):
        _C.Trainer(dropout, data, None, options).run()
    model = _C.load_model(str(folder), "float32")
    _C.inject(model, _C.AdaLoraConfig(target_modules=["q_proj"], total_step=30))
    with pytest.raises(budwood.Error, match="needs all gradients of a step"):
        _C.Trainer(model, data, None, {**options, "optimizer": "lomo"})


def test_a_loss_that_is_not_finite_leaves_the_model_as_it_was(whole, tmp_path):
    folder, _ = whole("llama")
    data = make_rows(tmp_path / "x", count=16)
    model = _C.load_model(str(folder), "float32")
    options = {**OPTIONS, "optimizer": "lomo", "learning_rate": 1e30, "steps": 5}
    kept = {}

    def keep(metrics):
        kept.clear()
        kept.update({n: p.detach().clone() for n, p in model.named_parameters()})

    with pytest.raises(budwood.Error, match="The model is as it was after step"):
        _C.Trainer(model, data, None, options).run(keep)
    for name, p in model.named_parameters():
        assert torch.equal(p, kept[name]), name


def test_bf16_models_are_trained_with_fp32_masters(whole, tmp_path):
    folder, _ = whole("llama")
    data = make_rows(tmp_path / "x", count=16)
    model = _C.load_model(str(folder), "bfloat16")
    trainer = _C.Trainer(model, data, data, {**OPTIONS, "learning_rate": 1e-3})
    result = trainer.run()
    assert math.isfinite(result["evaluation"]["loss"])
    assert result["evaluation"]["loss"] < math.log(TINY["vocab_size"])
    assert json.dumps(trainer.memory_plan)
