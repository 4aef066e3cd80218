"""Where a training step of Budwood's own model spends its time, by samples of `perf`.

    python benchmarks/breakdown.py [--base nf4] [--compute bfloat16] [--threads 1] [--steps 4]

Takes the options of step.py. `perf` has to be there (Debian: linux-perf). Sampling begins after the
model is loaded and the first step is done.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import cpu_name
from step import cpp_command, options_of, prepare_model

#: Part -> (library, pattern of its functions), the first that fits counts.
PARTS = [
    ("products with the base", "libbudwood_quant", r"tile|hand_out|transpose|zip|multiply|dot"),
    ("16 bits to 32 and back", "libbudwood_quant", r"_to_fp32|fp32_to_|round"),
    ("decoding the base", "libbudwood_quant", r""),
    ("low-rank and attention products", "libbudwood.so", r"tile<|rank|factor"),
    ("softmax of attention", "libbudwood.so", r"attend"),
    ("gates, norms, rotation", "libbudwood.so", r"gated|norm|rotate|gelu|row"),
    ("loss", "libbudwood.so", r"entropy|loss|soft|sum_of|label"),
    ("rest of Budwood", "libbudwood.so", r""),
    ("copies", "libc.so", r"mem"),
    ("waiting for threads", "libgomp", r""),
    ("torch", r"libtorch|libc10", r""),
    ("system: pages, scheduling", r"kernel", r""),
    ("other", r"", r""),
]


def samples(program: list[str], threads: int, delay: float) -> list[tuple[float, str, str]]:
    """(percent, library, function) of everything that was seen."""
    with tempfile.TemporaryDirectory() as folder:
        data = str(Path(folder) / "perf.data")
        record = ["perf", "record", "-q", "-F", "499", "-D", str(int(1000 * delay)), "-o", data]
        env = os.environ | {"OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(
            [*record, *program], capture_output=True, text=True, env=env, check=False
        )
        if done.returncode:
            sys.exit(f"perf record failed:\n{done.stderr}")
        show = ["perf", "report", "-i", data, "--stdio", "--no-children", "--sort", "dso,symbol"]
        text = subprocess.run(show, capture_output=True, text=True, check=True).stdout
    found = []
    for line in text.splitlines():
        match = re.match(r"\s*([\d.]+)%\s+(\S+)\s+\[.\]\s+(.*)", line)
        if match:
            found.append((float(match[1]), match[2], match[3]))
    return found


def main() -> None:
    args = options_of(__doc__)
    if shutil.which("perf") is None:
        sys.exit("perf is missing (Debian: apt-get install linux-perf)")
    with tempfile.TemporaryDirectory() as scratch:
        args.model = args.model or prepare_model(Path(scratch) / "model", args.stored)
        args.steps = max(args.steps, 4)
        program = cpp_command(args, "budwood-cpp")
        one = subprocess.run(
            [*program[:7], "1", *program[8:]], capture_output=True, text=True, check=False
        )
        if one.returncode:
            sys.exit(one.stderr)
        first = json.loads(one.stdout)["seconds"][0]
        seen = samples(program, args.threads, delay=1.5 + 1.5 * first)
    total = sum(percent for percent, _, _ in seen)
    shares = dict.fromkeys((name for name, _, _ in PARTS), 0.0)
    for percent, library, function in seen:
        for name, where, what in PARTS:
            if re.search(where, library) and re.search(what, function):
                shares[name] += percent
                break
    print(
        f"{args.method} r{args.rank}, {args.base} base, {args.compute}, {args.batch} x "
        f"{args.length} tokens, {args.threads} threads, {first:.2f} s/step; {cpu_name()}\n"
    )
    for name, share in shares.items():
        if share > 0:
            print(f"{name:34}{100 * share / total:6.1f} %")


if __name__ == "__main__":
    main()
