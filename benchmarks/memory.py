"""What it takes to tune a model: memory, time and held-out loss of every way that Budwood knows.

    python benchmarks/memory.py [--steps 30] [--only lomo,mezo] [--json FILE]
    python benchmarks/memory.py --large        a random Llama of 1.1 billion parameters

SmolLM2-135M on Shakespeare's plays, fp32, 4 sequences of 128 tokens a step on 2 threads, the same
tokens for all; held-out loss is that of Hamlet. Each row is a process of its own, whose peak is
that of its whole life, loading included; "trained" are the numbers that are trained at a time.
"inference" evaluates and trains nothing. Rows with (torch) are Hugging Face's model in torch, with
torch's AdamW or lomo-optim, where that is installed. The large model is measured without losses,
every block running again in the backward, 2 x 256 tokens a step.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import chosen, cpu_name, status_mb
from merge import make
from quality import prepare

LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
FULL = {"tune": "full"}
NF4 = {"quantize": "nf4"}
INT4 = {"quantize": "int4", "block_size": 32}
#: Row -> options of the trainer, and what there is besides: how the base is packed, the adapter.
ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "inference": ({}, {"inference": True}),
    "AdamW": ({**FULL, "learning_rate": 5e-5}, {}),
    "AdamW (torch)": ({"learning_rate": 5e-5}, {"torch": "adamw"}),
    "AdamW fused": ({**FULL, "learning_rate": 5e-5, "fused_backward": True}, {}),
    "AdamW8bit": ({**FULL, "learning_rate": 5e-5, "optimizer": "adamw8bit"}, {}),
    "GaLore": ({**FULL, "learning_rate": 5e-4, "optimizer": "galore", "galore_scale": 1.0}, {}),
    "LOMO": ({**FULL, "learning_rate": 2e-3, "optimizer": "lomo", "max_grad_norm": 0.0}, {}),
    "LOMO (torch)": ({"learning_rate": 2e-3}, {"torch": "lomo"}),
    "LOMO clipped": ({**FULL, "learning_rate": 5e-2, "optimizer": "lomo"}, {}),
    "AdaLomo": ({**FULL, "learning_rate": 5e-4, "optimizer": "adalomo"}, {}),
    "LISA": ({**FULL, "learning_rate": 5e-5, "blocks": "lisa", "block_steps": 5}, {}),
    "BAdam": ({**FULL, "learning_rate": 2e-4, "blocks": "badam", "block_steps": 5}, {}),
    "TokenTune": ({**FULL, "learning_rate": 5e-5, "selected_tokens": 0.25}, {}),
    "MeZO": ({**FULL, "learning_rate": 2e-6, "optimizer": "mezo"}, {}),
    "LoRA": ({"learning_rate": 1e-3}, {"adapter": LORA}),
    "LoRA TokenTune": ({"learning_rate": 1e-3, "selected_tokens": 0.25}, {"adapter": LORA}),
    "LoRA MeZO": ({"learning_rate": 1e-4, "optimizer": "mezo"}, {"adapter": LORA}),
    "QLoRA": ({"learning_rate": 1e-3}, {"adapter": LORA, **NF4}),
    "LoftQ": ({"learning_rate": 1e-3}, {"adapter": LORA, **NF4, "start": "loftq"}),
    "QA-LoRA": (
        {"learning_rate": 1e-3},
        {"adapter": {**LORA, "use_qalora": True, "qalora_group_size": 32}, **INT4},
    ),
    "PEQA": ({"learning_rate": 1e-4}, {"peqa": True, **INT4}),
}
#: Rows of the large model: all that are Budwood's.
LARGE = [name for name, (_, more) in ROWS.items() if "torch" not in more]


def run_row(name: str, files: dict[str, str], shape: dict[str, int]) -> dict[str, float]:
    """One row, in this process."""
    import torch

    torch.set_num_threads(2)
    options, more = ROWS[name]
    options = {
        "steps": shape["steps"],
        "batch_size": shape["batch"],
        "sequence_length": shape["length"],
        "packing": "concat",
        "schedule": "constant",
        "gradient_checkpointing": shape["checkpointing"],
        "log_every": 1,
        **options,
    }
    run = run_torch if "torch" in more else run_budwood
    figures = run(options, more, files)
    return {**figures, "peak": status_mb("VmHWM")}


def run_budwood(
    options: dict[str, Any], more: dict[str, Any], files: dict[str, str]
) -> dict[str, float]:
    from budwood import _C

    model = _C.load_model(
        files["base"],
        "float32",
        quantize=more.get("quantize", ""),
        block_size=more.get("block_size", 64),
    )
    train = _C.TokenFile.open(files["train.tokens"])
    tokens = options["batch_size"] * options["sequence_length"]
    if more.get("inference"):
        sampler = _C.Sampler(train, options["sequence_length"], options["batch_size"], "concat")
        begin = time.perf_counter()
        _C.evaluate(model, sampler, 3)
        seconds = (time.perf_counter() - begin) / 3 / tokens
        return {"seconds": seconds, "loss": held_out(model, files), "trained": 0}
    if "adapter" in more:
        _C.inject(model, _C.LoraConfig(**more["adapter"]))
    if "peqa" in more:
        _C.inject(model, _C.PeqaConfig(target_modules="all-linear"))
    if "start" in more:
        _C.start_from_original(model, files["base"], method=more["start"])
    trainer = _C.Trainer(model, train, None, options)
    times: list[float] = []
    trainer.run(lambda metrics: times.append(metrics["seconds"]))
    trained = sum(p.numel() for _, p in _C.trainable_parameters(model))
    each = sorted(b - a for a, b in itertools.pairwise(times)) or times
    return {
        "seconds": each[len(each) // 2] / tokens,
        "loss": held_out(model, files),
        "trained": trained,
    }


def held_out(model: Any, files: dict[str, str]) -> float:
    from budwood import _C

    if "held-out.tokens" not in files:
        return 0.0
    data = _C.TokenFile.open(files["held-out.tokens"])
    return _C.evaluate(model, _C.Sampler(data, sequence_length=256, shuffle=False), 4)["loss"]


def run_torch(
    options: dict[str, Any], more: dict[str, Any], files: dict[str, str]
) -> dict[str, float]:
    """Hugging Face's model, torch's autograd."""
    import torch
    import transformers

    from budwood import _C

    model = transformers.AutoModelForCausalLM.from_pretrained(files["base"], dtype=torch.float32)
    model.train()
    rate, length = options["learning_rate"], options["sequence_length"]
    if more["torch"] == "lomo":
        from lomo_optim import Lomo

        lomo = Lomo(model, lr=rate)
    else:
        adamw = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    sampler = _C.Sampler(
        _C.TokenFile.open(files["train.tokens"]), length, options["batch_size"], "concat"
    )
    times = []
    for _ in range(options["steps"]):
        batch = sampler.next()
        ids = batch.tokens.ids.view(-1, length)
        begin = time.perf_counter()
        loss = model(ids, labels=ids).loss
        if more["torch"] == "lomo":
            lomo.fused_backward(loss, rate)
        else:
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adamw.step()
            adamw.zero_grad()
        times.append(time.perf_counter() - begin)
    model.eval()
    losses = []
    data = _C.TokenFile.open(files["held-out.tokens"])
    with torch.no_grad():
        for i in range(min(32, data.rows)):
            ids = data.row(i)[0].long()[None]
            losses.append(model(ids, labels=ids).loss.item())
    each = sorted(times)[len(times) // 2]
    return {
        "seconds": each / options["batch_size"] / length,
        "loss": sum(losses) / len(losses),
        "trained": sum(p.numel() for p in model.parameters()),
    }


def large_files(folder: Path) -> dict[str, str]:
    """The random model, and rows of random tokens."""
    import torch

    from budwood import _C

    make(folder, 22)
    tokens = folder / "train.tokens"
    generator = torch.Generator().manual_seed(0)
    with _C.TokenFileWriter(str(tokens), 32000) as writer:
        for _ in range(64):
            writer.add(torch.randint(0, 32000, (256,), generator=generator).tolist())
    return {"base": str(folder / "model"), "train.tokens": str(tokens)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=0, help="default 30, or 3 with --large")
    parser.add_argument("--only", default="", help="rows, separated by commas")
    parser.add_argument("--large", action="store_true", help="the model of 1.1 billion parameters")
    parser.add_argument("--json", help="where the figures are written, too")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        job = json.loads(options.row)
        print(json.dumps(run_row(job["name"], job["files"], job["shape"])))
        return
    names = chosen(options.only, ROWS if not options.large else {n: ROWS[n] for n in LARGE})
    if importlib.util.find_spec("lomo_optim") is None and "LOMO (torch)" in names:
        print("lomo-optim is not installed: its row is left out\n")
        names.remove("LOMO (torch)")
    shape = {"steps": options.steps or 30, "batch": 4, "length": 128, "checkpointing": 0}
    if options.large:
        shape = {"steps": options.steps or 3, "batch": 2, "length": 256, "checkpointing": 1}
    print(
        f"{cpu_name()}, 2 threads; {shape['steps']} steps of {shape['batch']} x {shape['length']}"
    )
    print(f"\n{'row':<16}{'trained':>13}{'peak MB':>9}{'tokens/s':>10}{'loss':>9}")
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        files = (
            large_files(folder)
            if options.large
            else {name: str(path) for name, path in prepare(folder).items()}
        )
        for name in names:
            job = json.dumps({"name": name, "files": files, "shape": shape})
            command = [sys.executable, __file__, "--row", job]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{name}:\n{done.stderr}")
            row = found[name] = json.loads(done.stdout.splitlines()[-1])
            loss = f"{row['loss']:.4f}" if row["loss"] else ""
            print(
                f"{name:<16}{row['trained']:>13,.0f}{row['peak']:>9.0f}{1 / row['seconds']:>10.0f}"
                f"{loss:>9}",
                flush=True,
            )
    base = found.get("inference")
    if base:
        print()
        for name in ("LOMO", "MeZO"):
            if name in found:
                print(f"{name}: {found[name]['peak'] / base['peak']:.2f} of inference")
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
