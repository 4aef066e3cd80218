"""The C++ trainer against torch's own optimiser in a plain loop, transformers and HF PEFT."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time

import peft
import pytest
import torch
import transformers
from conftest import TINY

from budwood import _C

SETTINGS = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}


def make_rows(path, count=24, longest=20, seed=0):
    draw = random.Random(seed)
    with _C.TokenFileWriter(path, TINY["vocab_size"]) as writer:
        for _ in range(count):
            n = draw.randint(3, longest)
            ids = [draw.randrange(TINY["vocab_size"]) for _ in range(n)]
            writer.add(ids, [t > 1 and draw.random() < 0.7 for t in range(n - 1)] + [True])
    return _C.TokenFile.open(path)


def adapted(folder, seed=1, **changes):
    model = _C.load_model(str(folder), "float32")
    _C.inject(model, _C.LoraConfig(task_type="CAUSAL_LM", **{**SETTINGS, **changes}), seed=seed)
    return model


def trained(model):
    return {name: p.detach().clone() for name, p in _C.trainable_parameters(model)}


OPTIONS = {
    "steps": 7,
    "batch_size": 2,
    "grad_accumulation": 3,
    "sequence_length": 24,
    "learning_rate": 1e-2,
    "weight_decay": 0.05,
    "beta2": 0.98,
    "warmup_steps": 2,
    "max_grad_norm": 0.5,
    "log_every": 1,
    "seed": 5,
}


@pytest.mark.parametrize("packing", ["concat", "pack", "none"])
def test_a_run_equals_a_plain_loop_with_torchs_adamw_to_the_bit(tmp_path, tiny_folder, packing):
    data = make_rows(tmp_path / "x")
    options = {**OPTIONS, "packing": packing}
    model = adapted(tiny_folder("llama"))
    logged = []
    _C.Trainer(model, data, None, options).run(logged.append)

    other = adapted(tiny_folder("llama"))
    other.train()
    parameters = [p for _, p in _C.trainable_parameters(other)]
    optimizer = torch.optim.AdamW(
        parameters, lr=1e-2, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.05, foreach=False
    )
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 2, 7)
    sampler = _C.Sampler(data, 24, 2, packing, seed=5)
    for step in range(7):
        epoch = sampler.state()[0]
        window = []
        while len(window) < 3 and sampler.state()[0] == epoch:
            window.append(sampler.next())
        counted = sum(batch.counted for batch in window)
        total = 0.0
        for batch in window:
            loss = other.loss(batch.tokens, batch.labels).sum
            total += loss.item()
            (loss / counted).backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 0.5, foreach=False)
        rate = schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        assert logged[step]["loss"] == pytest.approx(total / counted, rel=1e-12)
        assert logged[step]["grad_norm"] == pytest.approx(norm.item(), rel=1e-6)
        assert logged[step]["learning_rate"] == pytest.approx(rate, abs=1e-15)
    wanted = trained(other)
    for name, found in trained(model).items():
        assert torch.equal(found, wanted[name]), name


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_an_evaluation_equals_transformers_on_separate_rows(tmp_path, tiny_folder, family):
    data = make_rows(tmp_path / "x")
    model = _C.load_model(str(tiny_folder(family)), "float32")
    result = _C.evaluate(model, _C.Sampler(data, 40, 3, "pack", shuffle=False))
    reference = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder(family)).eval()
    total, count = 0.0, 0
    for i in range(data.rows):
        ids, counted = data.row(i)
        ids = ids.long()
        with torch.no_grad():
            logits = reference(ids[None]).logits[0, :-1].double()
        labels = torch.where(counted, ids, -100)[1:]
        total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        count += (labels >= 0).sum().item()
    assert result["tokens"] == count
    assert result["loss"] == pytest.approx(total / count, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    assert 0 < result["loss_error"] < result["loss"]


def test_peft_loads_the_result_the_best_and_every_checkpoint(tmp_path, tiny_folder):
    folder = tiny_folder("llama")
    data = make_rows(tmp_path / "x")
    model = adapted(folder)
    out = tmp_path / "out"
    options = {**OPTIONS, "save_every": 3, "keep_last": 0, "eval_every": 3, "output": str(out)}
    _C.Trainer(model, data, data, options).run()
    assert json.loads((out / "training.json").read_text())["steps"] == 7
    ids = torch.tensor([[5, 17, 3, 96, 41, 8]])
    for adapter in [out, out / "best", *(out / f"checkpoint-{s}" for s in (3, 6, 7))]:
        base = transformers.AutoModelForCausalLM.from_pretrained(folder)
        loaded = peft.PeftModel.from_pretrained(base, str(adapter)).eval()
        ours = _C.load_model(str(folder), "float32")
        _C.load_adapter(ours, str(adapter))
        ours.eval()
        with torch.no_grad():
            torch.testing.assert_close(ours(ids), loaded(ids).logits, rtol=1e-4, atol=1e-4)
    model.eval()
    with torch.no_grad():
        base = transformers.AutoModelForCausalLM.from_pretrained(folder)
        final = peft.PeftModel.from_pretrained(base, str(out)).eval()
        torch.testing.assert_close(model(ids), final(ids).logits, rtol=1e-4, atol=1e-4)


PROGRAM = """
import sys
from budwood import _C
sys.path.insert(0, {tests!r})
import test_trainer as t
from pathlib import Path
model = t.adapted(Path({model!r}), lora_dropout=0.2)
data = _C.TokenFile.open({data!r})
options = dict(t.OPTIONS, steps={steps}, schedule="constant", output={out!r}, resume="auto")
def show(metrics):
    print(metrics["step"], flush=True)
