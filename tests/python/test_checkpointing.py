"""Blocks that run again in the backward: the same gradients and runs, less memory."""

import subprocess
import sys

import pytest
import torch
from conftest import TINY
from test_trainer import OPTIONS, adapted, make_rows, trained

from budwood import _C

IDS = torch.randint(0, TINY["vocab_size"], (3, 13), generator=torch.Generator().manual_seed(0))


def gradients(model, every):
    model.checkpointing = every
    model.train()
    torch.manual_seed(11)
    for _, parameter in _C.trainable_parameters(model):
        parameter.grad = None
    loss = model.loss(_C.TokenBatch.from_rows(IDS), IDS.reshape(-1))
    loss.sum.backward()
    return loss.sum.detach(), [p.grad.clone() for _, p in _C.trainable_parameters(model)]


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral-window"])
@pytest.mark.parametrize("changes", [{}, {"lora_dropout": 0.3}, {"layers_to_transform": [2]}])
def test_gradients_stay_the_same_to_the_bit(tiny_folder, family, changes):
    model = adapted(tiny_folder(family), init_lora_weights=False, **changes)
    kept = gradients(model, 0)
    for every in (1, 2, 3):
        again = gradients(model, every)
        assert torch.equal(again[0], kept[0])
        for found, wanted in zip(again[1], kept[1], strict=True):
            assert torch.equal(found, wanted)


def test_a_run_with_checkpointing_gives_the_same_adapter(tmp_path, tiny_folder):
    results = []
    for every in (0, 1, 2):
        model = adapted(tiny_folder("llama"), lora_dropout=0.2)
        options = _C.TrainOptions(**OPTIONS, gradient_checkpointing=every)
        _C.Trainer(model, make_rows(tmp_path / f"{every}.tokens"), None, options).run()
        results.append(trained(model))
    for other in results[1:]:
        for name, tensor in results[0].items():
            assert torch.equal(other[name], tensor)


def test_bad_values_are_refused(tiny_folder):
    model = adapted(tiny_folder("llama"))
    with pytest.raises(_C.Error, match="every k-th block"):
        model.checkpointing = -1
    with pytest.raises(_C.Error, match="gradient_checkpointing is -2, wanted at least 0"):
        _C.TrainOptions(**OPTIONS, gradient_checkpointing=-2)


# In a process of its own: its peak is this run's.
MEASURED = """
import json, resource, sys
import torch
sys.path.insert(0, sys.argv[3])
from test_trainer import adapted, make_rows
from budwood import _C
from pathlib import Path
import random
model = _C.load_model(sys.argv[1], "float32")
_C.inject(model, _C.LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"))
with _C.TokenFileWriter(sys.argv[2], 97) as writer:
    for row in range(8):
        writer.add([(7 * t + row) % 97 for t in range(1024)])
options = _C.TrainOptions(steps=2, batch_size=4, sequence_length=1024, packing="none",
                          gradient_checkpointing=int(sys.argv[4]))
trainer = _C.Trainer(model, _C.TokenFile.open(sys.argv[2]), None, options)
plan = trainer.memory_plan
result = trainer.run()
print(json.dumps({"plan": plan, "peak": result["peak_rss_mb"] * 2**20}))
"""


@pytest.mark.slow
def test_the_plan_foretells_the_measured_peak(tmp_path):
    import json

    import transformers

    config = transformers.LlamaConfig(
        **TINY
        | {
            "hidden_size": 384,
            "intermediate_size": 1024,
            "num_hidden_layers": 10,
            "max_position_embeddings": 1024,
        }
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    peaks = []
    for every in (0, 1):
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                MEASURED,
                str(tmp_path / "model"),
                str(tmp_path / "rows"),
                __file__.rsplit("/", 1)[0],
                str(every),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout.splitlines()[-1])
        assert found["peak"] == pytest.approx(found["plan"]["total"], rel=0.15)
        peaks.append(found["peak"])
    assert peaks[1] < 0.7 * peaks[0]
