"""Merging an adapter into a model's files: Budwood, HF PEFT and a plain copy, in alternation.

    python benchmarks/merge.py [--layers 22] [--rounds 3] [--only budwood,copy] [--json FILE]

The model is a random Llama of 1.1 billion parameters in bf16, in five shards, the adapter LoRA of
rank 16 on all its projections. Each contender is a process of its own, timed from its start to its
end; everything is synced to the disk. HF PEFT loads the model, merges and saves. Ratios are those
of medians.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import chosen, cpu_name

COPY = """
import os, shutil, sys
shutil.copytree(sys.argv[1], sys.argv[3])
"""
BUDWOOD = """
import sys
import budwood
budwood.merge_files(sys.argv[1], sys.argv[2], sys.argv[3])
"""
PEFT = """
import sys
import torch, transformers, peft
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
model = peft.PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload()
model.save_pretrained(sys.argv[3], max_shard_size="500MB")
"""
CONTENDERS = {"copy": COPY, "budwood": BUDWOOD, "budwood-native": None, "peft": PEFT}


def make(folder: Path, layers: int) -> None:
    """The model and the adapter, without a library that would hold both in memory for long."""
    import peft
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = transformers.LlamaForCausalLM(config)
    size = sum(p.numel() for p in model.parameters()) * 2
    model.save_pretrained(folder / "model", max_shard_size=size // 5 + (32 << 20))
    torch.set_default_dtype(torch.float32)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules="all-linear"))
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.01)
    adapted.save_pretrained(folder / "adapter")


def native() -> str:
    """The native program of the build that the package belongs to. Asked of a process of its own:
    what this one has in memory would count as its children's peak."""
    code = "from budwood import _C; print(_C.__file__)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return str(Path(done.stdout.strip()).parents[2] / "tools" / "budwood")


def run(name: str, folder: Path) -> tuple[float, float]:
    """Seconds until everything is on the disk, and the peak in MB."""
    names = [str(folder / part) for part in ("model", "adapter", "out")]
    shutil.rmtree(names[2], ignore_errors=True)
    os.sync()
    if CONTENDERS[name] is None:
        flags = ("--model", "--adapter", "--out")
        command = [native(), "merge"]
        command += [part for pair in zip(flags, names, strict=True) for part in pair]
    else:
        command = [sys.executable, "-c", CONTENDERS[name], *names]
    begin = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    os.sync()
    seconds = time.perf_counter() - begin
    if status:
        raise SystemExit(f"{name} failed")
    return seconds, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="contenders, separated by commas")
    parser.add_argument("--folder", help="where the files go; needs 7 GB")
    parser.add_argument("--json", help="where the figures are written, too")
    options = parser.parse_args()
    names = chosen(options.only, CONTENDERS)
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        folder = Path(scratch)
        # In a process of its own: what it leaves in memory is not to disturb.
        code = f"import merge, pathlib; merge.make(pathlib.Path({str(folder)!r}), {options.layers})"
        subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)
        model = sum(file.stat().st_size for file in (folder / "model").iterdir())
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        for _ in range(options.rounds):
            for name in names:
                found[name].append(run(name, folder))
    print(f"{cpu_name()}; {model / 1e9:.2f} GB of weights, median of {options.rounds}\n")
    print(f"{'':<16}{'seconds':>9}{'of copy':>9}{'peak MB':>9}")
    medians = {n: statistics.median(s for s, _ in found[n]) for n in names}
    for name in names:
        ratio = f"{medians[name] / medians['copy']:.2f}x" if "copy" in medians else ""
        peak = max(mb for _, mb in found[name])
        print(f"{name:<16}{medians[name]:>9.2f}{ratio:>9}{peak:>9,.0f}")
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
