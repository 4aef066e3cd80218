"""The C++ trainer beside HF PEFT in a plain torch loop: one loss curve."""

import random

import peft
import pytest
import torch
import transformers
from conftest import TINY, make_tiny

from budwood import _C

STEPS = 20
OPTIONS = {
    "steps": STEPS,
    "batch_size": 3,
    "sequence_length": 16,
    "packing": "concat",
    "learning_rate": 5e-3,
    "warmup_steps": 3,
    "schedule": "cosine",
    "max_grad_norm": 1.0,
    "weight_decay": 0.01,
    "log_every": 1,
    "seed": 11,
}


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral-window"])
def test_twenty_steps_follow_pefts_loss_curve(family, tiny_folder, tmp_path):
    draw = random.Random(0)
    with _C.TokenFileWriter(tmp_path / "text", TINY["vocab_size"]) as writer:
        writer.add([draw.randrange(40) for _ in range(2000)])
    data = _C.TokenFile.open(tmp_path / "text")

    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(0)
    reference = peft.get_peft_model(make_tiny(family), config)
    reference.save_pretrained(tmp_path / "start")
    model = _C.load_model(str(tiny_folder(family)), dtype="float32")
    _C.load_adapter(model, str(tmp_path / "start"))
    ours = []
    _C.Trainer(model, data, None, OPTIONS).run(lambda metrics: ours.append(metrics["loss"]))

    reference.train()
    trained = [p for p in reference.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3, weight_decay=0.01)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 3, STEPS)
    sampler = _C.Sampler(data, 16, 3, "concat", seed=11)
    theirs = []
    for _ in range(STEPS):
        batch = sampler.next()
        rows = len(batch.tokens.cu_seqlens) - 1
        ids, labels = batch.tokens.ids.view(rows, -1), batch.labels.view(rows, -1)
        logits = reference(input_ids=ids).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        theirs.append(loss.item())
    difference = (torch.tensor(ours) - torch.tensor(theirs)).abs().max().item()
    assert difference < 1e-3
    assert ours[-1] < ours[0]
