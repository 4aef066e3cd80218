"""The page docs/benchmarks.md: every step measured beside HF PEFT, with a plot.

    python benchmarks/report.py            all of it (an hour on 2 cores)
    python benchmarks/report.py --quick    fewer rounds and shapes

What was measured stays in docs/benchmarks.json, apart for each kind of processor, and a run that
was stopped goes on from there when the versions and the rounds are the same; --again measures anew.
The plot shows the processor of this run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from machine import cpu_name
from step import prepare_model

DOCS = Path(__file__).parent.parent / "docs"
STEP = Path(__file__).parent / "step.py"
PEERS = ("torch", "transformers", "peft", "bitsandbytes")

# (title, options of step.py, contenders)
FAST = "peft,peft-optimize,budwood-python,budwood-optimize,budwood-cpp"
SHORT = "peft,budwood-python,budwood-cpp"
SAVING = ",budwood-cpp-checkpointed,budwood-cpp-checkpointed-8th,budwood-cpp-bf16-activations"
CASES = [
    ("LoRA, fp32", "--method lora", FAST + SAVING),
    ("LoRA, fp32, allocator tuned for the peer", "--method lora --allocator tuned", SHORT),
    ("LoRA, bf16", "--method lora --compute bfloat16", FAST),
    ("QLoRA NF4, fp32 compute", "--base nf4", FAST + SAVING),
    ("QLoRA NF4, bf16 compute", "--base nf4 --compute bfloat16", FAST),
    ("DoRA, fp32", "--method dora", SHORT),
    ("IA3, fp32", "--method ia3", SHORT),
    ("Prefix of 20, fp32", "--method prefix", SHORT),
    ("Prompt of 20, fp32", "--method prompt", SHORT),
    ("Full fine-tuning, fp32", "--method full", "peft,peft-optimize"),
    ("LoRA, fp32, 1 thread", "--threads 1", SHORT),
    ("LoRA, fp32, 1 x 128", "--batch 1 --length 128", SHORT),
    ("LoRA, fp32, 1 x 512", "--batch 1 --length 512", SHORT),
    ("LoRA, fp32, 8 x 512", "--batch 8 --length 512", SHORT),
]
QUICK = 9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--only", default="", help="the title, or a part of several titles")
    args = parser.parse_args()
    rounds = args.rounds or (3 if args.quick else 5)
    machine = {"cpu": cpu_name(), "rounds": rounds, **{p: version(p) for p in PEERS}}
    store = DOCS / "benchmarks.json"
    records = json.loads(store.read_text()) if store.exists() else []
    known = next((r for r in records if r["machine"]["cpu"] == machine["cpu"]), None)
    if known is None or known["machine"] != machine or args.again:
        known = {"machine": machine, "cases": {}}
    records = [known, *(r for r in records if r["machine"]["cpu"] != machine["cpu"])]
    with tempfile.TemporaryDirectory() as scratch:
        model = None
        for title, options, contenders in CASES[: QUICK if args.quick else None]:
            exact = any(args.only == other for other, _, _ in CASES)
            wanted = args.only == title if exact else args.only in title
            if title in known["cases"] or not wanted:
                continue
            model = model or str(prepare_model(Path(scratch) / "model"))
            print(f"== {title}", flush=True)
            command = [sys.executable, str(STEP), "--json", "--model", model]
            command += ["--rounds", str(rounds), "--contenders", contenders, *options.split()]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            known["cases"][title] = json.loads(done.stdout)
            store.write_text(json.dumps(records, indent=1) + "\n")
            print(table(known["cases"][title]), flush=True)
    write_page(records)
    plot(known)
    print(f"wrote {DOCS / 'benchmarks.md'} and {DOCS / 'benchmarks.png'}")


def table(case: dict) -> str:
    lines = [
        "| | s/step | fastest to slowest | tokens/s | speed | peak MB | memory | of FMA peak |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, r in case["rows"].items():
        part = r.get("peak_share")
        share = f"{100 * part:.0f} %" if part else ""
        lines.append(
            f"| {name} | {r['seconds']:.2f} | {r['seconds_min']:.2f} to {r['seconds_max']:.2f} | "
            f"{r['tokens_per_second']:.0f} | {r['speed_ratio']:.2f}x | {r['peak_mb']:.0f} | "
            f"{r['memory_ratio']:.2f}x | {share} |"
        )
    return "\n".join(lines)


def write_page(records: list[dict]) -> None:
    text = [
        "# Benchmarks",
        "",
        "One training step of SmolLM2-135M, Budwood beside HF PEFT. Each contender runs in a",
        "process of its own, in alternation, on the same weights, batch, seeds and threads;",
        "medians of rounds of 2 steps. Speed is HF PEFT's time over the contender's, memory the",
        "contender's peak over HF PEFT's. 4 x 256 tokens and 2 threads where nothing else is said.",
        "The machines are shared: fastest and slowest round of each contender are in the tables.",
        "",
        "`make bench-report` makes this page; `benchmarks/step.py` says what the",
        "contenders are.",
        "",
    ]
    for i, record in enumerate(records):
        machine = record["machine"]
        text += [f"## {machine['cpu']}", ""]
        versions = ", ".join(f"{p} {machine[p]}" for p in PEERS)
        text += [f"{machine['rounds']} rounds; {versions}.", ""]
        if i == 0:
            text += ["![time per token and peak memory](benchmarks.png)", ""]
        for title, _, _ in CASES:
            if title in record["cases"]:
                text += [f"### {title}", "", table(record["cases"][title]), ""]
    (DOCS / "benchmarks.md").write_text("\n".join(text))


def plot(known: dict) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = [(t, known["cases"][t]) for t, _, _ in CASES if t in known["cases"]]
    if not cases:
        return
    colours = {
        "peft": "#999999",
        "peft-optimize": "#c9a227",
        "budwood-python": "#9ecae1",
        "budwood-optimize": "#4292c6",
        "budwood-cpp": "#1b7837",
        "budwood-cpp-bf16-activations": "#762a83",
        "budwood-cpp-checkpointed-8th": "#5aae61",
        "budwood-cpp-checkpointed": "#a6dba0",
    }
    figure, axes = plt.subplots(1, 2, figsize=(12, 1.5 + 0.62 * len(cases)), sharey=True)
    for axis, key, label in (
        (axes[0], "seconds", "milliseconds per token"),
        (axes[1], "peak_mb", "peak memory, MB"),
    ):
        for row, (_, case) in enumerate(cases):
            tokens = case["context"]["batch"] * case["context"]["length"]
            there = [n for n in colours if n in case["rows"]]
            for i, name in enumerate(there):
                value = case["rows"][name][key]
                value = 1000 * value / tokens if key == "seconds" else value
                height = 0.8 / len(there)
                axis.barh(
                    row - 0.4 + height * (i + 0.5),
                    value,
                    height * 0.9,
                    color=colours[name],
                    label=name,
                )
        axis.set_xlabel(label)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(cases)), [t for t, _ in cases])
    axes[0].invert_yaxis()
    handles = {
        label: handle
        for axis in axes
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=3, frameon=False)
    figure.tight_layout(rect=(0, 0.6 / (1.5 + 0.62 * len(cases)), 1, 1))
    figure.savefig(DOCS / "benchmarks.png", dpi=110)


if __name__ == "__main__":
    main()
