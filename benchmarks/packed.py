"""Rows of different lengths: HF Trainer with HF PEFT beside Budwood's trainer, which packs them.

    python benchmarks/packed.py [--rows 32] [--rounds 3] [--json]

LoRA of rank 16 on all projections of SmolLM2-135M in fp32, the same rows in both, 8 to a batch for
HF Trainer (padded to the longest, as is its default) and as many tokens to a step for Budwood.
Lengths are spread like those of answers in chat data: log-normal, median 96, from 16 to 512.
Each contender runs in a process of its own, in alternation; a ratio is of medians.
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
from step import TARGETS, prepare_model

CONTENDERS = ("hf-trainer", "budwood-cpp")
BATCH, WINDOW, RANK = 8, 512, 16


def make_rows(count: int) -> list[list[int]]:
    import torch

    generator = torch.Generator().manual_seed(0)
    lengths = (torch.randn(count, generator=generator) * 0.7 + 4.56).exp().clamp(16, WINDOW).int()
    return [torch.randint(5, 49000, (int(n),), generator=generator).tolist() for n in lengths]


def hf_trainer(args, rows) -> float:
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype="float32")
    config = peft.LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, config)

    def collate(batch):
        import torch

        longest = max(len(row) for row in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for i, row in enumerate(batch):
            ids[i, : len(row)] = labels[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    with tempfile.TemporaryDirectory() as folder:
        trainer = transformers.Trainer(
            model=model,
            args=transformers.TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=BATCH,
                num_train_epochs=1,
                learning_rate=1e-4,
                report_to=[],
                save_strategy="no",
                use_cpu=True,
                remove_unused_columns=False,
                disable_tqdm=True,
                logging_strategy="no",
            ),
            train_dataset=rows,
            data_collator=collate,
        )
        begin = time.perf_counter()
        trainer.train()
        return time.perf_counter() - begin


def budwood_cpp(args, rows) -> float:
    from budwood import _C

    model = _C.load_model(args.model, dtype="float32")
    _C.inject(model, _C.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS))
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "rows.tokens")
        writer = _C.TokenFileWriter(file, model.config["vocab_size"])
        for row in rows:
            writer.add(row)
        writer.commit()
        each = sum(len(row) for row in rows) * BATCH / len(rows)  # tokens of a step of the peer's
        options = _C.TrainOptions(
            epochs=1,
            batch_size=max(1, round(each / WINDOW)),
            sequence_length=WINDOW,
            packing="pack",
            learning_rate=1e-4,
        )
        trainer = _C.Trainer(model, _C.TokenFile.open(file), None, options)
        begin = time.perf_counter()
        trainer.run()
        return time.perf_counter() - begin


def run_one(args) -> None:
    import torch

    torch.set_num_threads(args.threads)
    rows = make_rows(args.rows)
    seconds = (hf_trainer if args.one == "hf-trainer" else budwood_cpp)(args, rows)
    print(json.dumps({"seconds": seconds, "peak_mb": status_mb("VmHWM")}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--model")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        run_one(args)
        return
    found = {name: [] for name in CONTENDERS}
    with tempfile.TemporaryDirectory() as scratch:
        args.model = args.model or prepare_model(Path(scratch) / "model", "float32")
        for _ in range(args.rounds):
            for name in CONTENDERS:
                command = [sys.executable, __file__, "--one", name, "--model", args.model]
                command += ["--rows", str(args.rows), "--threads", str(args.threads)]
                env = os.environ | {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
                done = subprocess.run(
                    command, env=env, stdout=subprocess.PIPE, text=True, check=True
                )
                found[name].append(json.loads(done.stdout.splitlines()[-1]))
    tokens = sum(len(row) for row in make_rows(args.rows))
    median = {n: statistics.median(one["seconds"] for one in runs) for n, runs in found.items()}
    peak = {n: max(one["peak_mb"] for one in runs) for n, runs in found.items()}
    result = {
        name: {
            "seconds": median[name],
            "tokens_per_second": tokens / median[name],
            "speed_ratio": median["hf-trainer"] / median[name],
            "peak_mb": peak[name],
            "memory_ratio": peak[name] / peak["hf-trainer"],
        }
        for name in CONTENDERS
    }
    if args.json:
        print(json.dumps({"tokens": tokens, "rows": args.rows, "results": result}, indent=1))
        return
    print(f"{args.rows} rows, {tokens} tokens; {args.threads} threads, {cpu_name()}\n")
    for name, one in result.items():
        print(
            f"{name:14}{one['seconds']:8.1f} s{one['tokens_per_second']:8.0f} tokens/s"
            f"{one['speed_ratio']:7.2f}x{one['peak_mb']:8.0f} MB{one['memory_ratio']:7.2f}x"
        )


if __name__ == "__main__":
    main()
