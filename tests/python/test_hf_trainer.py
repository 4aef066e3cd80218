"""HF's Trainer trains, saves and resumes an adapted model."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import budwood

pytestmark = pytest.mark.filterwarnings("ignore")


def model():
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=64,
        )
    )
    config = budwood.LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return budwood.get_peft_model(base, config)


def rows(count=32):
    generator = torch.Generator().manual_seed(1)
    start = torch.randint(0, 64, (count, 1), generator=generator)
    ids = (start + torch.arange(12)) % 64
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer(folder, **arguments):
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 8,
        "save_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "seed": 7,
    }
    settings.update(arguments)
    return Trainer(
        model(), TrainingArguments(**settings), train_dataset=rows(), eval_dataset=rows(4)
    )


def adapter(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def test_trains_saves_and_resumes_to_the_same_adapter(tmp_path):
    whole = trainer(tmp_path / "whole")
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    assert (checkpoint / "adapter_model.safetensors").is_file()
    assert not (checkpoint / "model.safetensors").exists()

    resumed = trainer(tmp_path / "resumed")
    before = sum(p.requires_grad for p in resumed.model.parameters())
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert sum(p.requires_grad for p in resumed.model.parameters()) == before
    wanted, found = adapter(whole.model), adapter(resumed.model)
    assert wanted.keys() == found.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=0)

    loaded = budwood.PeftModel.from_pretrained(
        model().unload(), tmp_path / "whole" / "checkpoint-8"
    )
    ids = torch.stack([row["input_ids"] for row in rows(3)])
    assert torch.equal(loaded(ids).logits, whole.model.eval()(ids).logits)


def test_trains_with_gradient_checkpointing(tmp_path):
    plain = trainer(tmp_path / "a", max_steps=3)
    checkpointed = trainer(tmp_path / "b", max_steps=3, gradient_checkpointing=True)
    plain.train()
    checkpointed.train()
    wanted, found = adapter(plain.model), adapter(checkpointed.model)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-3, atol=1e-5)


def test_loads_the_best_checkpoint_at_the_end(tmp_path):
    best = trainer(
        tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=4, max_steps=8
    )
    best.train()
    assert best.state.best_model_checkpoint is not None