result = _C.Trainer(model, data, None, options).run(show)
print("interrupted" if result["interrupted"] else "finished", result["steps"], flush=True)
"""


def start(tmp_path, folder, out, steps):
    text = PROGRAM.format(
        tests=os.path.dirname(__file__),
        model=str(folder),
        data=str(tmp_path / "x"),
        out=str(out),
        steps=steps,
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.Popen(
        [sys.executable, "-c", text], stdout=subprocess.PIPE, text=True, env=environment
    )


def test_ctrl_c_writes_a_checkpoint_from_which_the_run_ends_in_the_same_bytes(
    tmp_path, tiny_folder
):
    folder = tiny_folder("llama")
    data = make_rows(tmp_path / "x")
    out = tmp_path / "out"
    process = start(tmp_path, folder, out, steps=100000)
    for line in process.stdout:
        if line.strip() == "4":
            process.send_signal(signal.SIGINT)
            break
    rest = process.stdout.read().split("\n")
    assert process.wait(timeout=60) == 0
    word, step = rest[-2].split()
    assert word == "interrupted"
    assert (out / f"checkpoint-{step}").is_dir()
    assert not (out / "adapter_config.json").exists()

    total = int(step) + 5
    process = start(tmp_path, folder, out, total)
    assert f"finished {total}" in process.communicate(timeout=120)[0]
    whole = adapted(folder, lora_dropout=0.2)
    options = {**OPTIONS, "steps": total, "schedule": "constant", "output": str(tmp_path / "whole")}
    _C.Trainer(whole, data, None, options).run()
    name = "adapter_model.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_second_ctrl_c_ends_the_process(tmp_path, tiny_folder):
    make_rows(tmp_path / "x")
    process = start(tmp_path, tiny_folder("llama"), tmp_path / "out", steps=100000)
    process.stdout.readline()
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.001)
    process.stdout.close()
    assert process.wait(timeout=60) in (0, -signal.SIGTERM)


def interrupt_and_wait():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)


@pytest.fixture
def interruptible():
    """SIGINT as in a terminal; a process in the background starts with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_python_keeps_its_own_handler_after_a_run(tmp_path, tiny_folder):
    data = make_rows(tmp_path / "x")
    _C.Trainer(adapted(tiny_folder("llama")), data, None, {**OPTIONS, "steps": 1}).run()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(KeyboardInterrupt):
        interrupt_and_wait()


def test_an_exception_in_a_callback_comes_out_and_the_run_can_go_on(tmp_path, tiny_folder):
    data = make_rows(tmp_path / "x")
    trainer = _C.Trainer(adapted(tiny_folder("llama")), data, None, OPTIONS)

    def callback(metrics):
        if metrics["step"] == 3:
            raise LookupError("from the callback")

    with pytest.raises(LookupError, match="from the callback"):
        trainer.run(callback)
    assert trainer.step == 3
    steps = []
    assert trainer.run(lambda m: steps.append(m["step"]))["steps"] == 7
    assert steps == [4, 5, 6, 7]


def test_request_stop_from_a_callback_interrupts_and_run_goes_on(tmp_path, tiny_folder):
    data = make_rows(tmp_path / "x")
    whole = adapted(tiny_folder("llama"), lora_dropout=0.3)
    _C.Trainer(whole, data, None, OPTIONS).run()
    model = adapted(tiny_folder("llama"), lora_dropout=0.3)
    trainer = _C.Trainer(model, data, None, OPTIONS)
    result = trainer.run(lambda m: trainer.request_stop())
    assert (result["interrupted"], result["steps"]) == (True, 1)
    torch.rand(10)
    assert trainer.run()["steps"] == 7
    wanted = trained(whole)
    assert all(torch.equal(p, wanted[name]) for name, p in trained(model).items())


def test_other_threads_of_python_run_while_a_run_computes(tmp_path, tiny_folder):
    data = make_rows(tmp_path / "x")
    trainer = _C.Trainer(adapted(tiny_folder("llama")), data, None, {**OPTIONS, "steps": 10**6})
    timer = threading.Timer(0.2, trainer.request_stop)
    timer.start()
    assert trainer.run()["interrupted"]
    timer.join()


def test_options_are_checked_in_python_as_in_cpp(tmp_path, tiny_folder):
    data = make_rows(tmp_path / "x")
    model = adapted(tiny_folder("llama"))
    with pytest.raises(_C.Error, match="'learning_rat'; the nearest is 'learning_rate'"):
        _C.Trainer(model, data, None, {"learning_rat": 1})
    with pytest.raises(_C.Error, match="batch_size is 0"):
        _C.TrainOptions(batch_size=0)
    options = _C.TrainOptions(**OPTIONS)
    assert _C.TrainOptions.from_dict(options.to_dict()).to_json() == options.to_json()
    long = make_rows(tmp_path / "long", longest=100)
    with pytest.raises(_C.Error, match="at most 64"):
        _C.Trainer(model, long, None, {"sequence_length": 99, "packing": "none"})
    small = _C.TokenFileWriter(tmp_path / "big", 200)
    small.add([1, 2, 150])
    small.commit()
    with pytest.raises(_C.Error, match="row 0, position 2: token id 150"):
        _C.Trainer(model, _C.TokenFile.open(tmp_path / "big"), None, OPTIONS)
